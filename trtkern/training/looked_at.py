"""Samples of a run as its network takes them, for the analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from trtkern.analysis import Samples
from trtkern.data import Dataset, Split
from trtkern.data.samples import Loaded
from trtkern.names import unknown
from trtkern.training.loader import Loader


def drawn(
    loader: Callable[[Split], Loader], data: Dataset, splits: Mapping[str, Split], split: str, count: int | None,
    batch_size: int,
) -> Samples:  # fmt: skip
    """Samples of a split, in the order of the data set.

    Args:
        loader: of a split.
        data: of the run.
        splits: of the run.
        split: which of them.
        count: so many at most, always the same ones; None is all.
        batch_size: of the samples.

    Raises:
        ValueError: no such split, or targets that are not one label a sample.
    """
    if split not in splits:
        raise unknown("samples: split", split, splits)
    chosen = splits[split]
    total = len(chosen.images)
    count = total if count is None else min(count, total)
    if count < total or isinstance(chosen.images, Loaded):
        places = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
        chosen = chosen.take(places.to(chosen.labels.device))
    made = loader(chosen)
    batches = tuple((data.normalise(found), target) for found, target in made.whole(batch_size))
    target = batches[0][1]
    if target.is_floating_point() and target.dim() == 2 and data.classes:
        batches = tuple((found, soft.argmax(1)) for found, soft in batches)
    elif target.is_floating_point() or target.dim() != 1:
        raise ValueError(
            f"samples: expected one label a sample, which the analyses take, got targets of {target.dtype} "
            f"{list(target.shape)}; give them (input, label) batches of your own"
        )
    return Samples(batches, batch_dim=int(made.time_first))
