"""What is looked at while a network trains, without a say in its training."""

from __future__ import annotations

import math
from typing import Any

from trtkern.analysis import Samples, fisher
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer

SAMPLES = 256
"""Training images that are looked at, at most; always the same ones, without random changes."""
BATCH = 64


class FisherObserver(Observer):
    """Adds the Fisher information of every timestep and its centroid to the row of an epoch, as "fisher".

    Args:
        every: so many epochs, and after the last one.
    """

    interval = math.inf

    def __init__(self, every: int = 1) -> None:
        self._every = every
        self._samples: Samples | None = None

    def measured(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """In float32, whatever precision the training has. What cannot be measured is left out of the row."""
        if row["epoch"] % self._every and row["epoch"] != trainer.settings.epochs:
            return
        if self._samples is None:
            self._samples = trainer.samples("train", SAMPLES, BATCH)
        found = fisher(trainer.model, self._samples, confidence=None)
        row["fisher"] = {
            "centroid": _number(found.centroid),
            "information": found.information.tolist(),
            "batch_centroid": _number(found.batch_mean.centroid),
            "batch_information": found.batch_mean.information.tolist(),
            "batch_size": found.batch_mean.size,
            "samples": len(found.by_sample),
            "seconds": found.seconds,
        }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
