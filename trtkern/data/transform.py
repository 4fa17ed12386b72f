"""What the transforms of ``augment`` share: their base, the checks of what comes in, draws and picked pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Which part of a batch some images are: one of several equal ones, which stand side by side."""

    number: int = 0
    """From 0."""
    parts: int = 1


WHOLE = Part()
"""All of it."""


@dataclass(frozen=True)
class Transform(ABC):
    """One random change; subclasses are frozen dataclasses of numbers, checked when they are made."""

    name: ClassVar[str]
    """In a recipe."""

    def __call__(self, images: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
        """The images [B, C, H, W] or [T, B, C, H, W], changed.

        Args:
            images: a batch, or a part of one.
            generator: of the draws, which are those of the whole batch: an image is changed as if all of it were here.
            part: which part.

        Raises:
            TypeError, ValueError: images or a generator of another kind; images too small for the transform.
        """
        check(images, generator)
        count, _, height, width = images.shape[-4:]
        drawn = self.draw(count * part.parts, height, width, generator)
        drawn = drawn[..., part.number * count : (part.number + 1) * count]
        if images.is_cuda:  # from pageable memory the copy would wait for the GPU
            drawn = drawn.contiguous().pin_memory()
        return self.apply(images, drawn.to(images.device, non_blocking=True))

    @abstractmethod
    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The random numbers for ``count`` images of that size: [count] or [n, count], on the CPU."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The images with these draws, which lie on their device."""


def check(images: Tensor, generator: torch.Generator) -> None:
    if not isinstance(images, Tensor) or images.is_complex():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"augment: expected images as a real tensor, got {got}")
    if images.dim() not in (4, 5) or 0 in images.shape:
        raise ValueError(
            f"augment: expected images [B, C, H, W] or sequences [T, B, C, H, W], got {list(images.shape)}"
        )
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        came = generator.device if isinstance(generator, torch.Generator) else type(generator).__name__
        raise ValueError(f"augment: expected a torch.Generator on the CPU, got {came}; the images may be anywhere")


def real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(transform: str, name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"augment: {transform}: expected {name} as an integer of at least {least}, got {value!r}")


def below(limits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Integers [n, count] of 0..limit - 1, for limits [n, 1] or [n, count].

    floor(u n) with 53 random bits in u has every value below n with a probability of 1/n to within 2**-53, and never n.
    """
    return (torch.rand(limits.shape[0], count, dtype=torch.float64, generator=generator) * limits).long()


def take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[..., b, c, i, j] = images[..., b, c, rows[b, i], columns[b, j]], 0 where an index is beyond the border."""
    height, width = images.shape[-2:]
    known = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    flat = index.flatten(1).unsqueeze(1).expand(*images.shape[:-2], -1)
    out = images.flatten(-2).gather(-1, flat).unflatten(-1, index.shape[1:])
    return out.masked_fill(~known.unsqueeze(1), 0)
