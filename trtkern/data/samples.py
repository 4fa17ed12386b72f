"""Samples of the user's own: of a torch Dataset, or of a DataLoader with all that it does; read when asked for.

A sample is a pair, what the network is given and its target. What is random in reading it is drawn from torch, numpy
and Python's ``random``, all of which are seeded for each batch: a run that is resumed reads what it would have read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from trtkern.data.folder import DataError

Batch = tuple[Tensor, Tensor]
"""What the network is given, [B, ...], and targets [B, ...]."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch, numpy and ``random`` draw what follows from the seed; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well, for good
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class Samples:
    """Samples of a torch Dataset: what stands for a tensor of them in a ``Split``.

    ``samples[index]`` for a slice or a 1-d tensor of integers is those samples, still not read.

    Args:
        dataset: with a length, and an item for each place below it.
        collate: makes a batch of a list of items; None is torch's.
        places: which of them; None is all.

    Raises:
        DataError, TypeError: no such data set, or its first sample is none; the message says what was expected.
    """

    device = torch.device("cpu")

    def __init__(
        self, dataset: Dataset, collate: Callable[[list], Any] | None = None, places: Tensor | None = None
    ) -> None:
        self.dataset, self.collate = dataset, collate
        self.places = torch.arange(length(dataset)) if places is None else places
        if places is None:
            self.first = self.read([0], 0)
            self.shape = torch.Size((len(self.places), *self.first[0].shape[1:]))
            self.dtype = self.first[0].dtype

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: slice | Tensor) -> Samples:
        index = index.cpu() if isinstance(index, Tensor) else index
        part = Samples(self.dataset, self.collate, self.places[index])
        part.first, part.dtype = self.first, self.dtype
        part.shape = torch.Size((len(part.places), *self.shape[1:]))
        return part

    def to(self, device: torch.device) -> Samples:
        """Itself: what is read goes there."""
        return self

    @property
    def kind(self) -> str:
        """What it is, for messages and fingerprints."""
        return type(self.dataset).__qualname__

    def read(self, places: Sequence[int], seed: int) -> Batch:
        """The samples at these places as a batch; one seed gives one batch.

        Raises:
            DataError: a sample that cannot be read, another shape or dtype than the others', no pair; it says which.
        """
        found = self.places[torch.as_tensor(places)].tolist()
        with seeded(seed):
            items = []
            for place in found:
                try:
                    items.append(self.dataset[place])
                except Exception as error:
                    raise DataError(
                        f"data: expected {self.kind} to give sample {place}, got {type(error).__name__}: {error}"
                    ) from error
            batch = collated(items, self.collate, self.kind, found)
        if hasattr(self, "shape") and self.collate is None:
            alike(batch[0], self.shape[1:], self.dtype, f"{self.kind}, samples {few(found)}")
        return batch


class Loaded:
    """Samples of the user's DataLoader, in its order, batches and workers: what stands for a tensor in a ``Split``.

    Args:
        loader: over a data set with a length.

    Raises:
        DataError, TypeError: it has none, its sampler draws the part of one process of several, or its first batch is
            none; the message says what was expected.
    """

    device = torch.device("cpu")

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        length(loader.dataset)
        samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
        if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise DataError(
                "data: expected a DataLoader of all samples, of whose batches each process is given its part, got one "
                "with a DistributedSampler, which has left most of them out already; write shuffle=True in its place"
            )
        self.steps = len(loader)
        if self.steps == 0:
            raise DataError(
                "data: expected a DataLoader of one batch or more, got none; is its batch larger than the data?"
            )
        self.first = self.read([0], 0)
        self.shape = torch.Size((length(loader.dataset), *self.first[0].shape[1:]))
        self.dtype = self.first[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Samples:
        """Some of its samples, apart from its order, as its ``collate_fn`` makes them a batch."""
        return Samples(self.loader.dataset, self._collate)[index]

    def to(self, device: torch.device) -> Loaded:
        """Itself: what is read goes there."""
        return self

    @property
    def kind(self) -> str:
        """What it is, for messages and fingerprints."""
        return f"a DataLoader of {type(self.loader.dataset).__qualname__}"

    @property
    def batch_size(self) -> int:
        """Of a step."""
        size = getattr(self.loader.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else max(1, len(self) // self.steps)

    def _collate(self, items: list) -> Any:
        if self.loader.batch_sampler is not None:
            return self.loader.collate_fn(items)
        return self.loader.collate_fn(items[0])  # an item is a batch

    def read(self, places: Sequence[int], seed: int) -> Batch:
        """As ``Samples.read``, apart from the order of the loader."""
        return Samples(self.loader.dataset, self._collate, torch.as_tensor(places)).read(range(len(places)), seed)

    def generators(self) -> list[torch.Generator]:
        """Those that its order comes from."""
        sampler = self.loader.batch_sampler
        holders = (self.loader, self.loader.sampler, sampler, getattr(sampler, "sampler", None))
        found = (getattr(holder, "generator", None) for holder in holders)
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def batches(self, seed: int, first: int = 0) -> Iterator[Batch]:
        """One epoch; what is not of its own generators is drawn by the seed. Those before ``first`` are read and left
        out: only so its order is that of the epoch.

        Raises:
            DataError: as ``Samples.read``, with the number of the batch.
        """
        with seeded(seed):
            found = iter(self.loader)
        for number in range(self.steps):
            with seeded(seed + 1 + number):
                try:
                    batch = next(found, None)
                except Exception as error:
                    raise DataError(
                        f"data: expected {self.kind} to give batch {number + 1} of {self.steps}, got "
                        f"{type(error).__name__}: {error}"
                    ) from error
            if batch is None:
                raise DataError(f"data: expected {self.steps} batches of {self.kind}, as its length says, got {number}")
            if number >= first:
                yield pair(batch, f"{self.kind}, batch {number + 1}", self.loader.collate_fn)
        with seeded(seed + 1 + self.steps):
            next(found, None)  # to its end, where a sampler may draw once more, as in every loop


def length(dataset: Any) -> int:
    """That of a data set.

    Raises:
        TypeError, DataError: it has none, or it is empty.
    """
    kind = type(dataset).__qualname__
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"data: expected a data set with __len__ and __getitem__, got {kind}, which has no length or no items by "
            f"place; an epoch is as long as the data, so write how long that is"
        )
    try:
        count = len(dataset)
    except Exception as error:
        raise DataError(f"data: expected the length of {kind}, got {type(error).__name__}: {error}") from error
    if count < 1:
        raise DataError(f"data: expected samples in {kind}, got none")
    return count


def collated(items: list, collate: Callable[[list], Any] | None, kind: str, places: Sequence[int]) -> Batch:
    """A batch of these items."""
    try:
        batch = (collate or default_collate)(items)
    except Exception as error:
        shapes = {
            tuple(item[0].shape) for item in items if isinstance(item, (tuple, list)) and hasattr(item[0], "shape")
        }
        if len(shapes) > 1:
            raise DataError(
                f"data: expected samples of one shape of {kind}, got {', '.join(map(str, sorted(shapes)))} among the "
                f"samples {few(places)}; make them alike, or give a collate that does"
            ) from None
        raise DataError(
            f"data: expected the samples {few(places)} of {kind} to become a batch, got {type(error).__name__}: {error}"
        ) from error
    return pair(batch, f"{kind}, samples {few(places)}", collate)


def pair(batch: Any, where: str, collate: Callable[[list], Any] | None) -> Batch:
    """What a collate gave, if it is a batch."""
    told = "a sample" if collate in (None, default_collate) else "what collate gives"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        got += f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise DataError(f"data: expected {told} as a pair (input, target), got {got} ({where})")
    images, targets = batch
    for name, value in (("input", images), ("target", targets)):
        if not isinstance(value, Tensor) or value.is_complex() or not value.dim():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"data: expected {told} with a real {name}, which becomes a tensor [B, ...], got {got} ({where})"
            )
    if len(images) != len(targets) or not len(images):
        raise DataError(
            f"data: expected as many inputs as targets in a batch, got {len(images)} and {len(targets)} ({where})"
        )
    return images, targets


def alike(images: Tensor, shape: Sequence[int], dtype: torch.dtype, where: str) -> None:
    """Raise a DataError if a batch has samples of another shape or dtype than the first sample had."""
    if tuple(images.shape[1:]) != tuple(shape):
        raise DataError(
            f"data: expected samples of one shape, {list(shape)} as the first one has, got {list(images.shape[1:])} "
            f"({where}); make them alike, or give a collate that does"
        )
    if images.dtype != dtype:
        raise DataError(
            f"data: expected samples of one dtype, {dtype} as the first one has, got {images.dtype} ({where})"
        )


def few(places: Sequence[int]) -> str:
    """Some numbers in words."""
    shown = ", ".join(map(str, places[:3]))
    return f"{shown} .. {places[-1]}" if len(places) > 3 else shown
