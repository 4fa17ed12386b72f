"""Where every image lies in tar shards of the ``webdataset`` layout: its shard, its first byte, its size, its class.

A sample is the members of one name but for what follows the first dot in it, side by side: ``0001.jpg`` (or ``.jpeg``,
``.png``), the image, and ``0001.cls``, its class as a number. Others, such as ``0001.json``, are passed over.

The headers of the shards are read once. What they say is kept in the cache, or stands beside the shards in ``INDEX``.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern.data import cache as disk
from trtkern.data import files, tensor_file
from trtkern.data.folder import DataError
from trtkern.data.tar_shards import Shard

INDEX = "index.safetensors"
"""The file beside the shards that says where their images lie."""
FORMAT = 1
"""Of the index; raised when the same shards come to give another."""
IMAGES = ("jpg", "jpeg", "png")
"""What follows the first dot in the name of an image, in either case."""
CLASS = "cls"
BLOCK = 512
"""Bytes that a member of a tar file is a multiple of; a block of zeros is its end."""
LONGEST = 18
"""Digits of a class, which is a number of 64 bits."""
AT_ONCE = 4
"""Shards read at once: on a network's file system each header takes long."""
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""The name of a member: of its sample, and what it is of it."""
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
AGAIN = "delete the index: it is made anew"

Progress = Callable[[str, int, int], None]


class Place(NamedTuple):
    """Where an image lies in its shard: the name of its member, its first byte and its bytes; and its class."""

    name: str
    offset: int
    size: int
    label: int


class Index(NamedTuple):
    """Where N images lie.

    Args:
        root: the folder of the shards.
        shards: their names below it.
        shard: [N] of each image the place of its shard among them.
        offset, size: [N] its first byte there, and its bytes.
        label: [N] its class.
        names: [N] the names of the members, as bytes.
    """

    root: Path
    shards: tuple[Shard, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    names: np.ndarray


def index(root: Path, shards: Sequence[Shard], cache: str | None = None, progress: Progress | None = None) -> Index:
    """The index of these shards: that beside them, or that of the cache, or else made now.

    Args:
        root: the folder of the shards.
        shards: all that are in it.
        cache: the folder of the cache; None is ``cache.default_folder()``.
        progress: told ("the headers of the shards", shards read, shards in all).

    Raises:
        ValueError: a damaged shard, a sample without image or class, an index that is of other shards; the message
            names the shard and the member.
        OSError: a shard cannot be read, or the cache cannot be written.
        ImportError: safetensors is not installed.
    """
    beside = root / INDEX
    if beside.is_file():
        return of_tensors(root, shards, _beside(beside, shards))
    key = {"name": "tar-index", "format": FORMAT, "shards": [list(shard) for shard in shards]}
    folder = disk.default_folder() if cache is None else Path(cache)
    return of_tensors(root, shards, disk.cached(folder, key, lambda: tensors(_read(root, shards, progress))))


def write(root: Path, shards: Sequence[Shard], made: dict[str, Tensor]) -> None:
    """Write the index of these shards that ``tensors`` are beside them."""
    text = json.dumps({"format": FORMAT, "shards": [list(shard[:2]) for shard in shards]})
    tensor_file.write(root / INDEX, made, tensor_file.header(made, "key", text))


def tensors(places: Iterable[Sequence[Place]]) -> dict[str, Tensor]:
    """An index as tensors, of the places of each shard's images."""
    dtypes = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64, "names": "S1"}
    columns = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}
    for number, found in enumerate(places):
        names, offsets, sizes, labels = zip(*found, strict=True)
        columns["names"].append(np.array([os.fsencode(name) for name in names], "S"))
        columns["shard"].append(np.full(len(names), number, np.int32))
        for name, values in (("offset", offsets), ("size", sizes), ("label", labels)):
            columns[name].append(np.array(values, np.int64))
    made = {name: np.concatenate(parts) for name, parts in columns.items()}
    made["names"] = made["names"].view(np.uint8).reshape(len(made["names"]), made["names"].itemsize)
    return {name: torch.from_numpy(values) for name, values in made.items()}


def of_tensors(root: Path, shards: Sequence[Shard], made: dict[str, Tensor]) -> Index:
    """The index of these shards that ``tensors`` are."""
    held = {name: tensor.numpy() for name, tensor in made.items()}
    names = held["names"].view(f"S{held['names'].shape[1]}")[:, 0]
    return Index(root, tuple(shards), held["shard"], held["offset"], held["size"], held["label"], names)


def places(path: Path) -> list[Place]:
    """The images of a shard, of its headers and its classes.

    Raises:
        DataError: no whole tar file, a sample without image or class, one that is there twice; the message names the
            shard and the member.
        OSError: it cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            _check_packing(path, file.read(6))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
            _check_end(path, file, members)
            made = [_place(path, file, name, parts) for name, parts in _samples(path, members)]
    except tarfile.TarError as error:
        raise DataError(f"data: expected a whole tar file, got {path} ({error}); get it again") from None
    except OSError as error:
        raise files.unreadable("a tar shard", path, error) from None
    if not made:
        raise DataError(f"data: expected images (.{', .'.join(IMAGES)}) with a .{CLASS} each, got none in {path}")
    if twice := [name for name, count in Counter(place.name for place in made).items() if count > 1]:
        raise DataError(f"data: expected each member once in {path}, got {twice[0]} twice; make the shard again")
    return made


def _read(root: Path, shards: Sequence[Shard], progress: Progress | None) -> Iterator[list[Place]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        paths = [root / shard.name for shard in shards]
        for done, found in enumerate(pool.map(places, paths), 1):
            yield found
            if progress is not None:
                progress("the headers of the shards", done, len(shards))


def _samples(path: Path, members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The name of each sample that is an image with a class, and its image and class by what follows the first dot."""
    named = ((match, each) for each in members if each.isreg() and (match := _KEY.fullmatch(each.name)))
    for key, group in groupby(named, lambda pair: pair[0][1]):
        parts = {match[2].lower(): member for match, member in group if match[2].lower() in (*IMAGES, CLASS)}
        images = [suffix for suffix in IMAGES if suffix in parts]
        if not parts:
            continue
        if len(images) != 1 or CLASS not in parts:
            raise DataError(
                f"data: expected an image (.{', .'.join(IMAGES)}) and its .{CLASS} of each sample, got "
                f"{', '.join(part.name for part in parts.values())} alone of {key} in {path}; make the shard again"
            )
        yield key, {"image": parts[images[0]], CLASS: parts[CLASS]}


def _place(path: Path, file: BinaryIO, name: str, parts: dict[str, tarfile.TarInfo]) -> Place:
    image, told = parts["image"], parts[CLASS]
    said = os.pread(file.fileno(), min(told.size, 2 * LONGEST), told.offset_data).strip()
    if not said.isdigit() or len(said) > LONGEST or told.size > 2 * LONGEST:
        raise DataError(
            f"data: expected a class as a number of 0 and above in {told.name} of {path}, got {said!r}; make the shard "
            f"again with the number of the class, and its name in classes.txt beside it"
        )
    return Place(image.name, image.offset_data, image.size, int(said))


def _check_packing(path: Path, first: bytes) -> None:
    for magic, name in _PACKED.items():
        if first.startswith(magic):
            raise DataError(
                f"data: expected a tar file that is not compressed, of which any sample can be read where it lies, got "
                f"one packed by {name} in {path}; unpack it"
            )


def _check_end(path: Path, file: BinaryIO, members: Sequence[tarfile.TarInfo]) -> None:
    """Raise if what follows the last member is not the end of a tar file: zeros, a block or more.

    ``tarfile`` takes the end of the file for it, and a header that is none as well.
    """
    if sparse := [member.name for member in members if member.issparse()]:
        raise DataError(f"data: expected whole members in {path}, got {sparse[0]} with holes; make the shard again")
    end = max((each.offset_data + (each.isreg() and -(-each.size // BLOCK) * BLOCK) for each in members), default=0)
    file.seek(end)
    left = file.read()
    if len(left) < BLOCK or left.strip(b"\0"):
        came = "no end" if len(left) < BLOCK else "other bytes"
        last = f"{members[-1].name}, its last member" if members else "its beginning"
        raise DataError(f"data: expected the end of a tar file in {path}, got {came} after {last}; get it again")


def _beside(path: Path, shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The index that stands beside these shards."""
    from safetensors import SafetensorError

    try:
        made, told = tensor_file.read(path)
        written = json.loads(told.get("key", "null"))
    except OSError as error:
        raise files.unreadable("an index of tar shards", path, error) from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise DataError(f"data: expected an index of tar shards, got {path} ({error}); {AGAIN}") from None
    if not tensor_file.intact(made, told, "key") or written["format"] != FORMAT:
        raise DataError(f"data: expected the index that {path} was written as, got another: it is damaged; {AGAIN}")
    said, there = dict(map(tuple, written["shards"])), {shard.name: shard.size for shard in shards}
    for name in sorted({*said, *there}):
        if said.get(name) != there.get(name):
            wanted, came = (f"{each[name]:,} bytes" if name in each else "no shard" for each in (said, there))
            raise DataError(
                f"data: expected {wanted} of {name}, as {path} says, got {came}; copy the shard again, or, if it is "
                f"meant to be another, {AGAIN}"
            )
    if list(said) != list(there):
        raise DataError(f"data: expected {path} to name the shards by split and number, got another order; {AGAIN}")
    return made
