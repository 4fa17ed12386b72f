"""The commands of ``trtkern``, one file each."""

from __future__ import annotations

from typing import Annotated

import typer

from trtkern.commands import (
    analyze,
    bench,
    convert,
    data,
    doctor,
    evaluate,
    export,
    inspect,
    profile,
    report,
    sweep,
    train,
)
from trtkern.commands._common import Commands

app = typer.Typer(
    cls=Commands,
    help="Train spiking neural networks with Temporal Regularization Training, through fused kernels.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train.train)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sweep.sweep)
app.command()(evaluate.evaluate)
app.add_typer(analyze.app, name="analyze")
app.command()(report.report)
app.command()(bench.bench)
app.command()(profile.profile)
app.command()(inspect.inspect)
app.command()(convert.convert)
app.command()(export.export)
app.add_typer(data.app, name="data")
app.command()(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from trtkern.doctor import version

        typer.echo(version())
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of this, of Python and of torch, and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass
