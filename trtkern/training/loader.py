"""Batches of a split, from memory or from files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trtkern.data import Split
from trtkern.data.augment import Pipeline, ResizedCrop
from trtkern.data.folder import ImageFiles
from trtkern.training import signals

AHEAD = 2
"""Batches that each worker process decodes before they are asked for."""

Batches = Generator[tuple[Tensor, Tensor], None, None]
"""Images and labels, one batch after the other; ``close`` ends what runs for it."""


class Plan(NamedTuple):
    """An epoch: the images of each step [steps, batch] and, for files, the seed of each one's window."""

    order: Tensor
    seeds: Tensor | None


class Loader:
    """Batches of a split, on the device and augmented: from memory by index, from files through worker processes.

    The numbers depend neither on ``workers`` nor on the step at which an epoch is resumed. With files, a
    ``ResizedCrop`` that comes first in ``augment`` is done where they are decoded: it needs the whole image.

    ``waited`` counts the seconds spent in ``batches`` and ``whole``: decoding or waiting for it, copying, augmenting.
    Set it to 0 at will.

    Args:
        split: images and labels; images in memory lie on ``device``.
        device: where batches go.
        augment: the random changes of ``batches``.
        workers: processes that decode files, started by each ``batches`` and ``whole``; 0 decodes in this one.

    Raises:
        ValueError: ``workers`` below 0; a window of another size than the images have in an evaluation.
    """

    def __init__(self, split: Split, device: torch.device, augment: Pipeline | None = None, workers: int = 0) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"loader: expected workers as an integer of at least 0, got {workers!r}")
        self.images, self.labels = split.images, split.labels.to(device)
        self.device, self.workers, self.waited = device, workers, 0.0
        self._crop: ResizedCrop | None = None
        self._augment = Pipeline() if augment is None else augment
        if isinstance(self.images, ImageFiles):
            self._crop, self._augment = _split_off(self._augment, self.images.size)

        one = torch.zeros(1, *self.images.shape[-3:], dtype=self.images.dtype)
        changed = self._augment(one, torch.Generator())
        if changed.shape != one.shape:
            raise ValueError(
                f"augment: expected changes that keep the size of the images, {list(one.shape[1:])}, got "
                f"{list(changed.shape[1:])}; name no size, or that one"
            )

    def draw(self, steps: int, batch: int, generator: torch.Generator) -> Plan:
        """The plan of an epoch of ``steps`` batches; no image comes twice.

        Raises:
            ValueError: more images than there are, or none.
        """
        count = len(self.images)
        if not 0 < steps * batch <= count:
            raise ValueError(f"loader: expected an epoch of 1 to {count:,} images, got {steps} steps of {batch}")
        order = torch.randperm(count, generator=generator)[: steps * batch].view(steps, batch)
        if not isinstance(self.images, ImageFiles):
            return Plan(order, None)
        return Plan(order, torch.randint(2**62, (steps * batch,), generator=generator).view(steps, batch))

    def batches(self, plan: Plan, first: int, changes: torch.Generator) -> Batches:
        """Augmented images [B, C, H, W], or [T, B, C, H, W] where the split has [N, T, C, H, W], and labels [B].

        A batch is augmented when it is asked for: after k of them ``changes.get_state()`` is what the next one needs.

        Args:
            plan: from ``draw``.
            first: the step to begin with, from 0.
            changes: the generator of ``augment``.

        Raises:
            ValueError, OSError: a file cannot be decoded or read; the message names it.
        """
        seeds = None if plan.seeds is None else plan.seeds[first:].flatten()
        raw = self._raw(plan.order[first:].flatten(), seeds, plan.order.shape[1])
        return self._timed((self._augment(images, changes), labels) for images, labels in raw)

    def whole(self, batch: int) -> Batches:
        """All images and labels in order, shaped as in ``batches``, not augmented; the last batch may be smaller.

        Raises:
            ValueError, OSError: as ``batches``.
        """
        return self._timed(self._raw(torch.arange(len(self.images)), None, batch))

    def _raw(self, order: Tensor, seeds: Tensor | None, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of ``order``; of files with their windows when there are ``seeds``."""
        if not len(order):
            return iter(())  # split would make one empty batch
        rows = order.to(self.device).split(batch)
        if isinstance(self.images, ImageFiles):
            images = self._decoded(self.images, order.split(batch), seeds)
        else:
            images = map(partial(_at, self.images), rows)
        return zip(images, (self.labels[index] for index in rows), strict=True)

    def _decoded(self, images: ImageFiles, order: Iterable[Tensor], seeds: Tensor | None) -> Iterator[Tensor]:
        crop = None if seeds is None else self._crop
        seed = repeat(None) if seeds is None else iter(seeds.tolist())
        places = ([(index, next(seed)) for index in row.tolist()] for row in order)
        for got in _start(_Decoder(images, crop), places, self.workers, self.device.type == "cuda"):
            if isinstance(got, Exception):
                raise got
            yield got.to(self.device, non_blocking=True)

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


class _Decoder(Dataset):
    """decoder[[(index, seed), ...]]: images [B, 3, H, W], or the exception, which torch would make a long text of."""

    def __init__(self, images: ImageFiles, crop: ResizedCrop | None) -> None:
        self._images, self._crop = images, crop

    def __getitem__(self, places: Sequence[tuple[int, int | None]]) -> Tensor | Exception:
        try:
            return torch.stack([self._images.read(index, self._crop, seed) for index, seed in places])
        except (OSError, ValueError, ImportError) as error:
            return error


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


def _at(images: Tensor, index: Tensor) -> Tensor:
    """Images [B, C, H, W], or a view [T, B, C, H, W] of sequences."""
    chosen = images[index]
    return chosen.transpose(0, 1) if chosen.dim() == 5 else chosen


def _start(decoder: _Decoder, places: Iterator[Any], workers: int, pin: bool) -> Iterator[Tensor | Exception]:
    """What the decoder makes of the places, in order; the worker processes end when the iterator is dropped."""
    loader = DataLoader(
        decoder,
        batch_size=None,  # a place is a batch
        sampler=places,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,  # others import torch anew in each worker
        worker_init_fn=_take_signals,
        pin_memory=pin,
        generator=torch.Generator(),  # torch draws a number for the workers, else from the global one
    )
    with signals.waiting():  # workers are born with them blocked, and take them up when they are ready
        return iter(loader)


def _take_signals(worker: int) -> None:
    """In a worker: Ctrl-C and SIGTERM, which may come to all processes of a run, are for the main one to answer.

    SIGTERM from the main one itself, which sends it when Python ends with the worker still there, ends the worker.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()  # SIGTERM stays blocked: nothing but this takes it
