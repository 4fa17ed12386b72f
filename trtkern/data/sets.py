"""What makes the data sets: functions of a name and a ``Source``, which rows of ``trtkern.datasets`` name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from trtkern.data import cifar as cifar_files
from trtkern.data import digits as packaged
from trtkern.data import folder, idx, neuromorphic, tar_sets, tar_shards
from trtkern.data.dataset import Dataset, Split


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
    """Where frames of events, and indices of tar shards, are kept; None is ``cache.default_folder()``."""
    class_list: str | None = None
    """The classes of ImageNet-100 (``folder.read_classes``); None is classes.txt in ``directory``."""
    size: int = 224
    """Height and width of images that are files."""
    progress: Callable[[str, int, int], None] | None = None
    """Told (what, how many, of how many) while frames or an index are made."""

    def folder(self, name: str, what: str, download: bool = False) -> str:
        """``directory``; a ValueError that says ``what`` belongs there if it is None, or if nothing can be fetched."""
        if self.download and not download:
            raise ValueError(f"data: expected no --download with {name}, which is fetched by hand (docs/data.md)")
        if self.directory is None:
            raise ValueError(f"data: expected --data-dir DIR with {name}, got none; name the folder of {what}")
        return self.directory


def digits(name: str, source: Source) -> Dataset:
    if source.directory is not None or source.download:
        raise ValueError("data: expected no --data-dir or --download with digits, which come with the package")
    train_images, train_labels, test_images, test_labels = packaged.load()
    return Dataset(
        name, _split(train_images, train_labels), _split(test_images, test_labels),
        tuple("0123456789"), mean=4.884, std=6.017,
    )  # fmt: skip


def fashion_mnist(name: str, source: Source) -> Dataset:
    if source.download:
        if source.directory is None:
            raise ValueError("data: expected --data-dir DIR with --download, got none; name a folder for the files")
        idx.download(source.directory)
    where = idx.find(source.directory)
    train_images, train_labels, test_images, test_labels = idx.load(where)
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    try:
        return Dataset(
            name, _split(train_images, train_labels), _split(test_images, test_labels),
            classes, mean=72.94, std=90.02,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{error} (files in {where})") from None


def cifar(
    variant: cifar_files.Variant, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[str, Source], Dataset]:
    """A maker of one of the two CIFAR data sets; mean and std of pixels of 0..1."""

    def make(name: str, source: Source) -> Dataset:
        directory = source.folder(
            name, f"{variant.archive} or of its files, or with --download the one to put it into", download=True
        )
        if source.download:
            cifar_files.download(variant, directory)
        images, labels, test_images, test_labels, classes = cifar_files.load(variant, directory)
        return Dataset(
            name, Split(images, labels), Split(test_images, test_labels), classes, mean=_bytes(mean), std=_bytes(std)
        )

    return make


def imagenet(name: str, source: Source) -> Dataset:
    """ImageNet, or those of its classes that a list names; as class folders or as tar shards."""
    directory = source.folder(name, "train and val")
    found: folder.Contents
    if tar_shards.holds(directory):
        found = tar_sets.load(
            directory, source.class_list, source.size, cache=source.cache, progress=source.progress
        )  # fmt: skip
    else:
        found = folder.load(directory, source.class_list, source.size)
    return Dataset(
        name, Split(found.train, found.train_labels), Split(found.test, found.test_labels), found.classes,
        mean=_bytes((0.485, 0.456, 0.406)), std=_bytes((0.229, 0.224, 0.225)),
    )  # fmt: skip


def imagenet100(name: str, source: Source) -> Dataset:
    """The classes of a list that is always there."""
    directory = source.folder(name, "train and val")
    listed = source.class_list or str(Path(directory) / folder.CLASS_LIST)
    return imagenet(name, replace(source, class_list=listed))


def events(name: str, source: Source) -> Dataset:
    """Frames of events."""
    directory = source.folder(name, "the publisher's files")
    got = neuromorphic.load(
        name, directory, timesteps=source.timesteps, resize=source.resize, cache=source.cache,
        progress=source.progress,
    )  # fmt: skip
    return got.dataset(name)


def _bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """Of pixels of 0..255 what is given of pixels of 0..1."""
    return tuple(255 * value for value in values)


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.unsqueeze(1), labels.long())


# These deviations are below those of all pixels (0.247, 0.243, 0.262); published results were made with them.
cifar10 = cifar(cifar_files.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
cifar100 = cifar(cifar_files.CIFAR100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
