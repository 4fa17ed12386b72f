"""Makes tar shards of a folder of images, in the ``webdataset`` layout: shuffled once, each shard whole or not there.

The library's own writer is not used: a shard that it was writing when it was killed stands there under its final name,
and two calls give different files, since it writes the time into them. What it writes is a tar file, as here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.data import files, folder, tar_index, tar_shards
from trtkern.data.folder import ImageFiles
from trtkern.data.tar_index import BLOCK
from trtkern.output.files import naming
from trtkern.output.files import write as write_whole

SIZE = 256 << 20
"""Bytes of a shard, roughly."""
SERIES = {tar_shards.WHOLE: "data", "train": "train", "val": "val"}
"""{split: what the names of its shards begin with}."""


class Part(NamedTuple):
    """Images of a split, and labels [N] int64."""

    images: ImageFiles
    labels: Tensor


class Source(NamedTuple):
    """What is to be in the shards: images and labels by split, and the lines of classes.txt."""

    splits: dict[str, Part]
    classes: tuple[str, ...]


class Written(NamedTuple):
    """What was written: bytes and images, in so many shards, and how many shards were there already."""

    shards: int
    images: int
    size: int
    before: int


def source(directory: str | Path, class_list: str | Path | None = None) -> Source:
    """The images of a folder with the class folders of train and val (or test), or with class folders alone.

    Args:
        directory: the folder.
        class_list: a text file of the classes to take (``folder.read_classes``), where there are splits.

    Raises:
        ValueError, OSError, ImportError: as ``folder.load``; a class list without splits.
    """
    if os.path.isdir(os.path.join(directory, "train")):
        found = folder.load(directory, class_list)
        splits = {"train": Part(found.train, found.train_labels), "val": Part(found.test, found.test_labels)}
        return Source(splits, found.classes if class_list is not None else _lines(found.classes))
    if class_list is not None:
        raise ValueError(f"data: expected --class-list with the folders train and val, got no train in {directory}")
    images, labels, classes = folder.unsplit(directory)
    return Source({tar_shards.WHOLE: Part(images, labels)}, _lines(classes))


def _lines(folders: Sequence[str]) -> tuple[str, ...]:
    """The names of folders as a class list has them: one word each, without a #."""
    lines = tuple(re.sub(r"[\s#]", "_", name) for name in folders)
    if twice := [name for name, count in Counter(lines).items() if count > 1]:
        raise ValueError(
            f"data: expected class folders that differ in more than spaces, got several that are {twice[0]} in a class "
            f"list; rename them"
        )
    return lines


def write(
    found: Source, target: Path, size: int = SIZE, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Written:
    """Write the shards, their index and classes.txt.

    A folder in which the same call was interrupted is gone on with: its whole shards stay.

    Args:
        found: what is to be in them.
        target: a new or empty folder, or one that such a call began.
        size: bytes at which a shard is full.
        seed: of the order of the images.
        progress: told (images done, images in all).

    Raises:
        ValueError: another folder, or a size of none.
        OSError: an image cannot be read, or the folder cannot be written.
    """
    if size < 1:
        raise ValueError(f"--size: expected 1 byte or more, got {size:,}")
    stored = {split: [images.stored(row) for row in range(len(images))] for split, (images, _) in found.splits.items()}
    plan = {split: _cut(each, size, seed) for split, each in stored.items()}
    _begin(target, {"images": _checksum(found, stored), "size": size, "seed": seed})
    paths = {
        split: [target / f"{SERIES[split]}-{number:06}.tar" for number in range(len(plan[split]))] for split in plan
    }
    whole = [path for each in paths.values() for path in each]
    before = sum(path.exists() for path in whole)
    total = sum(len(part.labels) for part in found.splits.values())

    def places() -> Iterator[list[tar_index.Place]]:
        done = 0
        for split, cut in plan.items():
            first = 0
            for path, rows in zip(paths[split], cut, strict=True):
                if not path.exists():
                    _shard(path, found.splits[split], rows, first)
                yield tar_index.places(path)
                first, done = first + len(rows), done + len(rows)
                if progress is not None:
                    progress(done, total)

    made = tar_index.tensors(places())
    lines = "".join(f"{name}\n" for name in found.classes)
    write_whole(target / folder.CLASS_LIST, lines.encode(errors="backslashreplace"))
    shards = [tar_shards.Shard(path.name, path.stat().st_size, 0) for path in whole]
    tar_index.write(target, shards, made)
    (target / tar_shards.UNFINISHED).unlink()
    return Written(len(shards), total, sum(shard.size for shard in shards), before)


def _cut(stored: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """The images of each shard, in the order of the seed, of the bytes of all."""
    shards: list[list[int]] = []
    left = 0
    for row in torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed)).tolist():
        if left <= 0:
            shards.append([])
            left = size
        shards[-1].append(row)
        left -= 3 * BLOCK + -(-stored[row] // BLOCK) * BLOCK  # two headers and the class
    return shards


def _checksum(found: Source, stored: dict[str, list[int]]) -> str:
    """SHA-256 of names, sizes and labels of the images, and of the classes."""
    digest = hashlib.sha256(json.dumps(found.classes).encode())
    for split, (images, labels) in found.splits.items():
        digest.update(f"\0{split}\0".encode())
        for index, label in enumerate(labels.tolist()):
            digest.update(b"%s\0%d %d\n" % (images.name(index), stored[split][index], label))
    return digest.hexdigest()


def _begin(target: Path, key: dict[str, object]) -> None:
    """The folder, with the file that says what is being made in it."""
    note, text = target / tar_shards.UNFINISHED, json.dumps(key)
    with naming(target, "a folder for the shards that can be written, got"):
        target.mkdir(parents=True, exist_ok=True)
        there = sorted(each.name for each in target.iterdir())
    if note.name not in there:
        if there:
            raise ValueError(f"data: expected a new or empty folder for the shards, got {target} with {there[0]} in it")
        write_whole(note, text.encode())
    elif files.text(note) != text:
        raise ValueError(
            f"data: expected {target} with shards of the same images, --size and --seed, with which it was begun, got "
            f"others; go on as it was begun, or take an empty folder"
        )


def _shard(path: Path, part: Part, rows: Sequence[int], first: int) -> None:
    """Write one shard whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                    for place, row in enumerate(rows, first):
                        key, suffix = _key(place, part.images.path(row))
                        _add(tar, f"{key}.{suffix}", files.content(Path(part.images.path(row))))
                        _add(tar, f"{key}.{tar_index.CLASS}", str(int(part.labels[row])).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _key(place: int, path: str) -> tuple[str, str]:
    """The name of a sample, which is there once and tells where it is from, and what follows its first dot."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    suffix = suffix[1:].lower()
    return f"{place:08}_{re.sub(r'[./]', '_', stem)}", "jpg" if suffix == "jpeg" else suffix


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
