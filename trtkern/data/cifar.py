"""CIFAR-10 and CIFAR-100 in their binary distributions: the archive as published, or the files of it.

A record is a byte for each label, then 3072 bytes of image: red, green and blue planes of 32 rows of 32 pixels
(https://www.cs.toronto.edu/~kriz/cifar.html; Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images).
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern.data import files

DOWNLOAD_FROM = "https://www.cs.toronto.edu/~kriz/"
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORDS = 10_000
"""Records in a file of CIFAR-10 and in the test file of CIFAR-100; its train file has five times as many."""


class Variant(NamedTuple):
    """One of the two data sets: what its archive is and what is in it.

    Args:
        name: CIFAR-10 or CIFAR-100.
        archive, size, md5: the file as published, its bytes and its checksum.
        folder: the folder within the archive.
        train, test: the files of records of the two splits.
        meta: the file of class names, one a line.
        labels: for each label byte of a record the number of classes; the last one is the label that counts.
    """

    name: str
    archive: str
    size: int
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: tuple[int, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.meta)


class Contents(NamedTuple):
    """Images [N, 3, 32, 32] and labels [N] int64 of both splits, uint8 pixels of 0..255, and the class names."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


CIFAR10 = Variant(
    "CIFAR-10", "cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", (10,),
)  # fmt: skip
CIFAR100 = Variant(
    "CIFAR-100", "cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
    ("train.bin",), "test.bin", "fine_label_names.txt", (20, 100),
)  # fmt: skip


def load(variant: Variant, directory: str) -> Contents:
    """A data set from the archive in ``directory``, or else from the unpacked files there or in the archive's folder.

    The archive is checked by size and MD5 and is read where it is: nothing is unpacked on the disk. Unpacked files
    have no published checksum. They may hold any number of whole records, so a part of the data will do.

    Raises:
        FileNotFoundError: neither is there; the message names what is missing.
        ValueError: another archive, a file that is cut off, a label or a number of class names that cannot be.
        OSError: a file cannot be read.
    """
    folder = Path(directory)
    archive = folder / variant.archive
    if archive.is_file():
        _check(archive, variant)
        raw, where = _unpack(archive, variant), f"{archive}/{variant.folder}"
    else:
        found = find(variant, folder)
        raw, where = {name: files.content(found / name) for name in variant.files}, str(found)
    _check_different(raw, where)
    classes = _classes(raw.pop(variant.meta), variant, f"{where}/{variant.meta}")
    test = records(raw.pop(variant.test), variant.labels, f"{where}/{variant.test}")
    train = [records(raw.pop(name), variant.labels, f"{where}/{name}") for name in variant.train]
    images, labels = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*train, strict=True))
    test_images, test_labels = (torch.from_numpy(part.copy()) for part in test)
    return Contents(images, labels, test_images, test_labels, classes)


def records(raw: bytes, labels: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, 32, 32] uint8, a view, and the last labels [N] int64 of a file of records.

    Args:
        raw: the file.
        labels: the number of classes of each label byte.
        where: the file's name, for errors.

    Raises:
        ValueError: the bytes are no whole records, or a label is too large; the message names the file.
    """
    size = len(labels) + PIXELS
    if not raw or len(raw) % size:
        whole = len(raw) // size
        raise ValueError(
            f"data: expected records of {size:,} bytes ({len(labels)} of labels, {PIXELS:,} of pixels), got "
            f"{len(raw):,} bytes ({whole:,} records and {len(raw) - whole * size:,} bytes) in {where}; get it again"
        )
    table = np.frombuffer(raw, np.uint8).reshape(-1, size)
    for column, classes in enumerate(labels):
        wrong = np.flatnonzero(table[:, column] >= classes)
        if wrong.size:
            index = int(wrong[0])
            raise ValueError(
                f"data: expected labels of 0..{classes - 1}, got {table[index, column]} in record {index} (byte "
                f"{index * size + column:,}) of {where}; is this a file of another data set? Get the file again"
            )
    return table[:, len(labels) :].reshape(-1, *SHAPE), table[:, len(labels) - 1].astype(np.int64)


def find(variant: Variant, folder: Path) -> Path:
    """Where the unpacked files are: ``folder`` or the archive's folder in it.

    Raises:
        FileNotFoundError: no file is there, or some are missing; the message names them and their published sizes.
    """
    places = (folder / variant.folder, folder)
    missing = {place: [name for name in variant.files if not (place / name).is_file()] for place in places}
    place = min(places, key=lambda place: len(missing[place]))
    if not missing[place]:
        return place
    names = ", ".join(_described(variant, name) for name in missing[place])
    raise FileNotFoundError(
        f"data: expected {variant.archive} ({variant.size:,} bytes) in {folder}, or its files unpacked there or in "
        f"{variant.folder}, got no {names} in {place}; check --data-dir, or add --download to fetch the archive"
    )


def download(variant: Variant, directory: str) -> None:
    """Fetch the archive into ``directory`` unless it or all of its files are there; checked by size and MD5.

    Raises:
        OSError: the server did not answer, or the folder cannot be written.
        ValueError: what came is not the archive; nothing is kept of it.
    """
    folder = Path(directory)
    archive = folder / variant.archive
    if archive.is_file():
        return
    try:
        find(variant, folder)
    except FileNotFoundError:
        url = DOWNLOAD_FROM + variant.archive
        files.fetch(archive, [url], f"MD5 {variant.md5}", _md5, limit=variant.size + 1)


def _md5(path: Path) -> str:
    return f"MD5 {files.checksum(path, 'md5')}"


def _check(archive: Path, variant: Variant) -> None:
    size = archive.stat().st_size
    if size != variant.size or (came := _md5(archive)) != f"MD5 {variant.md5}":
        got = f"{size:,} bytes" if size != variant.size else came
        raise ValueError(
            f"data: expected the archive of {variant.name} of {variant.size:,} bytes with MD5 {variant.md5}, got {got} "
            f"in {archive}; delete it and add --download to fetch it again"
        )


def _unpack(archive: Path, variant: Variant) -> dict[str, bytes]:
    """The bytes of the files of records and names; the archive is read from its beginning to its end, once."""
    wanted = {f"{variant.folder}/{name}": name for name in variant.files}
    raw: dict[str, bytes] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            name = wanted.get(member.name.removeprefix("./"))
            if name is not None and (file := tar.extractfile(member)) is not None:
                raw[name] = file.read()
    missing = [name for name in variant.files if name not in raw]
    if missing:
        raise ValueError(f"data: expected {', '.join(missing)} in {archive}, got an archive without; get it again")
    return raw


def _classes(raw: bytes, variant: Variant, where: str) -> tuple[str, ...]:
    names = tuple(line.strip() for line in raw.decode("utf-8", "replace").splitlines() if line.strip())
    if len(names) != variant.labels[-1] or len(set(names)) != len(names):
        raise ValueError(
            f"data: expected {variant.labels[-1]} different class names, one a line, got {len(names)} lines, "
            f"{len(set(names))} different, in {where}; get the file again"
        )
    return names


def _check_different(raw: dict[str, bytes], where: str) -> None:
    """Raise if two of the files are the same: images of one split would be in the other."""
    known: dict[bytes, str] = {}
    for name, content in raw.items():
        if (first := known.setdefault(content, name)) != name:
            raise ValueError(f"data: expected different files, got the same in {first} and {name} of {where}")


def _described(variant: Variant, name: str) -> str:
    if name == variant.meta:
        return f"{name} ({variant.labels[-1]} class names)"
    count = RECORDS * (1 if name == variant.test else 5 // len(variant.train))
    return f"{name} ({count * (len(variant.labels) + PIXELS):,} bytes)"
