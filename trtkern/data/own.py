"""Data of the user's own as a ``Dataset``: tensors, torch Datasets, DataLoaders, each alone or as (train, test)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from trtkern.data.dataset import Dataset, Split
from trtkern.data.digits import stratified
from trtkern.data.folder import DataError
from trtkern.data.samples import Loaded, Samples

TEST = 0.2
"""Share of the samples that become the test split where the user has none."""


@dataclass(frozen=True)
class OwnDataset(Dataset):
    """Samples of any shape, [N, ...], which the network gets as they are, and targets: labels [N] or [N, T] int64,
    soft ones [N, C] or [N, T, C], or numbers [N, ...] in a floating dtype.

    Args:
        time_first: whether batches [B, T, ...] go to the network as [T, B, ...].

    Raises:
        ValueError, TypeError: splits of other shapes or dtypes, targets of none of these kinds; the message names the
            split.
    """

    time_first: bool = False

    def __post_init__(self) -> None:
        kind = self.train.images
        for name, (images, labels) in (("train", self.train), ("test", self.test)):
            where = f"data: {self.name} {name} split"
            if len(images.shape) < 2 or 0 in images.shape:
                raise ValueError(f"{where}: expected samples [N, ...] with no empty axis, got {list(images.shape)}")
            if images.shape[1:] != kind.shape[1:] or images.dtype != kind.dtype:
                raise ValueError(
                    f"{where}: expected samples of {list(kind.shape[1:])} {kind.dtype} as in the train split, got "
                    f"{list(images.shape[1:])} {images.dtype}"
                )
            if len(labels) != len(images):
                raise ValueError(f"{where}: expected a target for each of {len(images):,} samples, got {len(labels):,}")
            self.check(images.first[1] if isinstance(images, (Samples, Loaded)) else labels, where)

    def check(self, targets: Tensor, where: str) -> None:
        """Raise if these are no targets that a loss takes: of another dtype, or labels that are no class."""
        if targets.dtype != torch.int64 and not targets.is_floating_point():
            raise TypeError(
                f"{where}: expected int64 labels, or soft labels or numbers in a floating dtype, got {targets.dtype}; "
                f"make labels .long()"
            )
        if targets.is_floating_point():
            return
        low, high, count = int(targets.min()), int(targets.max()), len(self.classes)
        if low < 0 or 0 < count <= high:
            wrong = low if low < 0 else high
            place = int(torch.nonzero(targets == wrong)[0, 0])
            wanted = f"of 0..{count - 1}, for {count} classes" if count else "of 0 and above"
            raise DataError(f"{where}: expected labels {wanted}, got {wrong} for sample {place}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample."""
        return tuple(self.train.images.shape[1:])

    @property
    def timesteps(self) -> int | None:
        """T of samples that are sequences."""
        return self.train.images.shape[1] if self.time_first else None

    def normalise(self, images: Tensor) -> Tensor:
        """The images as they are: what there is to do with them is the user's."""
        return images

    def named(self, classes: Sequence[str]) -> OwnDataset:
        """The same with these classes; a ValueError names the first label that is none of them."""
        return replace(self, classes=tuple(classes))

    def _strata(self) -> Tensor:
        """The labels, where there is one a sample; otherwise all samples are alike."""
        labels = self.train.labels.cpu()
        one = labels.dim() == 1 and labels.dtype == torch.int64
        return labels if one else torch.zeros(len(labels), dtype=torch.int64)


def made(
    data: Any, name: str, *, classes: int | Sequence[str] | None = None, collate: Callable[[list], Any] | None = None,
    time_first: bool | None = None,
) -> Dataset:  # fmt: skip
    """The user's data.

    Args:
        data: a ``Dataset`` of trtkern, which stays as it is; or one of these, or (train, test) of them: a pair of
            tensors, samples and targets; a torch Dataset with a length; a DataLoader. Of one alone a fifth, stratified
            where there are labels, becomes the test split.
        name: what it is called.
        classes: how many, or their names; None: what the data say, else as many as the network has outputs.
        collate: makes a batch of the items of a torch Dataset; None is torch's.
        time_first: whether samples are sequences; None: those of four axes, [T, C, H, W], are.

    Raises:
        TypeError, ValueError: something else; the message says what was expected.
    """
    if isinstance(data, Dataset):
        return data
    both = isinstance(data, (tuple, list)) and len(data) == 2 and not all(map(_array, data))
    if isinstance(data, (tuple, list)) and len(data) != 2:
        raise TypeError(f"data: expected a pair of tensors or (train, test), got {len(data)} things")
    train, test = (
        ((_split(part, collate), part) for part in data) if both else ((_split(data, collate), data), (None, None))
    )
    names = _classes(classes, train[1])
    frames = len(train[0].images.shape) == 5 if time_first is None else time_first
    if test[0] is not None:
        return OwnDataset(name, train[0], test[0], names, 0.0, 1.0, time_first=frames)
    if isinstance(train[0].images, Loaded):
        raise TypeError("data: expected (train, test) of DataLoaders, got one alone, of which no part can be held out")
    whole = OwnDataset(name, train[0], train[0], names, 0.0, 1.0, time_first=frames)
    if len(train[0].labels) < 2:
        raise ValueError("data: expected (train, test), or samples of which a part can become the test split, got one")
    chosen = stratified(whole._strata(), TEST, 0)
    rest, part = (train[0].take(torch.nonzero(mask).flatten()) for mask in (~chosen, chosen))
    return replace(whole, train=rest, test=part)


def _array(part: Any) -> bool:
    return isinstance(part, (Tensor, np.ndarray))


def _split(part: Any, collate: Callable[[list], Any] | None) -> Split:
    """A part of the user's data."""
    if isinstance(part, TensorDataset) and len(part.tensors) == 2 and collate is None:
        part = part.tensors
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(map(_array, part)):
        images, targets = (torch.as_tensor(each) for each in part)
        if not images.dim() or not targets.dim():
            raise ValueError(f"data: expected tensors [N, ...], got {list(images.shape)} and {list(targets.shape)}")
        return Split(images.detach(), targets.detach())
    if isinstance(part, DataLoader):
        found: Samples | Loaded = Loaded(part)
    elif isinstance(part, (Tensor, np.ndarray, str, bytes, dict)) or part is None or isinstance(part, type):
        raise TypeError(
            f"data: expected a pair of tensors (samples, targets), a torch Dataset, a DataLoader, or (train, test) of "
            f"these, got {part.__name__ + ', a class' if isinstance(part, type) else type(part).__name__}"
        )
    else:
        found = Samples(part, collate)
    return Split(found, torch.zeros(len(found), dtype=torch.int64))


def _classes(classes: int | Sequence[str] | None, part: Any) -> tuple[str, ...]:
    """Their names; () where nobody has said them."""
    if classes is None:
        dataset = part.dataset if isinstance(part, DataLoader) else part
        told = getattr(dataset, "classes", None)
        names = isinstance(told, (list, tuple)) and all(isinstance(each, str) for each in told)
        return tuple(told) if names and told else ()
    if isinstance(classes, int) and not isinstance(classes, bool) and classes >= 1:
        return tuple(map(str, range(classes)))
    if isinstance(classes, (list, tuple)) and classes and all(isinstance(each, str) for each in classes):
        return tuple(classes)
    raise ValueError(f"data: expected classes as a number of at least 1 or a list of names, got {classes!r}")
