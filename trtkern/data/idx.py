"""IDX files, the format of MNIST and Fashion-MNIST: read plain or gzip-packed, with errors that name the file."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from trtkern.data import files

# https://github.com/zalandoresearch/fashion-mnist lists the first; both serve the same gzip-packed files.
DOWNLOAD_FROM = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
# Where the Debian package dataset-fashion-mnist puts the files.
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")


class IdxFile(NamedTuple):
    """One of the four files: its name, the bytes and the SHA-256 of its contents, unpacked: any .gz of them will do."""

    name: str
    size: int
    sha256: str


TRAIN_IMAGES = IdxFile(
    "train-images-idx3-ubyte", 47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
)
TRAIN_LABELS = IdxFile(
    "train-labels-idx1-ubyte", 60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
)
TEST_IMAGES = IdxFile(
    "t10k-images-idx3-ubyte", 7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
)
TEST_LABELS = IdxFile(
    "t10k-labels-idx1-ubyte", 10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
)
MNIST = ((5, 0, 4, 1, 9, 2, 1, 3, 1, 4), (7, 2, 1, 0, 4, 1, 4, 9, 5, 9))
"""The first labels of MNIST's train and test files, which have the names and sizes of Fashion-MNIST's."""
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


def read_idx(path: Path, dims: int) -> Tensor:
    """The unsigned bytes of an IDX file as a uint8 tensor of ``dims`` dimensions; gzip-packed if it ends in .gz.

    Raises:
        ValueError: wrong magic number, fewer or more bytes than the header says, or a damaged gzip stream; the
            message names the file, the size expected and what came.
        OSError: the file cannot be read.
    """
    with files.opened(path, unpack=path.suffix == ".gz") as file:
        return _read(file, path, dims)


def _read(file: BinaryIO, path: Path, dims: int) -> Tensor:
    magic = 0x0800 | dims  # unsigned bytes, `dims` dimensions
    header_size = 4 + 4 * dims
    header = file.read(header_size)
    if len(header) < header_size:
        raise ValueError(f"data: expected an IDX header of {header_size} bytes, got {len(header)} bytes in {path}")
    found, *shape = struct.unpack(f">{1 + dims}I", header)
    if found != magic:
        raise ValueError(
            f"data: expected the magic number 0x{magic:08x} (unsigned bytes in {dims} dimensions), got 0x{found:08x} "
            f"in {path}; is this file another one renamed?"
        )
    size = math.prod(shape)
    limit = min(size, max(1 << 20, 1032 * os.path.getsize(path)))  # no gzip stream unpacks to more: a damaged header
    body = file.read(limit + 1)
    if len(body) != size:
        came = f"{header_size + len(body):,}" if len(body) < size else "more"
        raise ValueError(
            f"data: expected {header_size + size:,} bytes ({' x '.join(map(str, shape))} after a header of "
            f"{header_size}), got {came} in {path}; get the file again"
        )
    return torch.from_numpy(np.frombuffer(bytearray(body), np.uint8)).reshape(shape)


def find(directory: str | None) -> Path:
    """The folder that holds all four files, plain or .gz: ``directory``, or without one Debian's.

    Raises:
        FileNotFoundError: no such folder, or a file is missing; the message names it and its size.
    """
    folder = DEBIAN_DIR if directory is None else Path(directory)
    missing = [file for file in FILES if _path(folder, file) is None]
    if not missing:
        return folder
    names = ", ".join(f"{file.name}[.gz] ({file.size:,} bytes unpacked)" for file in missing)
    if directory is None:
        how = "`apt-get install dataset-fashion-mnist` puts them there, or name another folder with --data-dir"
    else:
        how = "check --data-dir, or add --download to fetch them"
    raise FileNotFoundError(f"data: expected the four Fashion-MNIST files in {folder}, got no {names}; {how}")


def load(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [N, rows, columns], train labels [N], test images and test labels, uint8.

    Files of the published size must be the published ones; smaller ones, a part of the data, are taken as they are.

    Raises:
        ValueError: a damaged file, one of another data set, or the same images in both splits.
        OSError: a file cannot be read.
    """
    paths = [cast(Path, _path(folder, file)) for file in FILES]
    images, labels, test_images, test_labels = (
        read_idx(path, 3 if "images" in file.name else 1) for path, file in zip(paths, FILES, strict=True)
    )
    for values, first, path in zip((labels, test_labels), MNIST, (paths[1], paths[3]), strict=True):
        if tuple(values[: len(first)].tolist()) == first:
            raise ValueError(
                f"data: expected Fashion-MNIST, got MNIST's digits, whose files have the same names, in {path} (its "
                f"first labels are {', '.join(map(str, first))}); name the folder of Fashion-MNIST with --data-dir"
            )
    if torch.equal(images, test_images):
        raise ValueError(f"data: expected other images in {paths[2]} than in {paths[0]}, got the same")
    found = images, labels, test_images, test_labels
    for values, path, file in zip(found, paths, FILES, strict=True):
        _check_published(values, path, file)
    return found


def _check_published(values: Tensor, path: Path, file: IdxFile) -> None:
    """Raise if a file has the published size and another content: other data sets come in files of these names."""
    header = struct.pack(f">{1 + values.dim()}I", 0x0800 | values.dim(), *values.shape)
    if len(header) + values.numel() != file.size:
        return
    digest = hashlib.sha256(header)
    digest.update(values.numpy().data)
    if digest.hexdigest() != file.sha256:
        raise ValueError(
            f"data: expected Fashion-MNIST's {file.name} with SHA-256 {file.sha256}, got {digest.hexdigest()} of as "
            f"many bytes in {path}; is it of another data set, such as KMNIST, or damaged? Delete it and add --download"
        )


def download(directory: str) -> Path:
    """Fetch what ``directory`` lacks of the four files, checked against their SHA-256; returns the folder.

    Raises:
        OSError: no server answered, or the folder cannot be written.
        ValueError: what came is not the file (wrong checksum); nothing is kept of it.
    """
    folder = Path(directory)
    for file in FILES:
        if _path(folder, file) is None:
            urls = [f"{base}{file.name}.gz" for base in DOWNLOAD_FROM]
            files.fetch(folder / f"{file.name}.gz", urls, f"SHA-256 {file.sha256} unpacked", _sha256, limit=64 << 20)
    return folder


def _sha256(packed: Path) -> str:
    try:
        return f"SHA-256 {files.checksum(packed, 'sha256', unpack=True)} unpacked"
    except ValueError:
        return "a damaged gzip file"


def _path(folder: Path, file: IdxFile) -> Path | None:
    plain, packed = folder / file.name, folder / f"{file.name}.gz"
    return plain if plain.is_file() else packed if packed.is_file() else None
