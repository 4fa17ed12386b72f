"""What makes a batch: samples of a split, from memory, from files, or read from data of the user's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.data import Split
from trtkern.data.augment import Pipeline, ResizedCrop
from trtkern.data.folder import DataError, ImageFiles
from trtkern.data.mapped import Mapped
from trtkern.data.mix import Mix
from trtkern.data.samples import Loaded, Samples
from trtkern.data.transform import Part, Transform
from trtkern.parallel.job import ALONE, Job
from trtkern.training.reading import Reader, read
from trtkern.training.workers import ahead

Batches = Generator[tuple[Tensor, Tensor], None, None]
"""Images and labels, one batch after the other; ``close`` ends what runs for it."""


class Plan(NamedTuple):
    """An epoch: the images of each batch [batches, batch], and for files the seed of each one's window; for samples
    that are read the seed of each batch [batches], and of a DataLoader, whose order is its own, one for the epoch."""

    order: Tensor
    seeds: Tensor | None


class Loader:
    """Batches of a split, on the device and augmented: from memory by index, from files through worker processes.

    The numbers depend neither on ``workers`` nor on the step at which an epoch is resumed. Where several processes
    train together, all draw one plan, and each makes its part of every batch: its rows. With files, a ``ResizedCrop``
    that comes first in ``augment`` is done where they are decoded: it needs the whole image.

    ``waited`` counts the seconds spent in ``batches`` and ``whole``: decoding or waiting for it, copying, augmenting.
    Set it to 0 at will.

    Args:
        split: images and labels; images in memory lie on ``device``.
        device: where batches go.
        augment: the random changes of ``batches``.
        workers: processes that decode files or read samples, started by each ``batches`` and ``whole``; 0: this one.
        mix: of the images of a batch, behind ``augment``.
        classes: how many, for ``mix``.
        time_first: whether batches [B, T, ...] become [T, B, ...]; None: those of frames do.
        job: the processes that share every batch.

    Raises:
        ValueError: ``workers`` below 0; a window of another size than the images have in an evaluation.
    """

    def __init__(
        self, split: Split, device: torch.device, augment: Pipeline | None = None, workers: int = 0,
        *, mix: Mix | None = None, classes: int = 0, time_first: bool | None = None, job: Job = ALONE,
    ) -> None:  # fmt: skip
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"loader: expected workers as an integer of at least 0, got {workers!r}")
        self.images, self.labels = split.images, split.labels.to(device)
        self.device, self.workers, self.waited = device, workers, 0.0
        self._crop: ResizedCrop | None = None
        self._augment = Pipeline() if augment is None else augment
        self._mix, self._classes, self.job = mix, classes, job
        self.time_first = len(self.images.shape) == 5 if time_first is None else time_first
        if isinstance(self.images, ImageFiles):
            self._crop, self._augment = _split_off(self._augment, self.images.size)
        if not all(isinstance(each, Transform) for each in self._augment.transforms) or not self._augment.transforms:
            return
        one = torch.zeros(1, *self.images.shape[-3:], dtype=self.images.dtype)
        changed = self._augment(one, torch.Generator())
        if changed.shape != one.shape:
            raise ValueError(
                f"augment: expected changes that keep the size of the images, {list(one.shape[1:])}, got "
                f"{list(changed.shape[1:])}; name no size, or that one"
            )

    def state(self) -> list[Tensor]:
        """Of the generators of a DataLoader, between two epochs."""
        found = self.images.generators() if isinstance(self.images, Loaded) else []
        return [generator.get_state() for generator in found]

    def set_state(self, states: Sequence[Tensor]) -> None:
        """The inverse of ``state``."""
        if isinstance(self.images, Loaded):
            for generator, state in zip(self.images.generators(), states, strict=True):
                generator.set_state(state)

    def draw(self, steps: int, batch: int, generator: torch.Generator) -> Plan:
        """The plan of an epoch of ``steps`` batches; no image comes twice.

        Raises:
            ValueError: more images than there are, or none.
        """
        count = len(self.images)
        if isinstance(self.images, Loaded):
            return Plan(torch.empty(steps, 0), torch.randint(2**62, (), generator=generator))
        if not 0 < steps * batch <= count:
            raise ValueError(f"loader: expected an epoch of 1 to {count:,} images, got {steps} steps of {batch}")
        if isinstance(self.images, ImageFiles):
            drawn = self.images.order(generator)
        else:
            drawn = torch.randperm(count, generator=generator)
        order = drawn[: steps * batch].view(steps, batch)
        if isinstance(self.images, Samples):
            return Plan(order, torch.randint(2**62, (steps,), generator=_beside(generator)))
        if not isinstance(self.images, ImageFiles):
            return Plan(order, None)
        return Plan(order, torch.randint(2**62, (steps * batch,), generator=generator).view(steps, batch))

    def batches(
        self, plan: Plan, first: int, changes: torch.Generator, stopped: Callable[[], bool] = lambda: False
    ) -> Batches:
        """Augmented images [B, C, H, W], or [T, B, C, H, W] where the split has [N, T, C, H, W], and labels [B]; of
        each batch of the plan the rows of this process.

        A batch is augmented when it is asked for: after k of them ``changes.get_state()`` is what the next one needs.

        Args:
            plan: from ``draw``.
            first: the batch to begin with, from 0.
            changes: the generator of ``augment``.
            stopped: asked while workers are waited for; the batches end early if it says so.

        Raises:
            ValueError, OSError: a file cannot be decoded or read; the message names it.
            WorkerError: a worker was killed or does not answer (an OSError).
        """
        if isinstance(self.images, Loaded):
            loaded = self.images.batches(int(plan.seeds), first)  # type: ignore[arg-type]
            raw: Iterator[tuple[Tensor, Tensor]] = self._read(map(self._own_rows, loaded))
        else:
            mine = self.job.part(plan.order.shape[1])
            seeds = None if plan.seeds is None else plan.seeds[first:]
            if seeds is not None:
                seeds = seeds + self.job.rank if isinstance(self.images, Samples) else seeds[:, mine]
            raw = self._raw(plan.order[first:, mine].unbind(0), seeds, stopped)
        return self._timed(self._changed(images, labels, changes) for images, labels in raw)

    def _own_rows(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of a DataLoader's batch those of this process."""
        images, targets = batch
        if len(images) % self.job.world_size:
            raise DataError(
                f"data: expected batches that divide among {self.job.world_size} processes, got one of {len(images)}; "
                f"give the DataLoader another batch_size, or drop_last=True"
            )
        mine = self.job.part(len(images))
        return images[mine], targets[mine]

    def _changed(self, images: Tensor, labels: Tensor, changes: torch.Generator) -> tuple[Tensor, Tensor]:
        images = self._augment(images, changes, Part(self.job.rank, self.job.world_size))
        if self._mix is None:
            return images, labels
        return self._mix(images, labels, self._classes, changes, int(self.time_first))

    def whole(self, batch: int) -> Batches:
        """All images and labels in order, shaped as in ``batches``, not augmented; the last batch may be smaller.

        Of several processes each has its part of every batch. Where a batch has none for it, it gets the first image
        without a label: all of them have to run the network equally often.

        Raises:
            ValueError, OSError: as ``batches``.
        """
        if isinstance(self.images, Loaded):
            return self._timed(self._kept(self._shared(self._read(self.images.batches(0)))))
        rows = torch.arange(len(self.images)).split(batch)
        parts = [row[self.job.part(len(row))] for row in rows]
        raw = self._raw([part if len(part) else row[:1] for part, row in zip(parts, rows, strict=True)], None)
        return self._timed((images, labels[: len(part)]) for (images, labels), part in zip(raw, parts, strict=True))

    def _shared(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each batch of a DataLoader, as ``whole`` has it."""
        for images, targets in batches:
            mine = self.job.part(len(targets))
            part = targets[mine]
            rows = images.transpose(0, 1) if self.time_first else images
            rows = rows[mine] if len(part) else rows[:1]
            yield rows.transpose(0, 1) if self.time_first else rows, part

    def _kept(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; afterwards the order of the next epoch is what it was."""
        before = self.state()
        try:
            yield from batches
        finally:
            self.set_state(before)

    def _read(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device, and with the axes as the network takes them."""
        for images, targets in batches:
            images = self._there(images)
            yield images.transpose(0, 1) if self.time_first else images, self._there(targets)

    def _raw(
        self, rows: Sequence[Tensor], seeds: Tensor | None, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of these rows, one batch each; of files with their windows when there are ``seeds``."""
        if not rows:
            return iter(())
        if isinstance(self.images, Samples):
            reader = Reader(self.images, rows, torch.zeros(len(rows), dtype=torch.int64) if seeds is None else seeds)
            return self._read(read(reader, self.workers, self.device.type == "cuda", stopped))
        there = torch.cat(list(rows)).to(self.device).split([len(row) for row in rows])
        images: Iterator[Tensor]
        if isinstance(self.images, ImageFiles):
            crop = None if seeds is None else self._crop
            decoder = _Decoder(self.images, crop, rows, seeds)
            images = self._decoded(decoder, stopped)
        else:
            assert isinstance(self.images, (Tensor, Mapped))
            images = map(partial(_at, self.images, self.time_first), there)
        return zip(images, (self.labels[row] for row in there), strict=False)  # the first end early if stopped

    def _decoded(self, decoder: _Decoder, stopped: Callable[[], bool]) -> Iterator[Tensor]:
        """The decoder's batches on the device."""
        steps = range(len(decoder))
        if not self.workers:
            for step in steps:
                yield self._there(decoder(step))
            return
        with closing(ahead(decoder, len(steps), self.workers, decoder.size, stopped)) as made:
            for images in made:  # valid until the next one: copied even where the device is the CPU
                pinned = self.device.type == "cuda"
                yield self._there(torch.empty_like(images, pin_memory=pinned).copy_(images))

    def _there(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)

    def _timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Batches:
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches, None)
            finally:
                self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


class _Decoder:
    """decoder(step): images [B, 3, H, W] of that batch, with their windows when there are ``seeds``."""

    def __init__(
        self, images: ImageFiles, crop: ResizedCrop | None, order: Sequence[Tensor], seeds: Tensor | None
    ) -> None:
        self._images, self._crop, self._order, self._seeds = images, crop, order, seeds

    def __len__(self) -> int:
        return len(self._order)

    @property
    def size(self) -> int:
        """Bytes of a batch; the last one may be smaller."""
        return len(self._order[0]) * self._images.shape[1:].numel()

    def __call__(self, step: int) -> Tensor:
        indices = self._order[step].tolist()
        seeds = [None] * len(indices) if self._seeds is None else self._seeds[step].tolist()
        return torch.stack([
            self._images.read(index, self._crop, seed) for index, seed in zip(indices, seeds, strict=True)
        ])  # fmt: skip


def _split_off(augment: Pipeline, size: int) -> tuple[ResizedCrop | None, Pipeline]:
    """The window that files of that size are decoded with, and what is left to do with a batch."""
    first = augment.transforms[0] if augment.transforms else None
    if not isinstance(first, ResizedCrop):
        return None, augment
    if first.size != size:
        raise ValueError(
            f"loader: expected resized_crop with the size of the images in an evaluation, {size}, got {first.size}"
        )
    return first, Pipeline(augment.transforms[1:])


def _beside(generator: torch.Generator) -> torch.Generator:
    """Another one that follows from where this one is, which stays there: an order is a permutation an epoch."""
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other.manual_seed(int(torch.randint(2**62, (), generator=other)))


def _at(images: Tensor | Mapped, time_first: bool, index: Tensor) -> Tensor:
    """Images [B, C, H, W], or a view [T, B, C, H, W] of sequences."""
    chosen = images.read(index) if isinstance(images, Mapped) else images[index]
    return chosen.transpose(0, 1) if time_first else chosen
