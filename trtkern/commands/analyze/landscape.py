"""``trtkern analyze landscape``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtkern import names
from trtkern.commands._common import FAILURE, INTERRUPTED, USER, Quit, quits
from trtkern.commands._json import as_json
from trtkern.commands.analyze._options import (
    BackendOption,
    BatchOption,
    DataDirOption,
    DeviceOption,
    SamplesOption,
    SplitOption,
    ThreadsOption,
    asked,
)
from trtkern.output.console import console

if TYPE_CHECKING:
    from trtkern.analysis import Result
    from trtkern.commands.analyze._opened import Opened


@as_json("analyze landscape")
def landscape(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN ...]", help="Run folders or checkpoint files; several share their directions."
        ),
    ],
    points: Annotated[
        int, typer.Option(help="Points of each side of the plane; the line has twice as many and one.")
    ] = 25,
    radius: Annotated[
        float, typer.Option("--range", metavar="R", help="From -R to R; at 1 each filter has moved by its own length.")
    ] = 1.0,
    dims: Annotated[int, typer.Option(help="1: the line alone; 2: the plane as well.")] = 2,
    loss: Annotated[
        str, typer.Option(help="sdt: the cross entropy of the mean output; tet: the mean of that of every output.")
    ] = "sdt",
    seed: Annotated[int, typer.Option(help="Of the directions and of the random vectors.")] = 0,
    directions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Directions that --save-directions wrote, in place of --seed.", show_default="none"
        ),
    ] = None,
    save_directions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the directions there.", show_default="none")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that compute points.")] = 1,
    curvature: Annotated[bool, typer.Option(help="Also eigenvalues, trace and sharpness: curvature.json.")] = True,
    method: Annotated[
        str, typer.Option(help=f"How products with the Hessian are made: {', '.join(names.CURVATURES)}.")
    ] = "auto",
    step: Annotated[
        float, typer.Option(help="Of the differences: how far the weights move, as a share of their length.")
    ] = 3e-3,
    eigenvalues: Annotated[int, typer.Option(help="How many of the largest eigenvalues.")] = 3,
    trace_vectors: Annotated[int, typer.Option(help="Random vectors for the trace.")] = 10,
    samples: SamplesOption = 512,
    split: SplitOption = "train",
    batch_size: BatchOption = 64,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    picture: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where the picture that compares several runs goes.",
            show_default="landscapes.png in the first one's analysis folder",
        ),
    ] = None,
) -> int:
    """How flat a minimum is: the loss on a line and a plane through the weights, and the curvature in the middle.

    Writes RUN/analysis/landscape.json and curvature.json, each with a picture; of several runs also one picture that
    compares them. A command that was cut off goes on where it was when it is called again.
    """  # fmt: skip
    with asked(
        *runs, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
        loss=loss, method=method,
    ):  # fmt: skip
        if dims not in (1, 2):
            raise ValueError(f"--dims: expected 1 or 2, got {dims}")
        from trtkern.analysis import Directions
        from trtkern.commands.analyze._opened import FOLDER, opened

        given = {"data_dir": data_dir, "backend": backend, "device": device, "threads": threads}
        found = [opened(run, split=split, samples=samples, batch_size=batch_size, **given) for run in runs]
        first = found[0].trainer.model
        shared = Directions.of(first, seed) if directions is None else Directions.load(directions)
        for run in found:
            shared.check("--directions" if directions else str(run.folder), run.trainer.model)
        if save_directions is not None:
            shared.save(save_directions)
    slices = {"dims": dims, "points": points, "radius": radius, "loss": loss, "processes": processes}
    products = {"eigenvalues": eigenvalues, "method": method, "trace_vectors": trace_vectors, "loss": loss,
                "step": step, "seed": shared.seed}  # fmt: skip
    with _kept():
        made = [
            _one(run, path, shared, slices, products if curvature else None)
            for run, path in zip(found, runs, strict=True)
        ]
    if len(runs) > 1:
        place = Path(picture) if picture else found[0].folder / FOLDER / "landscapes.png"
        _compare(_labels(runs), made, place)
    return 0


@contextmanager
def _kept() -> Iterator[None]:
    """Says after Ctrl-C what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Quit(
            "stopped, as asked; the points are kept: call the same command again to go on", INTERRUPTED
        ) from None


def _one(run: Opened, path: str, shared: Any, slices: dict[str, Any], products: dict[str, Any] | None) -> list[Result]:
    """The results of one run, saved and shown."""
    from dataclasses import replace

    from trtkern import analysis
    from trtkern.commands.analyze._opened import bar, finish, place_of

    results: list[Result] = []
    place = place_of(run, path, "landscape", None)
    points = place.with_suffix(".points.jsonl")
    model = run.trainer.model
    with quits(FAILURE, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
    with bar(f"landscape of {path}") as told, quits(USER, ValueError, TypeError):
        found = analysis.landscape(model, run.samples, directions=shared, file=points, progress=told, **slices)
    results.append(replace(found, about=run.about))
    finish(results[0], place)
    if products is not None:
        with bar(f"curvature of {path}") as told, quits(USER, ValueError, TypeError):
            bent = analysis.curvature(model, run.samples, progress=told, **products)
        results.append(replace(bent, about=run.about))
        finish(results[1], place_of(run, path, "curvature", None))
    points.unlink(missing_ok=True)  # all of it is in the result
    return results


def _labels(runs: list[str]) -> list[str]:
    """Of the runs in a legend: their paths without the folders that all share."""
    parts = [Path(run).parts for run in runs]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    labels = ["/".join(p[shared:]) for p in parts]
    return labels if len(set(labels)) == len(labels) else [f"{i + 1}: {label}" for i, label in enumerate(labels)]


def _compare(labels: list[str], made: list[list[Result]], place: Path) -> None:
    """One picture of all runs."""
    from trtkern.analysis._result import drawn
    from trtkern.output import style
    from trtkern.output.pictures import styled

    pictures: dict[str, Any] = {}
    for of_kind in zip(*made, strict=True):
        pictures.update(type(of_kind[0]).pictures(dict(zip(labels, of_kind, strict=True))))
    with quits(FAILURE, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            drawn(pictures, columns=max(2, len(labels))).savefig(place, dpi=style.DPI)
    console().print(f"{place} compares the runs", soft_wrap=True)
