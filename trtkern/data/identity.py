"""What tells one data set from another: its classes, and of each split a count and a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trtkern.data.dataset import Dataset, Split
from trtkern.data.folder import ImageFiles
from trtkern.data.mapped import Mapped
from trtkern.data.samples import Loaded, Samples

BLOCK = 64 << 20
"""Bytes of images that are copied from their device and hashed at once."""
AT_ONCE, STATS = 8, 1024
"""Threads that ask for the sizes of files, and how many each asks for in one go."""


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What data a run was trained on, as plain JSON types.

    It is ``{"classes": [...], "train": {"images": N, "sha256": "..."}, "test": the same}``. Each checksum is of the
    split's labels in order, and of its images: their values, dtype and shape where they are in
    memory; where they are files, the files' names below the split's folder and their sizes, without reading them.
    Of samples of the user's own that are read one by one it is of their number, of the first, the middle and the last.
    Frames of events that were resized in floating point, whose last bit may differ between processors, are known by
    ``files`` of the data set. The same on every machine, wherever the files are.

    Args:
        data: the data set.

    Raises:
        OSError: a file is missing; the message names it.
    """
    splits = {name: _split(name, split, data.files) for name, split in (("train", data.train), ("test", data.test))}
    return {"classes": list(data.classes), **splits}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does.

    Args:
        before: a fingerprint, such as that of a run when it began.
        now: another one.
    """
    found = []
    if before["classes"] != now["classes"]:
        found.append(_classes(before["classes"], now["classes"]))
    for name in ("train", "test"):
        old, new = before[name], now[name]
        if old["images"] != new["images"]:
            found.append(f"the {name} split had {old['images']:,} images, now {new['images']:,}")
        elif old["sha256"] != new["sha256"]:
            found.append(f"the {name} split has as many images ({new['images']:,}), but not the same")
    return "; ".join(found)


def _classes(before: list[str], now: list[str]) -> str:
    if len(before) != len(now):
        return f"there were {len(before):,} classes, now {len(now):,}"
    index = next(index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
    return f"class {index} was {before[index]!r}, now {now[index]!r}"


def _split(name: str, split: Split, files: str | None) -> dict[str, Any]:
    digest = hashlib.sha256(name.encode())
    if isinstance(split.images, ImageFiles):
        for block in _named(split.images):
            digest.update(block)
    elif isinstance(split.images, (Samples, Loaded)):
        digest.update(f"{split.images.kind} {len(split.images)}\0".encode())
        for place in sorted({0, len(split.images) // 2, len(split.images) - 1}):
            for part in split.images.read([place], 0):
                digest.update(f"{part.dtype} {list(part.shape)}\0".encode())
                for block in _bytes(part):
                    digest.update(block)
    elif split.images.is_floating_point() and files is not None:
        digest.update(f"{files} {list(split.images.shape)}\0".encode())
    else:
        digest.update(f"{split.images.dtype} {list(split.images.shape)}\0".encode())
        for block in _bytes(split.images):
            digest.update(block)
    digest.update(b"labels\0")
    for block in _bytes(split.labels):
        digest.update(block)
    return {"images": len(split.labels), "sha256": digest.hexdigest()}


def _bytes(values: Tensor | Mapped) -> Iterator[Any]:
    """The bytes of all values, in order."""
    rows = max(1, BLOCK // max(1, values.shape[1:].numel() * values.dtype.itemsize))
    for part in values.split(rows):
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _named(images: ImageFiles) -> Iterator[bytes]:
    """A line for each file, in order: its name and its size."""

    def lines(first: int) -> bytes:
        places = range(first, min(first + STATS, len(images)))
        return b"".join(b"%s\0%d\n" % (images.name(index), images.stored(index)) for index in places)

    with ThreadPoolExecutor(AT_ONCE) as pool:  # on a network's file system each answer takes long
        yield from pool.map(lines, range(0, len(images), STATS))
