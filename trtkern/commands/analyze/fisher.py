"""``trtkern analyze fisher``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtkern.commands._common import FAILURE, quits
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
)  # fmt: skip

if TYPE_CHECKING:
    from trtkern.analysis import Fisher
    from trtkern.analysis._network import Progress
    from trtkern.commands.analyze._opened import Opened


@as_json("analyze fisher")
def fisher(
    run: RunArgument,
    samples: SamplesOption = 512,
    split: SplitOption = "train",
    batch_size: BatchOption = 64,
    epochs: Annotated[
        bool | None,
        typer.Option(
            "--epochs/--no-epochs",
            help="Look at every epoch whose weights were kept (`trtkern train --keep-every N`) as well, to see how the "
            "centroid moved.",
            show_default="--epochs, but for a checkpoint file",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals, above 0 and below 1.")] = 0.95,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> int:
    """Show where in time the information of a network lies: the Fisher information of every time step.

    For each t: how strongly the log-probability of the true label after t steps changes with the weights, for each
    image alone, and as the paper's code estimates it, by batches of --batch-size. The centroid is the mean time step
    of that information.
    """
    with asked(
        run, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
    ):  # fmt: skip
        from trtkern.analysis._fisher import Epoch, confident
        from trtkern.commands.analyze import _opened
        from trtkern.training import checkpoint

        opened = _opened.opened(
            run, split=split, samples=samples, batch_size=batch_size, data_dir=data_dir, backend=backend, device=device,
            threads=threads,
        )  # fmt: skip
        confident(confidence, len(opened.samples))
        wanted = Path(run).is_dir() if epochs is None else epochs
        kept = [checkpoint.load(path) for path in _opened.epochs_of(run)] if wanted else []
    with _opened.bar("Fisher information") as told, quits(FAILURE, ValueError):
        look = partial(_look, opened, confidence, told, 1 + len(kept))
        found, history = look(0), []
        for number, saved in enumerate(kept, 1):
            opened.trainer.restore(saved)
            history.append(Epoch.of(saved.metadata["epoch"], look(number)))
        found = replace(found, history=history, about=opened.about)
    return _opened.finish(found, _opened.place_of(opened, run, "fisher", out))


def _look(opened: Opened, confidence: float, told: Progress, parts: int, part: int) -> Fisher:
    """With the weights that the trainer has now; one of several parts of the work."""
    from trtkern import analysis

    count = len(opened.samples)
    return analysis.fisher(
        opened.trainer.model,
        opened.samples,
        confidence=confidence,
        progress=lambda done, _: told(part * count + done, parts * count),
    )
