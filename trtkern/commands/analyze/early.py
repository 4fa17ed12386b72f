"""``trtkern analyze early``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from trtkern.commands._common import USER, quits
from trtkern.commands._json import as_json
from trtkern.commands.analyze._options import (
    BackendOption,
    BatchOption,
    DataDirOption,
    DeviceOption,
    OutOption,
    RunArgument,
    SplitOption,
    ThreadsOption,
    asked,
)


@as_json("analyze early")
def early(
    run: RunArgument,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="How many images to look at.", show_default="all")
    ] = None,
    split: SplitOption = "test",
    confidence: Annotated[
        str, typer.Option(help="When the network is sure: by its largest `probability`, or by `entropy`.")
    ] = "probability",
    margin: Annotated[
        float, typer.Option(help="How far below the accuracy of all steps still counts as reaching it.")
    ] = 0.005,
    batch_size: BatchOption = 64,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> int:
    """Show what a network knows after each time step, and how early it can stop when it is sure."""
    with asked(
        run, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
        confidence=confidence,
    ):  # fmt: skip
        from trtkern import analysis
        from trtkern.commands.analyze import _opened

        opened = _opened.opened(
            run, split=split, samples=samples, batch_size=batch_size, data_dir=data_dir, backend=backend, device=device,
            threads=threads,
        )  # fmt: skip
    with _opened.bar("early exit") as told, quits(USER, ValueError, TypeError):
        found = analysis.early(
            opened.trainer.model, opened.samples, confidence=confidence, margin=margin, progress=told
        )
    return _opened.finish(replace(found, about=opened.about), _opened.place_of(opened, run, "early", out))
