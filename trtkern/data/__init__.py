"""Data sets: whole, in memory, as tensors. A row of ``DATASETS`` is all that a new one takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.data import digits, idx


class Split(NamedTuple):
    """Images [N, C, H, W] of raw pixel values (any real dtype) and labels [N] int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Args:
        name: its name on the command line.
        train, test: disjoint splits of one image shape.
        classes: names of the classes; a label is an index into it.
        mean, std: of the training split's raw pixel values; ``normalise`` uses them.

    Raises:
        ValueError: a rank, count or label out of range; the message names the split.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: float
    std: float

    def __post_init__(self) -> None:
        for name, (images, labels) in (("train", self.train), ("test", self.test)):
            where = f"data: {self.name} {name} split"
            shape = list(images.shape)
            if images.dim() != 4 or images.shape[1:] != self.train.images.shape[1:] or images.numel() == 0:
                raise ValueError(f"{where}: expected images [N, C, H, W] as in the train split, got {shape}")
            if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
                raise ValueError(
                    f"{where}: expected {images.shape[0]} int64 labels, one an image, got {list(labels.shape)} "
                    f"{labels.dtype}"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                wrong = low if low < 0 else high
                index = int(torch.nonzero(labels == wrong)[0])
                raise ValueError(
                    f"{where}: expected labels of 0..{len(self.classes) - 1}, got {wrong} for image {index}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """(raw - mean) / std in float32."""
        return (images.float() - self.mean) / self.std

    def to(self, device: torch.device) -> Dataset:
        """The same on ``device``."""
        train, test = (Split(split.images.to(device), split.labels.to(device)) for split in (self.train, self.test))
        return replace(self, train=train, test=test)


def _digits(directory: str | None, download: bool) -> Dataset:
    if directory is not None or download:
        raise ValueError("data: expected no --data-dir or --download with digits, which come with the package")
    train_images, train_labels, test_images, test_labels = digits.load()
    return Dataset(
        "digits", _split(train_images, train_labels), _split(test_images, test_labels),
        tuple("0123456789"), mean=4.884, std=6.017,
    )  # fmt: skip


def _fashion_mnist(directory: str | None, download: bool) -> Dataset:
    if download:
        if directory is None:
            raise ValueError("data: expected --data-dir DIR with --download, got none; name a folder for the files")
        idx.download(directory)
    folder = idx.find(directory)
    train_images, train_labels, test_images, test_labels = idx.load(folder)
    names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    try:
        return Dataset(
            "fashion-mnist", _split(train_images, train_labels), _split(test_images, test_labels),
            names, mean=72.94, std=90.02,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{error} (files in {folder})") from None


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.unsqueeze(1), labels.long())


DATASETS: dict[str, Callable[[str | None, bool], Dataset]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def load(name: str, directory: str | None = None, download: bool = False) -> Dataset:
    """The data set of that name.

    Args:
        name: a key of ``DATASETS``.
        directory: where its files are; None is where a package of the system installs them.
        download: fetch missing files into ``directory`` first, checked by checksum.

    Raises:
        ValueError: an unknown name (the message lists them), or a file that is not what it should be.
        OSError: a file is missing or cannot be read.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](directory, download)
