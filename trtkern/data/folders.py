"""A folder of the user's with a folder of files for each class: images, or recordings of events.

``DIR/train/<class>/*`` and ``DIR/test/<class>/*`` (or ``val``); or ``DIR/<class>/*``, of which a fifth of each class
becomes the test split. Classes are the names of their folders, sorted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtkern.data import events, files, folder, neuromorphic, recordings
from trtkern.data.dataset import Dataset, Split
from trtkern.data.digits import stratified
from trtkern.data.event_sets import Source
from trtkern.data.events import Events
from trtkern.data.own import TEST
from trtkern.data.recordings import Recording
from trtkern.names import unknown

OPTIONS = ("size", "sensor", "mean", "std")
"""What may be said of such a folder."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's images, in 0..255."""


def _npz(recording: Recording) -> Iterator[Events]:
    """Arrays t (microseconds), x, y and p of one length."""
    path = recording.path
    try:
        with np.load(path, allow_pickle=False) as held:
            parts = [np.asarray(held[name]) for name in ("t", "x", "y", "p")]
    except Exception as error:
        raise ValueError(
            f"data: expected an .npz file with the arrays t, x, y and p, got {path} ({type(error).__name__}: {error})"
        ) from None
    yield recordings._events(path, *parts)


READERS: dict[str, Callable[[Recording], Iterator[Events]]] = {
    ".aedat": recordings.aedat2, ".aedat4": recordings.aedat4, ".bin": recordings.atis, ".npy": recordings.npy,
    ".npz": _npz,
}  # fmt: skip


def by_class(
    place: Path, *, timesteps: int, cache: str | None = None, progress: Any = None, size: int = 224, **options: Any
) -> Dataset:
    """The files of a folder by class.

    Args:
        place: the folder.
        timesteps: T of frames of events.
        cache, progress: as of ``neuromorphic.load``.
        size: height and width of images.
        options: ``mean`` and ``std`` of images, raw, a number or one a channel; ``sensor``, [height, width] of events,
            without which it is the smallest that holds all of them.

    Raises:
        ValueError, OSError: no such folder, no files that are known, files of both kinds; the message says what was
            expected.
        ImportError: what reads the files is not installed.
    """
    check_options(options, OPTIONS)
    if not place.is_dir():
        raise FileNotFoundError(
            f"data: expected folder:DIR with a folder of files for each class, got no folder {place}"
        )
    parts = [place / name for name in ("train", "val", "test") if (place / name).is_dir()]
    split = place / "train" in parts and len(parts) > 1
    kinds = Counter(_suffixes(parts[:2] if split else [place]))
    images, recorded = (sum(kinds[each] for each in known) for known in (folder.SUFFIXES, READERS))
    if images and recorded:
        raise ValueError(f"data: expected images or recordings of events in {place}, got both: {dict(kinds)}")
    if recorded:
        return _events(place, split, kinds, timesteps, options.get("sensor"), cache, progress)
    if not images:
        raise ValueError(
            f"data: expected in {place} a folder for each class, with files {', '.join((*folder.SUFFIXES, *READERS))}, "
            f"got none"
        )
    return _images(place, split, size, options.get("mean", MEAN), options.get("std", STD))


def _suffixes(parts: list[Path]) -> Iterator[str]:
    """Of the files in the class folders."""
    for part in parts:
        for each in sorted(part.iterdir()):
            if each.is_dir() and not each.name.startswith("."):
                yield from (Path(name).suffix.lower() for name in os.listdir(each))


def _images(place: Path, split: bool, size: int, mean: Any, std: Any) -> Dataset:
    if split:
        train, train_labels, test, test_labels, classes = folder.load(place, None, size)
        return of_images(place.name, Split(train, train_labels), Split(test, test_labels), classes, mean, std)
    found = Split(*(each := folder.unsplit(place, size))[:2])
    first, second = cut(found.labels)
    return of_images(place.name, found.take(first), found.take(second), each[2], mean, std)


def check_options(options: dict[str, Any], known: Sequence[str]) -> None:
    """Raise a ValueError if one of the options is none of those."""
    if others := [name for name in options if name not in known]:
        raise unknown("--set data_options", others[0], known)


def of_images(
    name: str, train: Split, test: Split, classes: tuple[str, ...], mean: Any = MEAN, std: Any = STD
) -> Dataset:
    """A data set of images, with the mean and the deviation that a recipe says, as a number or a list."""
    mean, std = (tuple(value) if isinstance(value, (list, tuple)) else value for value in (mean, std))
    return Dataset(name, train, test, classes, mean, std)


def cut(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the train and of the test split, of samples that have none.

    Raises:
        ValueError: a class of fewer than five.
    """
    mask = stratified(labels, TEST, 0)
    for label in labels.unique().tolist():
        if mask[labels == label].all() or not mask[labels == label].any():
            raise ValueError(
                f"data: expected five files or more of each class, of which a fifth is for the test, got "
                f"{int((labels == label).sum())} of class {label}; or give it a train and a test split"
            )
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def _events(
    place: Path, split: bool, kinds: Counter, timesteps: int, sensor: Any, cache: str | None, progress: Any
) -> Dataset:  # fmt: skip
    suffixes = [each for each in READERS if kinds[each]]
    if len(suffixes) > 1:
        raise ValueError(f"data: expected recordings of one kind in {place}, got {', '.join(suffixes)}")
    held = next((each for each in ("test", "val") if (place / each).is_dir()), "test")
    roots = [place / "train", place / held] if split else [place]
    found = [_by_class(root, suffixes[0]) for root in roots]
    classes = sorted({name for part in found for name in part})
    if lacking := [name for part in found for name in classes if not part.get(name)]:
        raise ValueError(f"data: expected files *{suffixes[0]} of each class in {place}, got none of {lacking[0]}")
    listed = [
        [Recording(path, (label,)) for label, name in enumerate(classes) for path in part[name]] for part in found
    ]
    if not split:
        labels = torch.tensor([recording.labels[0] for recording in listed[0]])
        listed = [[listed[0][index] for index in part.tolist()] for part in cut(labels)]
    read = READERS[suffixes[0]]
    paths = tuple(recording.path for part in listed for recording in part)
    size = _sensor(sensor, paths, read)
    source = Source(place, paths, tuple(classes), suffixes[0], lambda: (listed[0], listed[1]), read)
    kind = neuromorphic.Kind(lambda _: source, size, _counts)
    got = neuromorphic.framed(f"folder-{place.name}", kind, source, timesteps, f"sensor {size}", cache, progress)
    return got.dataset(place.name)


def _counts(sample: Events, timesteps: int, size: events.Size, resize: str) -> Tensor:
    return events.narrowest(events.by_count(sample, timesteps, size, rest="last"))


def _by_class(root: Path, suffix: str) -> dict[str, list[Path]]:
    """{class: its files by name}."""
    try:
        places = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        return {each.name: sorted(path for path in each.iterdir() if path.suffix.lower() == suffix) for each in places}
    except OSError as error:
        raise files.unreadable("a folder", root, error) from None


def _sensor(told: Any, paths: tuple[Path, ...], read: Callable[[Recording], Iterator[Events]]) -> events.Size:
    """(2, height, width): as the user says, or the smallest that holds every event."""
    if told is None:
        corners = [(int(e.y.max()), int(e.x.max())) for path in paths for e in read(Recording(path, (0,)))]
        return 2, 1 + max(y for y, _ in corners), 1 + max(x for _, x in corners)
    if not (isinstance(told, list) and len(told) == 2 and all(type(side) is int and side > 0 for side in told)):
        raise ValueError(f"--set data_options.sensor: expected [height, width], got {told!r}")
    return 2, told[0], told[1]
