"""Data sets: whole, in memory, as tensors. A row of ``DATASETS`` is all that a new one takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.data import cifar, digits, idx


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
        mean, std: of the training split's raw pixel values; ``normalise`` uses them. One number, or one a channel.

    Raises:
        ValueError: a rank, count, label, mean or std out of range; the message names the split.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

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
        for name, value in (("mean", self.mean), ("std", self.std)):
            values = value if isinstance(value, tuple) else (value,) * self.shape[0]
            above = " above 0" if name == "std" else ""
            if (
                len(values) != self.shape[0]
                or not all(map(math.isfinite, values))
                or (above and not all(part > 0 for part in values))
            ):
                raise ValueError(
                    f"data: {self.name}: expected {name} as a finite number{above}, or a tuple of {self.shape[0]}, one "
                    f"a channel, got {value}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """(raw - mean) / std in float32, of images [..., C, H, W]."""
        mean, std = (part.to(images.device) if isinstance(part, Tensor) else part for part in self._statistics)
        return (images.float() - mean) / std

    @cached_property
    def _statistics(self) -> tuple[float | Tensor, ...]:
        """Mean and std as ``normalise`` takes them: a number, or [C, 1, 1] on the device of the data."""
        device = self.train.images.device
        return tuple(
            torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 1) if isinstance(part, tuple) else part
            for part in (self.mean, self.std)
        )

    def shared(self) -> list[tuple[int, int]]:
        """(index in train, index in test) of the test images that the train split holds too, bit for bit.

        An image that is there several times is given by its last place in the train split.
        """
        rows = (split.images.cpu().flatten(1).contiguous() for split in (self.train, self.test))
        train, test = (row.view(torch.uint8).numpy() for row in rows)
        known = {hashlib.sha256(image.tobytes()).digest(): index for index, image in enumerate(train)}
        places = [known.get(hashlib.sha256(image.tobytes()).digest()) for image in test]
        return [(place, index) for index, place in enumerate(places) if place is not None]

    def fewer(self, count: int, seed: int = 0) -> Dataset:
        """The same with ``count`` training images, stratified: as many of each class as its share, drawn by the seed.

        Where shares are no whole numbers, the classes with the largest remainders have one more.

        Raises:
            ValueError: fewer than one a class, or more than there are.
        """
        labels = self.train.labels.cpu()
        total, classes = labels.numel(), labels.unique()
        if not len(classes) <= count <= total:
            raise ValueError(f"data: {self.name}: expected {len(classes)} to {total:,} training images, got {count:,}")
        sizes = torch.bincount(labels)[classes] * count
        each = sizes // total
        each[(sizes % total).argsort(descending=True, stable=True)[: count - int(each.sum())]] += 1
        generator = torch.Generator().manual_seed(seed)
        places = [torch.nonzero(labels == label).flatten() for label in classes]
        chosen = [p[torch.randperm(p.numel(), generator=generator)[:n]] for p, n in zip(places, each, strict=True)]
        index = torch.cat(chosen).sort().values.to(self.train.labels.device)
        return replace(self, train=Split(self.train.images[index], self.train.labels[index]))

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


def _cifar(
    variant: cifar.Variant, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[str | None, bool], Dataset]:
    """A loader of one of the two CIFAR data sets; mean and std of pixels of 0..1."""
    name = variant.name.replace("-", "").lower()

    def load_cifar(directory: str | None, download: bool) -> Dataset:
        if directory is None:
            raise ValueError(
                f"data: expected --data-dir DIR with {name}, got none; name the folder of {variant.archive} or of its "
                f"files, or with --download the one to put it into"
            )
        if download:
            cifar.download(variant, directory)
        images, labels, test_images, test_labels, classes = cifar.load(variant, directory)
        return Dataset(
            name, Split(images, labels), Split(test_images, test_labels), classes,
            mean=tuple(255 * part for part in mean), std=tuple(255 * part for part in std),
        )  # fmt: skip

    return load_cifar


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.unsqueeze(1), labels.long())


DATASETS: dict[str, Callable[[str | None, bool], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    # These deviations are below those of all pixels (0.247, 0.243, 0.262); published results were made with them.
    "cifar10": _cifar(cifar.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": _cifar(cifar.CIFAR100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
}


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
