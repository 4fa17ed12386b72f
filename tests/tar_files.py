"""Small tar shards in the webdataset layout, as another program would write them: by ``tarfile`` alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from image_files import pixels
from PIL import Image

CLASSES = ("ape", "bee", "cat")
SIZE = 8


@cache
def jpeg(seed: int, size: int = SIZE) -> bytes:
    """A JPEG of ``image_files.pixels``; no two seeds give the same."""
    file = io.BytesIO()
    Image.fromarray(pixels(size, size, seed)).save(file, "JPEG", quality=90)
    return file.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of these members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, image: str = "jpg") -> list[tuple[str, bytes]]:
    """Image and class of a number; its class is the number modulo three."""
    return [(f"{number:05}.{image}", jpeg(number)), (f"{number:05}.cls", str(number % len(CLASSES)).encode())]


def shards(folder: Path, series: str = "train-", counts: Iterable[int] = (5, 3, 4), first: int = 0) -> list[Path]:
    """Shards of so many samples each, which are numbered through from ``first``."""
    made = []
    for number, count in enumerate(counts):
        members = [member for index in range(first, first + count) for member in sample(index)]
        made.append(tar(folder / f"{series}{number:06}.tar", members))
        first += count
    return made


def whole(folder: Path) -> Path:
    """Twelve images to train on in three shards, six of the test in two, and the names of the classes."""
    shards(folder)
    shards(folder, "val-", (3, 3), first=100)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder
