"""Which epoch's weights a run reports, and which ones it keeps besides those that it goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from trtkern.output.files import naming
from trtkern.training import checkpoint

BEST = "best"
"""``best-<step>.safetensors``: the weights of the best epoch so far, without what resuming needs."""

EPOCH = "epoch"
"""``epoch-<step>.safetensors``: the weights of every ``keep_every``-th epoch, for ``trtkern analyze``."""


class Best(NamedTuple):
    """The best epoch so far, and by what."""

    epoch: int
    step: int
    accuracy: float
    loss: float


def better(best: Best | None, row: dict[str, Any], split: str) -> Best | None:
    """The row's epoch if it has the higher accuracy on ``split``, or the same one (or none) and the lower loss."""
    here = Best(row["epoch"], row["step"], row[split].get("accuracy", 0.0), row[split]["loss"])
    return here if best is None or (here.accuracy, -here.loss) > (best.accuracy, -best.loss) else None


def forget(folder: Path, step: int) -> None:
    """Remove the weights of after ``step``: the run goes on from there, perhaps to other numbers."""
    for path in (*checkpoint.found(folder, BEST), *checkpoint.found(folder, EPOCH)):
        if (checkpoint.step_of(path) or 0) > step:
            with naming(path, "to remove"):
                path.unlink(missing_ok=True)


def chosen(folder: Path, best: Best | None) -> checkpoint.Checkpoint:
    """The weights of the best epoch; of the newest checkpoint where nothing was to be chosen.

    Raises:
        DamagedError: they are damaged, or there is no such best epoch.
        FileNotFoundError: there is no checkpoint at all.
    """
    newest = next(iter(checkpoint.found(folder)), folder)
    if best is None:
        return checkpoint.load(newest)
    try:
        return checkpoint.load(folder / f"{BEST}-{best.step:08d}.safetensors")
    except (FileNotFoundError, ValueError) as error:
        raise checkpoint.DamagedError(
            f"checkpoint: expected the chosen weights, those of epoch {best.epoch}; {error}; "
            f"`trtkern evaluate {newest}` measures the newest ones"
        ) from None


def keep(folder: Path, weights: checkpoint.Checkpoint, step: int) -> None:
    """Write the weights of the best epoch; those that a checkpoint which is kept may refer to stay."""
    checkpoint.save(folder, weights, step, BEST, checkpoint.KEPT + 1)


def keep_epoch(folder: Path, weights: checkpoint.Checkpoint, step: int) -> None:
    """Write the weights of an epoch that stays, beside those of the others."""
    checkpoint.save(folder, weights, step, EPOCH, sys.maxsize)
