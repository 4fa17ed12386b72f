"""What a network reaches on a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.profiling.firing.activity import LayerActivity, firing_rates
from trtkern.training.loader import Loader
from trtkern.training.losses import Loss, arranged
from trtkern.training.tally import Tally

LARGEST = 500
"""Images at once, at most; a batch of training is allowed in any case."""
VALUES = 2**23
"""Values of images and frames at once, roughly."""


class Measured(NamedTuple):
    """A split in figures."""

    averages: dict[str, float]
    """Of the loss parts, and the accuracy."""
    confusion: Tensor
    """[classes, classes] int64 on the CPU: rows are the classes, columns the answers."""
    rates: dict[str, LayerActivity]
    last: Tensor
    """The loss of the last batch."""


class Final(NamedTuple):
    """The one report at the end of a run: of the chosen weights, which the model has from then on."""

    epoch: int
    """Whose weights were chosen."""
    splits: dict[str, dict[str, float]]
    """Averages over "test", and over "validation" where there is one, in eval mode."""
    confusion: Tensor
    """[classes, classes] of the test images: rows are the classes, columns the answers."""
    rates: dict[str, LayerActivity]
    """How the layers fire on the test images."""


class Result(NamedTuple):
    """How a run ended: the rows of its epochs, (epoch, step) where the user stopped it, else its report."""

    rows: list[dict[str, Any]]
    """The rows of its epochs, as they stand in ``metrics.jsonl``."""
    stopped: tuple[int, int] | None
    """(epoch, step) where the user stopped it; None where it came to its end."""
    final: Final | None
    """What the chosen epoch reached; None where the run was stopped."""


@torch.no_grad()
def measure(
    logits: Callable[[Tensor], Tensor], model: nn.Module, loss: Loss, loader: Loader, batch: int, tally: Tally,
    watch: int | None,
) -> Measured:  # fmt: skip
    """Run a split through a network.

    Where several processes share the loader's batches, the figures are those of all of them together, but for ``last``,
    which is this one's.

    Args:
        logits: [T, B, C] of raw images, from ``model``, which is in eval mode.
        model: whose firing rates are taken.
        loss: its parts are averaged, with the penalty.
        loader: of the split.
        batch: images in a step of training.
        tally: a new one, with the number of classes.
        watch: batches, from the first on, that the firing rates are taken of; None is all.
    """
    size = min(LARGEST, max(batch, VALUES // math.prod(loader.images.shape[1:])))
    job, last = loader.job, torch.zeros(())
    with ExitStack() as watched, closing(loader.whole(size)) as batches:
        rates = watched.enter_context(firing_rates(model)) if watch != 0 else None
        for number, (images, target) in enumerate(batches):
            if number == watch:
                watched.close()
            if rates is not None:
                rates.paused = not len(target)
            out = logits(images)
            if not len(target):  # a batch too small for this process, which runs it with the others all the same
                continue
            target = arranged(target, out)
            parts = loss.parts(out, target)
            tally.add(parts, out, target)
            last = parts.total
    whole = tally.over(job)
    if rates is not None and not job.alone:
        rates.merge(job.add_, job.gathered, loader.device)
    return Measured(whole.read(), whole.confusion.cpu(), {} if rates is None else rates.layers, last)
