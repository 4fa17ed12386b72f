"""Which tar shards there are in a folder, and of which split each is: by their names alone.

A shard is a file whose name ends in its number and ``.tar``. Shards whose names differ in that number alone are a
series, in which none may be missing between two others.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from trtkern.data import files

SPLITS = ("train", "val", "test")
WHOLE = ""
"""The split of shards that are of none."""
UNFINISHED = "unfinished.json"
"""The file that is there while `trtkern data shard` makes shards in the folder."""
_SHARD = re.compile(r"(.*?)(\d+)\.(tar(?:\.(?:gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz)", re.DOTALL)
"""The name of a shard: what it shares with its series, its number, and whether it is compressed."""
_WORD = re.compile(r"(?:.*[^a-z])?(train|validation|val|test)[^a-z0-9]*", re.DOTALL)
"""What a shard of a split shares with its series: "train-", "imagenet1k-validation-"."""


class Shard(NamedTuple):
    """A tar file.

    Args:
        name: its path below the folder.
        size: its bytes.
        changed: when it was changed, in nanoseconds (``st_mtime_ns``).
    """

    name: str
    size: int
    changed: int


def find(root: Path) -> dict[str, tuple[Shard, ...]]:
    """{split: its shards in the order of their numbers}, of ``train-000000.tar`` and ``val-000000.tar`` in the folder,
    of ``train/000000.tar`` below it, or {WHOLE: all of them} where no name says of which split it is.

    Other files are passed over. "validation" is "val".

    Raises:
        FileNotFoundError: no shards, or one that is missing between two others; the message names it.
        ValueError: compressed shards, shards of no split beside those of one, one that is there twice, or shards that
            are still being made.
        OSError: the folder cannot be read.
    """
    if (root / UNFINISHED).exists():
        raise ValueError(
            f"data: expected whole shards in {root}, got some that are still being made; the same `trtkern data shard` "
            f"goes on with them"
        )
    found: dict[str, list[str]] = {}
    for name in _names(root):
        found.setdefault(_split(name), []).append(name)
    if packed := [name for names in found.values() for name in names if not name.endswith(".tar")]:
        raise ValueError(
            f"data: expected shards that are not compressed, of which any sample can be read where it lies, got "
            f"{packed[0]} in {root}; unpack them (gunzip, zstd -d): images gain little by it"
        )
    if not found:
        raise FileNotFoundError(
            f"data: expected tar shards such as train-000000.tar in {root}, got none; `trtkern data shard` makes them "
            f"of a folder of images"
        )
    if WHOLE in found and len(found) > 1:
        raise ValueError(
            f"data: expected every shard in {root} to be of a split, {', '.join(SPLITS)}, as most names say, got "
            f"{found[WHOLE][0]}; name it so, or move it elsewhere"
        )
    shards = {split: _in_order(root, names) for split, names in found.items()}
    files.check_different([root / shard.name for each in shards.values() for shard in each], "shards")
    return {split: shards[split] for split in (*SPLITS, WHOLE) if split in shards}


def holds(root: str | Path) -> bool:
    """Whether the folder has shards to train on, rather than folders of images."""
    train = Path(root) / "train"
    folders = train.is_dir() and any(each.is_dir() and not each.name.startswith(".") for each in train.iterdir())
    names = _names(Path(root)) if Path(root).is_dir() and not folders else []
    return any(_split(name) == "train" for name in names)


def any_in(root: str | Path) -> bool:
    """Whether there are shards in the folder, of whatever split."""
    return bool(_names(Path(root)))


def _names(root: Path) -> list[str]:
    """The shards in the folder and in those of the splits below it, by their paths from there."""
    found = []
    try:
        for place in ("", *SPLITS, "validation"):
            if not (root / place).is_dir() and place:
                continue
            with os.scandir(root / place) as entries:
                names = [each.name for each in entries if each.name[0] != "."]  # "._data-0.tar" is of a Mac's Finder
                found += [os.path.join(place, name) for name in names if _SHARD.fullmatch(name)]
    except OSError as error:
        raise files.unreadable("a folder of tar shards", root, error) from None
    return sorted(found)


def _split(name: str) -> str:
    """Of which split a shard is: its folder says, or else its name."""
    folder, base = os.path.split(name)
    series = folder or _SHARD.fullmatch(base)[1]  # type: ignore[index]
    word = _WORD.fullmatch(series.lower())
    return WHOLE if word is None else {"validation": "val"}.get(word[1], word[1])


def _in_order(root: Path, names: list[str]) -> tuple[Shard, ...]:
    """The shards by series and number."""
    series: dict[str, dict[int, str]] = {}
    for name in names:
        first, number = _SHARD.fullmatch(name).groups()[:2]  # type: ignore[union-attr]
        other = series.setdefault(first, {}).setdefault(int(number), name)
        if other != name:
            raise ValueError(f"data: expected each number once in {root}, got {other} and {name}; take one away")
    found = []
    for first, numbered in sorted(series.items()):
        numbers = sorted(numbered)
        for before, after in pairwise(numbers):
            if after != before + 1:
                width = len(_SHARD.fullmatch(numbered[before])[2])  # type: ignore[index]
                raise FileNotFoundError(
                    f"data: expected the shards {numbered[numbers[0]]} to {numbered[numbers[-1]]} in {root}, got no "
                    f"{first}{before + 1:0{width}}.tar; copy it there, or number the shards in a row"
                )
        found += [_shard(root, numbered[number]) for number in numbers]
    return tuple(found)


def _shard(root: Path, name: str) -> Shard:
    try:
        status = (root / name).stat()
    except OSError as error:
        raise files.unreadable("a tar shard", root / name, error) from None
    return Shard(name, status.st_size, status.st_mtime_ns)
