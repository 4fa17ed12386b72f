"""``trtkern sweep``. Nothing here loads torch; the runs do."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from trtkern.commands import _completion
from trtkern.commands._common import FAILURE, INTERRUPTED, Quit, need, quits, user_errors
from trtkern.commands._json import as_json, tell
from trtkern.commands.train import plan_of
from trtkern.names import short, unknown
from trtkern.output.console import console
from trtkern.parallel import launch
from trtkern.training import seeds as several
from trtkern.training import sweep as sweeps
from trtkern.training.options import of_command


@as_json("sweep")
def sweep(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe by name, or its .toml file.", autocompletion=_completion.recipe
        ),
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="Values of a key, such as loss.lam=1e-6,1e-5. May be given again."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="The seeds of each point.")] = "0",
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at a time.")] = 1,
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder of all runs.", show_default="runs/<recipe>-sweep")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Write a job array for sbatch in place of training here.")
    ] = False,
) -> int:
    """Train at every point of a grid, with every seed, and show what each point reaches, the best first.

    Each run is a `trtkern train` in a process of its own; every option of it may stand here too. The same command goes
    on where it was stopped: what is done is passed over, and what has begun is resumed. A run that fails is named, and
    the others go on.
    """
    need("train", "matplotlib", "safetensors")
    more = list(context.args)
    place = Path(run_dir or f"runs/{short(recipe).removesuffix('.toml')}-sweep")
    with user_errors():
        _check(more)
        todo = sweeps.runs(sweeps.grid(grid or []), several.parse(seeds), place)
        sweeps.check(_plans(context, todo, recipe, more))  # before the first run, not at its turn
        sweeps.claim(place, recipe, more)
    if slurm:
        with quits(FAILURE, OSError):
            script = sweeps.array(todo, jobs, recipe, more, place)
        tell(script=script, runs=len(todo))
        said = f"{len(todo)} runs: sbatch {shlex.quote(str(script))}; then this command without --slurm shows the table"
        console().print(said, soft_wrap=True)
        return 0
    return _performed(todo, jobs, recipe, more)


_OURS = ("--seed", "--seeds", "--run-dir", "--resume", "--recipe", "--dry-run")
"""Options of ``trtkern train`` that no run of a sweep may be given."""
_OWN = ("--grid", "--seeds", "--jobs", "--run-dir", "--slurm", "--json")


def _check(more: list[str]) -> None:
    """Raise for an option that no run takes, before the first of them fails by it."""
    flags = [flag for option in of_command() for each in option.flags for flag in each.split("/")]
    for word in more:
        name = word.partition("=")[0]
        if name in _OURS:
            raise ValueError(f"sweep: expected options of a run, got {name}, which the sweep gives each of them")
        if name.startswith("--") and name not in flags:
            raise unknown("trtkern sweep", name, [*_OWN, *(flag for flag in flags if flag not in (*_OURS, *_OWN))])


def _plans(
    context: typer.Context, todo: list[sweeps.Run], recipe: str, more: list[str]
) -> dict[sweeps.Run, dict[str, Any]]:
    """The plan of each run, of its command line as `trtkern train` reads it."""
    whole = context.find_root()
    command = cast(Any, whole.command).commands["train"]
    made: dict[sweeps.Point, dict[str, Any]] = {}
    for run in todo:
        if run.point not in made:
            words = run.beginning(recipe, more)[1:]
            made[run.point] = plan_of(command.make_context("train", words, parent=whole).params)
    return {run: {**made[run.point], "seed": run.seed} for run in todo}


def _performed(todo: list[sweeps.Run], jobs: int, recipe: str, more: list[str]) -> int:
    """Run what is left of a sweep, and show it."""
    out = console()
    failed: list[str] = []

    def told(run: sweeps.Run, status: int) -> None:
        if status:
            failed.append(f"{run.folder} ({sweeps.last_line(run)})")
        out.print(f"{run.folder}: {f'failed with status {status}' if status else 'done'}", soft_wrap=True)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with quits(FAILURE, OSError):
            sweeps.perform(todo, jobs, recipe, more, launch.bind, told)
    except KeyboardInterrupt:
        said = "stopped, as asked: the runs have their checkpoints, and the same command goes on"
        raise Quit(said, INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    rows, figure = sweeps.table(todo)
    tell(figure=figure, rows=rows, failed=failed)
    out.print(_table(rows, figure, f"{recipe}, {len(todo)} runs"))
    if failed:
        raise Quit(f"sweep: {len(failed)} of {len(todo)} runs failed: {'; '.join(failed)}", FAILURE)
    return 0


def _table(rows: list[dict[str, Any]], figure: str, title: str) -> Table:
    """A row a point: what its runs reach, mean and standard deviation over the seeds."""
    splits = list(dict.fromkeys(name for row in rows for name in row["mean"]))
    unit = "%" if figure == "accuracy" else "loss"
    made = Table("point", "seeds", *(f"{name} ({unit})" for name in splits), title=title, title_justify="left")
    for row in rows:
        figures = dict(zip(row["mean"], several.shown(row, figure), strict=True))
        reached = (figures.get(name, "") for name in splits)
        made.add_row(" ".join(row["point"]) or "as it is", ", ".join(row["seeds"]), *reached)
    return made
