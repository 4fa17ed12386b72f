"""Tensors that are pages of a file, of which a part is a list of places and no copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64 << 20
"""Bytes that are copied to a device at once."""


class Mapped:
    """Frames [N, T, C, H, W] on the disk: what stands for a tensor of them in a ``Split``.

    ``frames[index]`` for a slice or a 1-d tensor of integers or bools is those frames, still on the disk; ``read``
    copies some into memory.

    Args:
        values: [N, ...] on the CPU, as a rule mapped from a file (``trtkern.data.cache``).
        places: which of them; None is all.
    """

    device = torch.device("cpu")

    def __init__(self, values: Tensor, places: Tensor | None = None) -> None:
        self._values, self.dtype = values, values.dtype
        self._places = torch.arange(len(values)) if places is None else places

    @property
    def shape(self) -> torch.Size:
        """[N, ...]."""
        return torch.Size((len(self._places), *self._values.shape[1:]))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: slice | Tensor) -> Mapped:
        return Mapped(self._values, self._places[index.cpu() if isinstance(index, Tensor) else index])

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self._values.is_floating_point()

    def read(self, places: Tensor | slice) -> Tensor:
        """The frames at these places, in memory."""
        return self._values[self._places[places]]

    def split(self, count: int) -> Iterator[Tensor]:
        """All frames, ``count`` at a time."""
        return (self.read(slice(first, first + count)) for first in range(0, len(self), count))

    def to(self, device: torch.device) -> Mapped | Tensor:
        """Itself for the CPU; a tensor on another device, which holds all of them then."""
        if device.type == "cpu":
            return self
        there = torch.empty(self.shape, dtype=self.dtype, device=device)
        count = max(1, BLOCK // max(1, self.shape[1:].numel() * self.dtype.itemsize))
        for number, part in enumerate(self.split(count)):
            there[number * count :][: len(part)] = part.to(device)
        return there
