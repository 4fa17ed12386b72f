"""A data set: its splits, and what is done with them before training."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.data.folder import ImageFiles
from trtkern.data.mapped import Mapped
from trtkern.data.samples import Loaded, Samples

AT_ONCE = 1024
"""Images whose checksums are made in one go."""


Images = Tensor | ImageFiles | Mapped | Samples | Loaded
"""What the images of a split may be."""


class Split(NamedTuple):
    """Images [N, C, H, W] or sequences of frames [N, T, C, H, W], raw values of any real dtype, and labels [N] int64.

    Images that no memory holds are files (``ImageFiles``), decoded when they are asked for; frames of events stay on
    the disk (``Mapped``); samples of the user's own (``Samples``, ``Loaded``) come with their targets, for which zeros
    stand in ``labels``.
    """

    images: Images
    """[N, C, H, W], or sequences [N, T, C, H, W]."""
    labels: Tensor
    """[N] int64."""

    def take(self, index: slice | Tensor) -> Split:
        """The samples at these places."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Split:
        """The same on ``device``, but for what is read when it is asked for."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Args:
        name: its name on the command line.
        train, test: disjoint splits of one image shape, both of still images or both of T frames.
        classes: names of the classes; a label is an index into it.
        mean, std: of the training split's raw pixel values; ``normalise`` uses them. One number, or one a channel.
        files: what stands for the files that the images were made of where their values are floating point and may
            differ in the last bit from machine to machine (``identity``); None takes the values.

    Raises:
        ValueError: a rank, count, label, mean or std out of range; the message names the split.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    files: str | None = None

    def __post_init__(self) -> None:
        for name, (images, labels) in (("train", self.train), ("test", self.test)):
            where = f"data: {self.name} {name} split"
            shape = list(images.shape)
            if len(shape) not in (4, 5) or images.shape[1:] != self.train.images.shape[1:] or 0 in shape:
                raise ValueError(
                    f"{where}: expected images [N, C, H, W] or [N, T, C, H, W] as in the train split, got {shape}"
                )
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
        """(C, H, W) of an image or frame."""
        channels, height, width = self.train.images.shape[-3:]
        return channels, height, width

    @property
    def timesteps(self) -> int | None:
        """T of sequences of frames; None for still images."""
        return self.train.images.shape[1] if len(self.train.images.shape) == 5 else None

    def normalise(self, images: Tensor) -> Tensor:
        """(raw - mean) / std in float32, of images [..., C, H, W]."""
        mean, std = self._statistics(images.device)
        return (images.float() - mean) / std

    def _statistics(self, device: torch.device) -> tuple[float | Tensor, ...]:
        """Mean and std as ``normalise`` takes them: a number, or [C, 1, 1] on that device, copied there once."""
        if device not in self._copies:
            self._copies[device] = tuple(
                torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 1)
                if isinstance(part, tuple)
                else part
                for part in (self.mean, self.std)
            )
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[float | Tensor, ...]]:
        return {}

    def shared(self) -> list[tuple[int, int]]:
        """(index in train, index in test) of the test images that the train split holds too, bit for bit.

        An image that is there several times is given by its last place in the train split. Of files, the bytes of the
        files are compared.
        """
        known = {digest: index for index, digest in enumerate(_digests(self.train.images))}
        places = [known.get(digest) for digest in _digests(self.test.images)]
        return [(place, index) for index, place in enumerate(places) if place is not None]

    def fewer(self, count: int, seed: int = 0) -> Dataset:
        """The same with ``count`` training images, stratified: as many of each class as its share, drawn by the seed.

        Where shares are no whole numbers, the classes with the largest remainders have one more.

        Raises:
            ValueError: fewer than one a class, or more than there are.
        """
        index = self._stratified(count, seed)
        return replace(self, train=self.train.take(index))

    def hold_out(self, share: float, seed: int = 0) -> tuple[Dataset, Split]:
        """The same without a share of its training images, and those: stratified and drawn as in ``fewer``.

        Raises:
            ValueError: no image of some class would be left on one of the two sides.
        """
        labels = self._strata()
        total, classes = labels.numel(), labels.unique().numel()
        count = round(total * share)
        if not classes <= count <= total - classes:
            raise ValueError(
                f"data: {self.name}: expected a share that leaves an image of each of {classes} classes on both sides, "
                f"got {share:g} of {total:,} training images; take another, or --select last"
            )
        index = self._stratified(count, seed)
        left = torch.ones(total, dtype=torch.bool).index_fill_(0, index.cpu(), False)
        rest = torch.nonzero(left).flatten().to(index.device)
        return replace(self, train=self.train.take(rest)), self.train.take(index)

    def _strata(self) -> Tensor:
        """[N] on the CPU: the groups of which a part of the training images has as many as their share."""
        return self.train.labels.cpu()

    def _stratified(self, count: int, seed: int) -> Tensor:
        """Places of ``count`` training images, in order."""
        labels = self._strata()
        total, classes = labels.numel(), labels.unique()
        if not len(classes) <= count <= total:
            raise ValueError(f"data: {self.name}: expected {len(classes)} to {total:,} training images, got {count:,}")
        sizes = torch.bincount(labels)[classes] * count
        each = sizes // total
        each[(sizes % total).argsort(descending=True, stable=True)[: count - int(each.sum())]] += 1
        generator = torch.Generator().manual_seed(seed)
        places = [torch.nonzero(labels == label).flatten() for label in classes]
        chosen = [p[torch.randperm(p.numel(), generator=generator)[:n]] for p, n in zip(places, each, strict=True)]
        return torch.cat(chosen).sort().values.to(self.train.labels.device)

    def to(self, device: torch.device) -> Dataset:
        """The same on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def _digests(images: Images) -> list[bytes]:
    """A checksum of each image."""
    if isinstance(images, ImageFiles):
        return images.digests()
    if isinstance(images, Loaded | Samples):
        images = torch.cat([images.read([place], 0)[0] for place in range(len(images))])
    rows = (row for part in images.split(AT_ONCE) for row in part.cpu().flatten(1).contiguous().view(torch.uint8))
    return [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
