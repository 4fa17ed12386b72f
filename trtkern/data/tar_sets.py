"""Data sets of images in tar shards: their splits, labels and classes, as those of ``folder`` and ``folders``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtkern.data import tar_shards
from trtkern.data.dataset import Dataset, Split
from trtkern.data.folder import CLASS_LIST, Contents, read_classes
from trtkern.data.folders import check_options, cut, of_images
from trtkern.data.tar_images import BUFFER, TarImages
from trtkern.data.tar_index import Progress, index

OPTIONS = ("size", "mean", "std", "buffer")
"""What may be said of such a folder."""


def load(
    directory: str | Path, class_list: str | Path | None = None, size: int = 224, *,
    cache: str | None = None, progress: Progress | None = None,
) -> Contents:  # fmt: skip
    """The images of the shards in ``directory`` and their labels, of train and of val (or test); none is decoded.

    A label is the number in the shards; classes.txt in ``directory`` names them, a class a line.

    Args:
        directory: the folder of both (``tar_shards.find``).
        class_list: a text file of the classes to take, by the names that classes.txt gives them; their labels are
            0, 1, ... in the order of their numbers. None takes all.
        size: height and width of an image.
        cache, progress: as of ``tar_index.index``.

    Raises:
        ValueError, OSError, ImportError: a split, a shard or a class is missing or is not what it should be; the
            message says what was expected.
    """
    root = Path(directory)
    found = _read(root, size, BUFFER, cache, progress)
    train, test = _splits(root, found)
    named = _classes(root, found)
    if class_list is not None:
        train, test, named = _chosen(root, class_list, train, test, named)
    _check_classes(root, train, test, named)
    return Contents(train.images, train.labels, test.images, test.labels, tuple(named.values()))  # type: ignore[arg-type]


def by_shard(
    place: Path, *, size: int = 224, cache: str | None = None, progress: Progress | None = None, **options: Any
) -> Dataset:
    """The images of a folder of the user's with tar shards; where these have no splits, a fifth of each class becomes
    the test split.

    Args:
        place: the folder.
        size: height and width of images.
        cache, progress: as of ``load``.
        options: ``mean`` and ``std`` of images, raw, a number or one a channel; ``buffer``, the samples of the shuffle
            buffer of an epoch.

    Raises:
        ValueError, OSError, ImportError: as ``load``.
    """
    check_options(options, OPTIONS)
    if not place.is_dir():
        raise FileNotFoundError(f"data: expected tar:DIR with tar shards, got no folder {place}")
    found = _read(place, size, options.pop("buffer", BUFFER), cache, progress)
    named = _classes(place, found)
    if tar_shards.WHOLE in found:
        (whole,) = found.values()
        first, second = cut(whole.labels)
        train, test = whole.take(first), whole.take(second)
    else:
        train, test = _splits(place, found)
    _check_classes(place, train, test, named)
    return of_images(place.name, train, test, tuple(named.values()), **options)


def _read(
    root: Path, size: int, buffer: int, cache: str | None, progress: Progress | None
) -> dict[str, Split]:  # fmt: skip
    """The images and labels of the shards of each split."""
    shards = tar_shards.find(root)
    made = index(root, [shard for each in shards.values() for shard in each], cache, progress)
    images = TarImages(made, None, size, buffer)
    found, first = {}, 0
    for split, each in shards.items():
        rows = torch.from_numpy(np.flatnonzero((first <= made.shard) & (made.shard < first + len(each))))
        found[split] = Split(images[rows], torch.from_numpy(made.label)[rows])
        first += len(each)
    return found


def _splits(root: Path, found: dict[str, Split]) -> tuple[Split, Split]:
    held = next((split for split in ("val", "test") if split in found), None)
    if "train" not in found or held is None:
        raise FileNotFoundError(
            f"data: expected shards of train and of val in {root}, such as train-000000.tar and val-000000.tar, got "
            f"those of {' and '.join(found) or 'no split'}"
        )
    return found["train"], found[held]


def _classes(root: Path, found: dict[str, Split]) -> dict[str, str]:
    """{the name of each class: what its line says}, in the order of their numbers; raise if a label is none of them."""
    highest = max(int(split.labels.max()) for split in found.values())
    if (root / CLASS_LIST).is_file():
        named = read_classes(root / CLASS_LIST, sort=False)
        if highest >= len(named):
            raise ValueError(
                f"data: expected classes of 0..{len(named) - 1}, as {root / CLASS_LIST} names {len(named):,}, got "
                f"{highest} in a .cls; name every class, a line each"
            )
        return named
    if highest >= (images := sum(len(split.labels) for split in found.values())):
        raise ValueError(
            f"data: expected the classes in the shards of {root} to be numbered in a row from 0, got {highest} in a "
            f".cls, and {images:,} images in all; number them so"
        )
    return {str(number): str(number) for number in range(highest + 1)}


def _chosen(
    root: Path, class_list: str | Path, train: Split, test: Split, named: dict[str, str]
) -> tuple[Split, Split, dict[str, str]]:
    """The samples of the classes that a list names, with labels of 0 and above."""
    wanted = read_classes(class_list)
    if missing := [name for name in wanted if name not in named]:
        raise ValueError(
            f"data: expected the classes of {class_list} to be among those of the shards, got {missing[0]}, which is "
            f"none; {root / CLASS_LIST} names them, a class a line in the order of their numbers"
        )
    places = torch.full((len(named),), -1)
    taken = [number for number, name in enumerate(named) if name in wanted]
    places[taken] = torch.arange(len(taken))
    splits = []
    for split in (train, test):
        labels = places[split.labels]
        rows = torch.nonzero(labels >= 0).flatten()
        splits.append(Split(split.images[rows], labels[rows]))
    return splits[0], splits[1], {name: wanted[name] for name in named if name in wanted}


def _check_classes(root: Path, train: Split, test: Split, named: dict[str, str]) -> None:
    """Raise if a class has no image in a split."""
    for name, split in (("train", train), ("test", test)):
        counts = torch.bincount(split.labels, minlength=len(named))
        if lacking := torch.nonzero(counts == 0).flatten().tolist():
            raise ValueError(
                f"data: expected images of each of the {len(named):,} classes in the shards of {root}, got none of "
                f"{list(named)[lacking[0]]} (class {lacking[0]}) in the {name} split"
            )
