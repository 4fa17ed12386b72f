"""``trtkern analyze gradients``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from trtkern.commands._json import as_json
from trtkern.commands.analyze._options import (
    BackendOption,
    BatchOption,
    DataDirOption,
    DeviceOption,
    OutOption,
    RunArgument,
    SamplesOption,
    SplitOption,
    ThreadsOption,
    asked,
)


@as_json("analyze gradients")
def gradients(
    run: RunArgument,
    samples: SamplesOption = 512,
    split: SplitOption = "train",
    batch_size: BatchOption = 64,
    max_k: Annotated[
        int | None,
        typer.Option("--max-k", metavar="K", help="The longest product of factors.", show_default="T - 1, at most 64"),
    ] = None,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> int:
    """How gradients reach the early time steps: norms by layer and step under SDT, TET and TRT, what vanishes, and what
    the gradient of each weight is made of.

    The loss of the run's own kind has the run's own settings; the others have their defaults.
    """
    with asked(
        run, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
        max_k=max_k,
    ):  # fmt: skip
        from trtkern.analysis import gradients as measured
        from trtkern.commands.analyze._opened import bar, finish, opened, place_of
        from trtkern.training.build import build_losses

        given = {"data_dir": data_dir, "backend": backend, "device": device, "threads": threads}
        found = opened(run, split=split, samples=samples, batch_size=batch_size, **given)
        place = place_of(found, run, "gradients", out)
    model = found.trainer.model
    losses = build_losses(found.trainer.settings, model)
    with bar("gradients") as told:
        result = measured(model, found.samples, losses, max_k=max_k, progress=told)
    return finish(replace(result, about=found.about), place)
