"""The commands of ``trtkern``, one file each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trtkern import __version__, doctor
from trtkern.commands import bench, evaluate, inspect, profile, train
from trtkern.commands._common import USER, Quit
from trtkern.names import unknown


class _Commands(TyperGroup):
    """The commands; what is none of them is refused with the list."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As its base."""
        if args[0] not in self.commands:
            raise Quit(str(unknown("command", args[0], self.commands)), USER)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Train spiking neural networks with Temporal Regularization Training, through fused kernels.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(bench.bench)
app.command()(profile.profile)
app.command()(inspect.inspect)
app.command("doctor")(doctor.main)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trtkern {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
