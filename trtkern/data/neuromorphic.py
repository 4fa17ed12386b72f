"""Data sets of events as frames [N, T, C, H, W]: DVS-CIFAR10, N-Caltech101, N-MNIST, DVS128 Gesture and SHD.

    >>> arrays = load("dvs-cifar10", "folder", timesteps=10)
    >>> arrays.train_images.shape  # [9000, 10, 2, 48, 48] float16; channel 0 is off, 1 is on

The files are the user's, unpacked; the frames are kept on the disk (``trtkern.data.cache``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern.data import cache as disk
from trtkern.data import event_sets, events, files
from trtkern.data.dataset import Dataset, Split
from trtkern.data.event_sets import Source
from trtkern.data.mapped import Mapped
from trtkern.data.recordings import Recording
from trtkern.names import DVS_RESIZE, unknown

__all__ = ["NAMES", "Arrays", "load"]

FORMAT = 2
"""Of the frames; raised when the same files, steps and resize come to give others."""
SHD_STOP = 1_400_000
"""Microseconds that the frames of SHD share; what comes later is dropped."""
WORKERS = 4
"""Files read at once, at most."""

Progress = Callable[[str, int, int], None]


class Arrays(NamedTuple):
    """Frames [N, T, C, H, W] and labels [N] int64 of both splits; (raw - mean) / std is what the paper feeds.

    The frames are float16 where they are resized, uint8 k for k / 255 with ``resize="paper"``, and otherwise counts in
    the narrowest of uint8, int16 and float32 that holds them exactly.
    """

    train_images: Tensor
    """Frames [N, T, C, H, W] to train on."""
    train_labels: Tensor
    """[N] int64."""
    test_images: Tensor
    """Frames [N, T, C, H, W] to test with."""
    test_labels: Tensor
    """[N] int64."""
    classes: tuple[str, ...]
    """The name of each label."""
    mean: float
    """What the paper subtracts from the raw frames."""
    std: float
    """What it divides them by then."""
    files: str
    """SHA-256 of the names and sizes of the files, and of what was made of them (``trtkern.data.identity``)."""

    def dataset(self, name: str) -> Dataset:
        """The same as a data set of that name, whose frames stay on the disk."""
        train = Split(Mapped(self.train_images), self.train_labels)
        test = Split(Mapped(self.test_images), self.test_labels)
        return Dataset(name, train, test, self.classes, mean=self.mean, std=self.std, files=self.files)


class Kind(NamedTuple):
    """How a data set is found and framed.

    Args:
        find: its files in a folder.
        size: (P, H, W) of the sensor.
        frames: events, T and ``resize`` to frames [T, P, h, w].
        resizes: the values of ``resize`` that it takes.
    """

    find: Callable[[Path], Source]
    size: events.Size
    frames: Callable[[events.Events, int, events.Size, str], Tensor]
    resizes: tuple[str, ...] = ("bilinear",)


def load(
    name: str,
    directory: str,
    *,
    timesteps: int,
    resize: str = "bilinear",
    cache: str | None = None,
    progress: Progress | None = None,
) -> Arrays:
    """A data set of events as frames, from the cache if they were made before.

    Args:
        name: one of ``NAMES``.
        directory: where its unpacked files are; the error for another folder says what is expected in it.
        timesteps: T, the number of frames.
        resize: "bilinear"; DVS-CIFAR10 also takes "paper", the reference implementation's frames, faults included.
        cache: the folder of the cache; None is ``cache.default_folder()``.
        progress: told ("dvs-cifar10 train", samples done, samples in all) as they are read.

    Raises:
        ValueError: an unknown name or resize, T below 1, or a file that is not what it should be, which is named.
        OSError: files are missing or cannot be read, or the cache cannot be written.
        ImportError: tonic or what it reads a format with is not installed.
    """
    if name not in KINDS:
        raise unknown("data", name, NAMES)
    kind = KINDS[name]
    if resize not in kind.resizes:
        raise ValueError(f"data: {name}: expected resize as one of {', '.join(kind.resizes)}, got {resize!r}")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"data: {name}: expected timesteps as a whole number of 1 or more, got {timesteps!r}")
    return framed(name, kind, kind.find(Path(directory)), timesteps, resize, cache, progress)


def framed(
    name: str, kind: Kind, source: Source, timesteps: int, resize: str, cache: str | None, progress: Progress | None
) -> Arrays:
    """The frames of these files, from the cache if they were made before.

    Args:
        name: of the data set.
        kind: how they are framed.
        source: the files.
        timesteps, resize, cache, progress: as of ``load``.
    """
    key = {
        "name": name, "format": FORMAT, "timesteps": timesteps, "resize": resize, "classes": source.classes,
        "files": disk.fingerprint(source.root, source.files), "layout": source.layout, "tonic": _tonic(),
    }  # fmt: skip

    folder = disk.default_folder() if cache is None else Path(cache)

    def make() -> dict[str, Tensor]:
        return _make(name, kind, source, timesteps, resize, partial(disk.empty, folder), progress)

    same = {**key, "files": disk.fingerprint(source.root, source.files, times=False), "tonic": None}
    made = disk.cached(folder, key, make)
    return Arrays(
        made["train_images"], made["train_labels"], made["test_images"], made["test_labels"], source.classes,
        mean=0.0, std=255.0 if resize == "paper" else 1.0, files=disk.sha256_of(same),
    )  # fmt: skip


def _tonic() -> str | None:
    """Its version: another one may read the same file otherwise."""
    try:
        return version("tonic")
    except PackageNotFoundError:
        return None


Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Memory for frames of that shape and dtype."""


def _make(
    name: str, kind: Kind, source: Source, timesteps: int, resize: str, empty: Empty, progress: Progress | None
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    both = source.split()
    read = partial(frames_of, kind, source, timesteps=timesteps, resize=resize)
    files.check_different(sorted({recording.path for part in both for recording in part}), "recordings")
    for split, recordings in zip(("train", "test"), both, strict=True):
        labels = [label for recording in recordings for label in recording.labels]
        if not labels:
            raise ValueError(f"data: {name}: expected a {split} split of 1 sample or more, got none in {source.root}")
        images: Tensor | None = None
        for index, frames in enumerate(_in_turn(recordings, read)):
            if images is None:
                images = empty((len(labels), *frames.shape), frames.dtype)
            images = _widened(images, frames.dtype, empty)
            images[index] = frames
            if progress is not None:
                progress(f"{name} {split}", index + 1, len(labels))
        assert images is not None
        made |= {f"{split}_images": images, f"{split}_labels": torch.tensor(labels)}
    pair = made["train_images"], made["test_images"]
    train, test = (_widened(part, other.dtype, empty) for part, other in (pair, pair[::-1]))
    return made | {"train_images": train, "test_images": test}


def frames_of(kind: Kind, source: Source, recording: Recording, timesteps: int, resize: str) -> list[Tensor]:
    """The frames [T, P, h, w] of each sample of a recording.

    Raises:
        ValueError, OSError: the recording is not what it should be; the message names its file.
    """
    try:
        return [kind.frames(sample, timesteps, kind.size, resize) for sample in source.read(recording)]
    except ValueError as error:
        where = "" if str(recording.path) in str(error) else f" ({recording.path})"
        raise ValueError(f"{error}{where}") from None


def _in_turn(recordings: Sequence[Recording], read: Callable[[Recording], list[Tensor]]) -> Iterator[Tensor]:
    """The frames of every sample, in order; a few files are read ahead, at the same time."""
    workers = min(WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(recordings), 4 * workers):
            for made in pool.map(read, recordings[first : first + 4 * workers]):
                yield from made


def _widened(images: Tensor, other: torch.dtype, empty: Empty) -> Tensor:
    """The images, in the wider of their own dtype and the other one."""
    order = (torch.uint8, torch.int16, torch.float16, torch.float32)
    dtype = max(images.dtype, other, key=order.index)
    return images if dtype == images.dtype else empty(images.shape, dtype).copy_(images)


def _dvs_cifar10(sample: events.Events, timesteps: int, size: events.Size, resize: str) -> Tensor:
    if resize == "paper":
        counts = events.by_count(events.of_reference(sample, size[2]), timesteps, size, rest="drop")
        return events.resized_with_alpha(np.minimum(counts, 1), 48)
    return events.resized(events.relative(events.by_count(sample, timesteps, size, rest="drop")), 48)


def _n_caltech101(sample: events.Events, timesteps: int, size: events.Size, resize: str) -> Tensor:
    return events.resized(events.by_count(sample, timesteps, size, rest="last"), 48)


def _counts(sample: events.Events, timesteps: int, size: events.Size, resize: str) -> Tensor:
    return events.narrowest(events.by_count(sample, timesteps, size, rest="last"))


def _shd(sample: events.Events, timesteps: int, size: events.Size, resize: str) -> Tensor:
    return events.narrowest(events.by_time(sample, timesteps, size, 0, SHD_STOP))


KINDS: dict[str, Kind] = {
    "dvs-cifar10": Kind(event_sets.dvs_cifar10, (2, 128, 128), _dvs_cifar10, DVS_RESIZE),
    "n-caltech101": Kind(event_sets.n_caltech101, (2, 180, 240), _n_caltech101),
    "n-mnist": Kind(event_sets.n_mnist, (2, 34, 34), _counts),
    "dvs-gesture": Kind(event_sets.dvs_gesture, (2, 128, 128), _counts),
    "shd": Kind(event_sets.shd, (1, 1, 700), _shd),
}
NAMES = tuple(KINDS)
"""The data sets of events that ``load`` knows."""
