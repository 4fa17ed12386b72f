"""``trtkern analyze NAME RUN``: what a trained network is like, one analysis a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer

from trtkern import names
from trtkern.commands._common import Commands
from trtkern.commands.analyze import early, energy, fisher, gradients, landscape, spikes

app = typer.Typer(
    cls=Commands,
    help="Look at a run of `trtkern train`: Fisher information and gradients over time, flat minima, energy, spikes.",
    rich_markup_mode="markdown",
)
app.command()(fisher.fisher)
app.command()(gradients.gradients)
app.command()(landscape.landscape)
app.command()(energy.energy)
app.command()(spikes.spikes)
app.command()(early.early)

_REPORTED = {
    "fisher": "fisher", "gradients": "gradients", "landscape": "landscape", "curvature": "landscape",
    "energy": "energy", "spikes": "spikes", "early": "early",
}  # fmt: skip
"""The analyses of a report in order, each with the command that makes it."""


def reported() -> dict[str, Callable[..., int]]:
    """{analysis: the command that makes it}, in the order of the page of `trtkern report`."""
    commands = {each.callback.__name__: each.callback for each in app.registered_commands if each.callback is not None}
    return {name: commands[command] for name, command in _REPORTED.items() if command in commands}


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The analyses of a report, in the order of its page.

    Raises:
        ValueError: one that is not known.
    """
    every = reported()
    for option, given in (("only", only), ("skip", skip)):
        for name in given:
            names.one_of(option, name, every)
    return [name for name in every if (not only or name in only) and name not in skip]
