"""``trtkern report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtkern.commands import _completion, analyze
from trtkern.commands._common import FAILURE, Quit, quits
from trtkern.commands.analyze._options import BackendOption, DataDirOption, DeviceOption, ThreadsOption, asked
from trtkern.output.console import console
from trtkern.training.folder import reportable


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders of `trtkern train`.", autocompletion=_completion.runs),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The page.", show_default="RUN/analysis.html, of several report-<names>.html"
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Show this analysis alone; may be given several times.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave this analysis out; may be given several times.")
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute/--no-compute", help="Make the analyses that a run does not have yet.")
    ] = True,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> int:
    """Put what is known of a run, or of several side by side, on one HTML page that needs no network.

    Analyses that a run does not have yet, or that are of other weights than it has now, are made with the defaults of
    `trtkern analyze NAME` and kept in RUN/analysis.
    """
    with asked(backend=backend, device=device, threads=threads):
        names = analyze.chosen(only or [], skip or [])
        for run in runs:
            reportable(Path(run))
        from trtkern.commands.analyze import _reported
        from trtkern.reports import page
        from trtkern.reports.runs import read

        found = read(runs)
        place = page.place(found, out)
        given = {"data_dir": data_dir, "backend": backend, "device": device, "threads": threads}
        gathered = [_reported.Gathered(each, names, given) for each in found]
        if not compute:
            for each in gathered:
                each.whole()
    failed = [line for each in gathered for line in each.fill(compute)]
    with quits(FAILURE, OSError):
        page.write(place, found, _reported.together(names, gathered), ["trtkern", *sys.argv[1:]])
        if len(found) == 1:
            page.lead(found[0], place)
    console().print(str(place), soft_wrap=True)
    if failed:
        raise Quit(f"report: {'; '.join(failed)}; the page says so too, --skip NAME leaves it out", FAILURE)
    return 0
