"""Tiny data sets as files in the formats in which they are published."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import event_files
import image_files
import numpy as np

from trtkern.data import cifar, neuromorphic

NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(f"class_{i}" for i in range(100)),
}
VARIANTS = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
COUNT = 4
"""Records in a file of CIFAR."""


def pack_idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def fashion_files(train: int = 12, test: int = 7, classes: int = 10) -> dict[str, bytes]:
    """The four files of a tiny data set of 28x28 images."""
    rng = np.random.default_rng(0)
    content = {}
    for stem, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        content[f"{stem}-images-idx3-ubyte"] = pack_idx(images)
        content[f"{stem}-labels-idx1-ubyte"] = pack_idx(labels)
    return content


def cifar_files(name: str) -> dict[str, bytes]:
    """The files of a tiny data set: different images, and a line after the class names as in the archive."""
    variant, rng = VARIANTS[name], np.random.default_rng(0)
    made = {}
    for number, file in enumerate((*variant.train, variant.test)):
        first = np.arange(COUNT) + number * COUNT
        labels = [*((first + 3) % classes for classes in variant.labels[:-1]), first % variant.labels[-1]]
        pixels = rng.integers(0, 256, (COUNT, cifar.PIXELS))
        made[file] = np.column_stack([*labels, pixels]).astype(np.uint8).tobytes()
    made[variant.meta] = ("\n".join(NAMES[name]) + "\n\n").encode()
    return made


def write(folder: Path, content: dict[str, bytes], packed: bool = False) -> Path:
    """The files into the folder, with gzip where ``packed``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in content.items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def make(name: str, folder: Path) -> Path | None:
    """A tiny data set of that name in ``folder``; None where it comes with the package."""
    if name == "digits":
        return None
    if name == "fashion-mnist":
        return write(folder, fashion_files(), packed=True)
    if name in VARIANTS:
        return write(folder, cifar_files(name))
    if name in neuromorphic.NAMES:
        event_files.make(name, folder)
        return folder
    image_files.write_folder(folder)
    (folder / "classes.txt").write_text("\n".join(image_files.CLASSES[:2]))
    return folder
