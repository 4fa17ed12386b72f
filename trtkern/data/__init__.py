"""Data sets: tensors in memory, or image files. A row of ``DATASETS`` is all that a new one takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trtkern.data import cifar, digits, folder, idx, neuromorphic
from trtkern.data.dataset import Dataset, Split
from trtkern.data.identity import difference, fingerprint
from trtkern.names import unknown

__all__ = ["DATASETS", "Dataset", "Source", "Split", "difference", "fingerprint", "load"]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what is made of it; each takes what concerns it."""

    directory: str | None = None
    """Where its files are; None is where a package of the system installs them."""
    download: bool = False
    """Fetch missing files into ``directory`` first, checked by checksum."""
    timesteps: int = 10
    """T of frames of events."""
    resize: str = "bilinear"
    """Of frames of events: "bilinear" or "paper" (``neuromorphic.load``)."""
    cache: str | None = None
    """Where frames of events are kept; None is ``cache.default_folder()``."""
    class_list: str | None = None
    """The classes of ImageNet-100 (``folder.read_classes``); None is classes.txt in ``directory``."""
    size: int = 224
    """Height and width of images that are files."""
    progress: Callable[[str, int, int], None] | None = None
    """Told (what, how many, of how many) while frames are made."""

    def folder(self, name: str, what: str, download: bool = False) -> str:
        """``directory``; a ValueError that says ``what`` belongs there if it is None, or if nothing can be fetched."""
        if self.download and not download:
            raise ValueError(f"data: expected no --download with {name}, which is fetched by hand (docs/data.md)")
        if self.directory is None:
            raise ValueError(f"data: expected --data-dir DIR with {name}, got none; name the folder of {what}")
        return self.directory


def _digits(source: Source) -> Dataset:
    if source.directory is not None or source.download:
        raise ValueError("data: expected no --data-dir or --download with digits, which come with the package")
    train_images, train_labels, test_images, test_labels = digits.load()
    return Dataset(
        "digits", _split(train_images, train_labels), _split(test_images, test_labels),
        tuple("0123456789"), mean=4.884, std=6.017,
    )  # fmt: skip


def _fashion_mnist(source: Source) -> Dataset:
    if source.download:
        if source.directory is None:
            raise ValueError("data: expected --data-dir DIR with --download, got none; name a folder for the files")
        idx.download(source.directory)
    where = idx.find(source.directory)
    train_images, train_labels, test_images, test_labels = idx.load(where)
    names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    try:
        return Dataset(
            "fashion-mnist", _split(train_images, train_labels), _split(test_images, test_labels),
            names, mean=72.94, std=90.02,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{error} (files in {where})") from None


def _cifar(variant: cifar.Variant, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Source], Dataset]:
    """A loader of one of the two CIFAR data sets; mean and std of pixels of 0..1."""
    name = variant.name.replace("-", "").lower()

    def load_cifar(source: Source) -> Dataset:
        directory = source.folder(
            name, f"{variant.archive} or of its files, or with --download the one to put it into", download=True
        )
        if source.download:
            cifar.download(variant, directory)
        images, labels, test_images, test_labels, classes = cifar.load(variant, directory)
        return Dataset(
            name, Split(images, labels), Split(test_images, test_labels), classes, mean=_bytes(mean), std=_bytes(std)
        )

    return load_cifar


def _imagenet(name: str, listed: bool) -> Callable[[Source], Dataset]:
    """A loader of ImageNet, or of some of its classes, which a list names."""

    def load_imagenet(source: Source) -> Dataset:
        directory = source.folder(name, "train and val")
        classes: str | Path | None = source.class_list
        if classes is None and listed:
            classes = Path(directory) / folder.CLASS_LIST
        train, train_labels, test, test_labels, names = folder.load(directory, classes, source.size)
        return Dataset(
            name, Split(train, train_labels), Split(test, test_labels), names,
            mean=_bytes((0.485, 0.456, 0.406)), std=_bytes((0.229, 0.224, 0.225)),
        )  # fmt: skip

    return load_imagenet


def _events(name: str) -> Callable[[Source], Dataset]:
    """A loader of frames of events."""

    def load_events(source: Source) -> Dataset:
        directory = source.folder(name, "the publisher's files")
        got = neuromorphic.load(
            name, directory, timesteps=source.timesteps, resize=source.resize, cache=source.cache,
            progress=source.progress,
        )  # fmt: skip
        splits = Split(got.train_images, got.train_labels), Split(got.test_images, got.test_labels)
        return Dataset(name, *splits, got.classes, mean=got.mean, std=got.std, files=got.files)

    return load_events


def _bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """Of pixels of 0..255 what is given of pixels of 0..1."""
    return tuple(255 * value for value in values)


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.unsqueeze(1), labels.long())


DATASETS: dict[str, Callable[[Source], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    # These deviations are below those of all pixels (0.247, 0.243, 0.262); published results were made with them.
    "cifar10": _cifar(cifar.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": _cifar(cifar.CIFAR100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "imagenet100": _imagenet("imagenet100", listed=True),
    "imagenet": _imagenet("imagenet", listed=False),
    **{name: _events(name) for name in neuromorphic.NAMES},
}


def load(name: str, directory: str | None = None, download: bool = False, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: a key of ``DATASETS``.
        directory, download, options: the fields of ``Source``.

    Raises:
        ValueError: an unknown name (the message lists them), or a file that is not what it should be.
        OSError: a file is missing or cannot be read.
        ImportError: what reads its files is not installed.
    """
    if name not in DATASETS:
        raise unknown("data", name, DATASETS)
    if options.get("class_list") is not None and not name.startswith("imagenet"):
        raise ValueError(f"data: expected --class-list with imagenet100 or imagenet only, got it with {name}")
    if options.get("resize", "bilinear") != "bilinear" and name != "dvs-cifar10":
        raise ValueError(f"data: expected --dvs-resize with dvs-cifar10 only, got it with {name}")
    return DATASETS[name](Source(directory, download, **options))
