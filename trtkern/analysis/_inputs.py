"""What a layer with weights is given: which operations its inputs that are not 0 need, exactly, and what values they
have."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import isfinite, lcm, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.ops.spikes import dense

Counted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose operations are counted."""
_PARTS = 1024
"""The finest fractions that are told from analog values."""
_VALUES = 4096
"""So many different values at most are told one by one."""
_NEAR = 5e-4
"""How near to a whole number a multiple is, rounding of float32 included."""


def axes_of(layer: nn.Module, x: Any) -> int:
    """How many axes at the end of a layer's input belong to one sample and step."""
    if not isinstance(layer, nn.Linear):
        return len(layer.kernel_size) + 1  # type: ignore[arg-type]
    x = dense(x)
    # SpikeLinear flattens what is behind [T, B]; a Linear takes the last axis.
    return 1 if x.shape[-1] == layer.in_features else x.dim() - 2


def reached(layer: nn.Module, amounts: Tensor) -> Tensor:
    """[R]: the sum over a row's inputs of amount times fan-out: how many operations so many values at each input need.

    The fan-out of an input is the number of outputs that it reaches: at a border, under a stride or a dilation fewer
    than kernel size times channels. Padding by anything but zeros copies inputs, and a copy reaches outputs too.

    Args:
        layer: one of ``Counted``.
        amounts: [R, ...], one sample and step a row.
    """
    if isinstance(layer, nn.Linear):
        return amounts.flatten(1).sum(1, dtype=torch.float64) * layer.out_features
    channels, amounts, pads = _padded(layer, amounts)
    sums = amounts.sum(1, dtype=torch.float64)
    for axis, pad in reversed(list(enumerate(pads))):
        sums = sums @ _fan_out(sums.shape[-1], *_axis(layer, axis), pad).to(sums.device)
    return sums * channels


def dense_operations(layer: Any, x: Tensor) -> int:
    """Multiplications of one sample and step where every input counts, zeros of a padding included, as it is usual.

    Args:
        layer: one of ``Counted``.
        x: [R, ...], one sample and step a row.
    """
    if isinstance(layer, nn.Linear):
        return prod(x.shape[1:]) * layer.out_features
    return outputs_of(layer, x) * layer.in_channels // layer.groups * prod(layer.kernel_size)


def outputs_of(layer: Any, x: Tensor) -> int:
    """How many outputs a row of x [R, ...] has."""
    if isinstance(layer, nn.Linear):
        return prod(x.shape[1:]) // layer.in_features * layer.out_features
    pads = _pads(layer)
    sizes = [_windows(size, *_axis(layer, axis), pads[axis]) for axis, size in enumerate(x.shape[2:])]
    return prod(sizes) * layer.out_channels


def _padded(layer: Any, x: Tensor) -> tuple[int, Tensor, Sequence[tuple[int, int]]]:
    """Outputs' channels that an input reaches, x with a padding that copies values, and the zeros still to pad."""
    channels, pads = layer.out_channels // layer.groups, _pads(layer)
    if layer.padding_mode == "zeros":
        return channels, x, pads
    around = [side for pad in reversed(pads) for side in pad]
    return channels, F.pad(x, around, layer.padding_mode), [(0, 0)] * len(pads)


def _pads(layer: Any) -> list[tuple[int, int]]:
    """(before, behind) of each axis in space."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in layer.padding]


def _axis(layer: Any, axis: int) -> tuple[int, int, int]:
    return layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]


def _windows(size: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int]) -> int:
    return (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1


@lru_cache(maxsize=256)
def _fan_out(size: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int]) -> Tensor:
    """[size] float64: to how many outputs along an axis each input goes."""
    first = torch.arange(_windows(size, kernel, stride, dilation, pad)) * stride - pad[0]
    taken = (first[:, None] + torch.arange(kernel) * dilation).flatten()
    return torch.bincount(taken[(taken >= 0) & (taken < size)], minlength=size).double()


class Values:
    """Which values a layer was given, in constant memory."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.parts = 1
        """All values are multiples of 1 / parts."""
        self.seen: set[Fraction] | None = set()
        """The values; None if they are too many or no such multiples."""

    @property
    def kind(self) -> str:
        """ "spikes" (0 and 1), "integers", "fractions" (multiples of 1 / parts) or "analog"."""
        if self.seen is None:
            return "analog"
        if self.parts > 1:
            return "fractions"
        return "spikes" if self.seen <= {0, 1} else "integers"

    def add(self, x: Tensor) -> bool:
        """More values; whether these are nothing but 0 and 1.

        Raises:
            ValueError: one is not finite.
        """
        low, high = (float(value) for value in x.aminmax())
        if not (isfinite(low) and isfinite(high)):
            raise ValueError(f"expected finite inputs, got some from {low} to {high}")
        self.low, self.high = min(low, self.low), max(high, self.high)
        binary = low >= 0 and high <= 1 and bool(((x == 0) | (x == 1)).all())
        if self.seen is not None:
            self.seen = self.seen | {Fraction(int(v)) for v in (low, high)} if binary else self._fractions(x)
        return binary

    def _fractions(self, x: Tensor) -> set[Fraction] | None:
        """All values as fractions, with those before."""
        assert self.seen is not None
        whole = _multiples(x, self.parts)
        if whole is None:
            some = x.flatten()[:: max(1, x.numel() // 512)].double()
            trials = some[None] * torch.arange(1, _PARTS + 1, device=x.device)[:, None]
            fits = ((trials - trials.round()).abs() < _NEAR / 5).all(1).nonzero()
            if len(fits) == 0 or (parts := lcm(self.parts, int(fits[0]) + 1)) > _PARTS:
                return None
            self.parts = parts
            if (whole := _multiples(x, parts)) is None:
                return None
        first = int(whole.min())
        if int(whole.max()) - first >= _VALUES:
            return None
        counts = torch.bincount((whole - first).flatten().to(torch.int64))
        return self.seen | {Fraction(first + int(i), self.parts) for i in counts.nonzero()[:, 0]}


def _multiples(x: Tensor, parts: int) -> Tensor | None:
    """x * parts where that is whole, to rounding."""
    scaled = x.float() * parts
    whole = scaled.round()
    return whole if bool(((scaled - whole).abs() < _NEAR).all()) else None
