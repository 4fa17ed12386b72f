"""``trtkern analyze NAME RUN``: what a trained network is like, one analysis a file."""

from __future__ import annotations

import typer

from trtkern.commands._common import Commands
from trtkern.commands.analyze import gradients
from trtkern.commands.analyze import landscape

app = typer.Typer(
    cls=Commands,
    help="Look at a run of `trtkern train`: Fisher information and gradients over time, flat minima, energy, spikes.",
    rich_markup_mode="markdown",
)
app.command()(gradients.gradients)
app.command()(landscape.landscape)

REPORTED: dict[str, str] = {}
"""The analyses that `trtkern report` makes, in the order of its page: {name: module}. A module has
``measure(opened, progress) -> Result``, which computes with the defaults of the command, and may have ``OPENED``, the
options of ``_opened.opened`` for it where they are others: {"split": "test", "samples": None}."""
