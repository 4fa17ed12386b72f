"""Reads every file of a data set once and says what is broken: all of it, where a run would end at the first one."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern import data
from trtkern.data import files, folder, folders, neuromorphic, tar_index, tar_sets, tar_shards
from trtkern.data.folder import ImageFiles
from trtkern.data.recordings import Recording
from trtkern.data.tar_images import TarImages
from trtkern.data.tar_index import INDEX, Index, Place
from trtkern.data.tar_shards import Shard
from trtkern.datasets import DATASETS
from trtkern.names import unknown
from trtkern.output.text import short

NAMES = tuple(name for name in DATASETS if name != "digits")
"""The data sets that have files; the digits come with the package."""
BLOCK = 32
"""Things that are read at once."""
LONGEST = 1000
"""Characters of what is said of one of them; the middle of a longer line is left out."""


class Part(NamedTuple):
    """Things of one kind: what they are called, how many, and what reads one and raises if it is broken."""

    what: str
    length: int
    read: Callable[[int], Any]


class Found(NamedTuple):
    """What there is to read, and what is broken before anything is: folders, lists, headers of shards."""

    parts: tuple[Part, ...]
    broken: tuple[str, ...]


class Blocks:
    """blocks(number): what is broken among the things of that block, as bytes of JSON, for a worker to send.

    Args:
        parts: all that is to be read.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(part for part in parts if part.length)
        self._ends = list(accumulate(-(-part.length // BLOCK) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def size(self) -> int:
        """Bytes of an answer at most: a character is up to 12 bytes of JSON."""
        return BLOCK * (12 * LONGEST + 4) + 2

    def things(self, number: int) -> int:
        """How many things are in that block."""
        return len(self._of(number)[1])

    def __call__(self, number: int) -> Tensor:
        part, places = self._of(number)
        broken = []
        for place in places:
            try:
                part.read(place)
            except (ValueError, OSError) as error:
                broken.append(short(" ".join(str(error).split()), LONGEST))
        return torch.frombuffer(bytearray(json.dumps(broken).encode()), dtype=torch.uint8)

    def _of(self, number: int) -> tuple[Part, range]:
        index = bisect_right(self._ends, number)
        part = self._parts[index]
        first = BLOCK * (number - (self._ends[index - 1] if index else 0))
        return part, range(first, min(first + BLOCK, part.length))


def lines(answer: Tensor) -> list[str]:
    """What a block says is broken."""
    found: list[str] = json.loads(answer.numpy().tobytes())
    return found


def find(directory: str | Path, name: str | None = None, class_list: str | None = None) -> Found:
    """What there is to read in a folder.

    Args:
        directory: the folder.
        name: of the data set, one of ``NAMES``; None: images or recordings of one's own, by class or in tar shards.
        class_list: as of ``data.load``.

    Raises:
        ValueError: an unknown name, or a folder with nothing of these in it.
        OSError: no such folder, or it cannot be read.
        ImportError: what reads the files is not installed.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"data check: expected a folder with the files of a data set, got no folder {root}")
    if name is not None and name not in NAMES:
        raise unknown("--data", name, NAMES)
    if name in neuromorphic.KINDS:
        return _events(root, name)
    if name is not None and DATASETS[name].shape is not None:
        return Found((Part("data set", 1, lambda _: data.load(name, str(root))),), ())
    if tar_shards.holds(root) or (name is None and tar_shards.any_in(root)):
        return _shards(root, name, class_list)
    return _files(root, name, class_list)


def _shards(root: Path, name: str | None, class_list: str | None) -> Found:
    """The images of the shards whose headers are whole, and what is broken of the others."""
    broken: list[str] = []
    shards = _tried(broken, lambda: [shard for each in tar_shards.find(root).values() for shard in each])
    whole: list[Shard] = []

    def read() -> Iterator[list[Place]]:
        for shard in shards or ():
            if places := _tried(broken, partial(tar_index.places, root / shard.name)):
                whole.append(shard)
                yield places

    columns = tar_index.tensors(read())
    made = tar_index.of_tensors(root, whole, columns)
    if not broken:
        _tried(broken, lambda: _agreeing(made))
        _tried(broken, lambda: _loaded(root, name, class_list))
    images = TarImages(made)
    return Found((Part("images", len(images), images.image),), tuple(broken))


def _loaded(root: Path, name: str | None, class_list: str | None) -> data.Dataset:
    """The data set of these shards, as it is trained on."""
    return tar_sets.by_shard(root) if name is None else data.load(name, str(root), class_list=class_list)


def _agreeing(made: Index) -> None:
    """Raise if an index beside the shards says other than their headers."""
    beside = made.root / INDEX
    if not beside.is_file():
        return
    told = tar_index.index(made.root, made.shards)
    if any(not np.array_equal(*columns) for columns in zip(made[2:], told[2:], strict=True)):
        raise ValueError(
            f"data: expected {beside} to say where the images of the shards lie, got other places; {tar_index.AGAIN}"
        )


def _files(root: Path, name: str | None, class_list: str | None) -> Found:
    """The images of class folders as they are trained on; where these are not as they should be, and of recordings,
    every file below the folder."""
    walked = (os.path.join(place, each) for place, _, names in os.walk(root) for each in names if each[0] != ".")
    found = sorted(walked)
    images = [path for path in found if path.lower().endswith(folder.SUFFIXES)]
    recorded = [path for path in found if Path(path).suffix.lower() in folders.READERS and name is None]
    if not images and not recorded:
        raise ValueError(
            f"data check: expected images, recordings of events or tar shards in {root}, got none; --data NAME says "
            f"which data set it is"
        )
    broken: list[str] = []
    held = _tried(broken, lambda: _by_class(root, name, class_list)) if images else []
    if held is None:
        held = [ImageFiles("/", [os.path.abspath(path) for path in images])]
    parts = [Part("images", len(each), each.image) for each in held]
    if recorded:
        parts.append(Part("recordings", len(recorded), lambda place: _recording(recorded[place])))
    return Found(tuple(parts), tuple(broken))


def _by_class(root: Path, name: str | None, class_list: str | None) -> list[ImageFiles]:
    """The images of each split."""
    if name is not None:
        loaded = data.load(name, str(root), class_list=class_list)
        return [loaded.train.images, loaded.test.images]  # type: ignore[list-item]
    if (root / "train").is_dir():
        found = folder.load(root, None)
        return [found.train, found.test]
    return [folder.unsplit(root)[0]]


def _recording(path: str) -> None:
    for _ in folders.READERS[Path(path).suffix.lower()](Recording(Path(path), (0,))):
        pass


def _events(root: Path, name: str) -> Found:
    """The recordings of a data set of events, framed as they are for training, with one frame each."""
    broken: list[str] = []
    kind = neuromorphic.KINDS[name]
    source = _tried(broken, lambda: kind.find(root))
    both = None if source is None else _tried(broken, source.split)
    if both is None:
        return Found((), tuple(broken))
    recordings = [recording for part in both for recording in part]
    paths = sorted({recording.path for recording in recordings})
    _tried(broken, lambda: files.check_different(paths, "recordings"))

    def read(place: int) -> None:
        neuromorphic.frames_of(kind, source, recordings[place], 1, kind.resizes[0])

    return Found((Part("recordings", len(recordings), read),), tuple(broken))


def _tried(broken: list[str], make: Callable[[], Any]) -> Any:
    """What ``make`` returns; None if it raises, and what is wrong."""
    try:
        return make()
    except (ValueError, OSError) as error:
        broken.append(" ".join(str(error).split()))
        return None
