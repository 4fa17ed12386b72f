"""What the data sets are known to be, without a look at their files."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trtkern.data.dataset import Dataset, Split


class Known(NamedTuple):
    """A data set as it is published.

    Args:
        classes: how many.
        shape: (C, H, W) of an image or frame; None is 3 x size x size, with the size that is asked for.
        train: images to train on; None where that is not the same for everybody.
        frames: whether a sample is a sequence of T frames.
    """

    classes: int
    shape: tuple[int, int, int] | None
    train: int | None
    frames: bool = False


KNOWN = {
    "digits": Known(10, (1, 8, 8), 1437),
    "fashion-mnist": Known(10, (1, 28, 28), 60_000),
    "cifar10": Known(10, (3, 32, 32), 50_000),
    "cifar100": Known(100, (3, 32, 32), 50_000),
    "imagenet100": Known(100, None, None),
    "imagenet": Known(1000, None, 1_281_167),
    "dvs-cifar10": Known(10, (2, 48, 48), 9_000, frames=True),
    "n-caltech101": Known(101, (2, 48, 48), None, frames=True),
    "n-mnist": Known(10, (2, 34, 34), 60_000, frames=True),
    "dvs-gesture": Known(11, (2, 128, 128), 1_176, frames=True),
    "shd": Known(20, (1, 1, 700), 8_156, frames=True),
}


def blank(name: str, count: int, *, timesteps: int, size: int = 224, classes: int | None = None) -> Dataset:
    """A data set of that name with ``count`` black images in each split: its shape and classes without its files.

    Args:
        name: a key of ``KNOWN``.
        count: images, 1 or more.
        timesteps: T of frames of events.
        size: height and width of images that are files.
        classes: how many, where it is known better; None is as published.
    """
    known = KNOWN[name]
    frames = (timesteps,) if known.frames else ()
    images = torch.zeros((count, *frames, *(known.shape or (3, size, size))), dtype=torch.uint8)
    split = Split(images, torch.zeros(count, dtype=torch.int64))
    names = tuple(map(str, range(known.classes if classes is None else classes)))
    return Dataset(name, split, split, names, mean=0.0, std=1.0)
