"""A data set without its files, as a dry run needs it."""

from __future__ import annotations

import torch

from trtkern.data.dataset import Dataset, Split
from trtkern.datasets import DATASETS


def blank(name: str, count: int, *, timesteps: int, size: int = 224, classes: int | None = None) -> Dataset:
    """A data set of that name with ``count`` black images in each split: its shape and classes without its files.

    Args:
        name: a key of ``DATASETS``.
        count: images, 1 or more.
        timesteps: T of frames of events.
        size: height and width of images that are files.
        classes: how many, where it is known better; None is as published.
    """
    known = DATASETS[name]
    frames = (timesteps,) if known.frames else ()
    images = torch.zeros((count, *frames, *(known.shape or (3, size, size))), dtype=torch.uint8)
    split = Split(images, torch.zeros(count, dtype=torch.int64))
    names = tuple(map(str, range(known.classes if classes is None else classes)))
    return Dataset(name, split, split, names, mean=0.0, std=1.0)
