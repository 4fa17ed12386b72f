"""What is looked at while a network trains, without a say in its training."""

from __future__ import annotations

import math
from typing import Any

import torch

from trtkern.analysis import Samples, fisher
from trtkern.data import Split
from trtkern.training.loader import Loader
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
            self._samples = drawn(trainer, "train", SAMPLES, BATCH)
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


def drawn(trainer: Trainer, split: str, samples: int | None, batch_size: int) -> Samples:
    """Samples of a split as the network takes them, in the order of the data set."""
    images, labels = trainer.splits[split]
    count = len(labels) if samples is None else min(samples, len(labels))
    if count < len(labels):
        index = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count].sort().values
        images, labels = images[index.to(labels.device)], labels[index.to(labels.device)]
    loader = Loader(Split(images, labels), trainer.device)
    batches = tuple((trainer.data.normalise(found), target) for found, target in loader.whole(batch_size))
    return Samples(batches, batch_dim=1 if batches[0][0].dim() == 5 else 0)
