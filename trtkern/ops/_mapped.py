"""What ``torch.vmap`` maps over, as one more of the axes that a kernel has after time."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

Mapped = tuple[Tensor, int]
"""A result, and the axis of it that is the mapped one."""


def sample(t: Tensor, dim: int | None, number: int = 0) -> Tensor:
    """One of the samples of t."""
    return t if dim is None else t.select(dim, number)


class Fold:
    """M samples as one tensor of the shape of one, in whose memory one axis is M times as long.

    Kernels see [T, N] in storage order, and the channel of neuron n as ``(n // inner) % C``. Where all samples share
    the numbers of the channels, the mapped axis lies next to time and the channels are as they were. Where each sample
    has its own, it lies next to the channels, of which there are then M * C.
    """

    def __init__(
        self, x: Tensor, dim: int | None, count: int, own: int | None = None, inner: int = 1, pool: bool = False
    ) -> None:
        """x: [T, ...], mapped on axis ``dim``, dense in each sample; count: M; own: C, where each sample has its own
        numbers; pool: x is [T, B, C, H, W], contiguous or channels last."""
        one = sample(x, dim)
        strides = one.stride()
        self.count, self.own = count, own is not None
        if pool:
            self.order = [1, 2, 3, 4] if one.stride(-1) == 1 else [1, 3, 4, 2]
        else:
            self.order = sorted(range(1, one.dim()), key=lambda axis: -strides[axis])
        sizes = self._sizes(one.shape)
        self.at = 0
        if own is not None and pool:
            self.at = self.order.index(2)
        elif own is not None and own > 1:
            self.at = next(at for at in range(len(sizes) + 1) if prod(sizes[at:]) <= own * inner)
        self.apart = prod(sizes[: self.at]), prod(sizes[self.at :])
        self.inner = prod(sizes[self.at :]) if own == 1 else inner

    def _sizes(self, shape: torch.Size) -> list[int]:
        return [shape[axis] for axis in self.order]

    def steps(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """t [T, ...] of all samples together; its sizes need not be x's, as those of pooled spikes are not."""
        if t is None:
            return None
        t = t.unsqueeze(1).expand(t.shape[0], self.count, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
        steps = t.shape[0]
        if steps > 1 and t.stride(0) == 0:
            return self._fold(t[:1]).expand(steps, *[-1] * (max(t.dim() - 1, 2) - 1))
        return self._fold(t)

    def state(self, t: Tensor | None, dim: int | None, states: int) -> Tensor | None:
        """A state [...], or of several numbers [S, ...], of all samples together."""
        if t is None or states > 1:
            return self.steps(t, dim)
        folded = self.steps(t.unsqueeze(0), None if dim is None else dim + 1)
        return None if folded is None else folded[0]

    def _fold(self, t: Tensor) -> Tensor:
        order = [axis + 1 for axis in self.order]
        laid = t.permute(0, *order[: self.at], 1, *order[self.at :])
        sizes = [t.shape[axis] for axis in order] or [1]
        sizes[self.at] *= self.count
        laid = laid.reshape(t.shape[0], *sizes).contiguous()
        return laid.permute(0, *(1 + self.order.index(axis) for axis in range(1, t.dim() - 1))) if self.order else laid

    def out_steps(self, t: Tensor) -> Mapped:
        """[T, ...] of each sample, of what a kernel made of all together: a view."""
        if not self.order:
            return t, 1
        sizes = self._sizes(t.shape)
        sizes[self.at] //= self.count
        apart = t.permute(0, *self.order).view(t.shape[0], *sizes[: self.at], self.count, *sizes[self.at :])
        behind = [1 + place + (place >= self.at) for place in map(self.order.index, range(1, t.dim()))]
        return apart.permute(0, 1 + self.at, *behind), 1

    def out_state(self, t: Tensor, states: int) -> Mapped:
        """The state of each sample."""
        return self.out_steps(t) if states > 1 else (self.out_steps(t.unsqueeze(0))[0][0], 0)

    def rows(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """t [K, C], numbers of the channels, as the kernel then counts those."""
        if t is None or not self.own:
            return None if t is None else t.contiguous()
        t = t.unsqueeze(1).expand(t.shape[0], self.count, t.shape[1]) if dim is None else t.movedim(dim, 1)
        return t.reshape(t.shape[0], -1).contiguous()

    def out_rows(self, t: Tensor) -> Mapped:
        """[K, C] of each sample, of [K, M * C]."""
        return t.view(t.shape[0], self.count, -1), 1

    def out_channels(self, t: Tensor) -> Mapped:
        """[C] of each sample, of [M * C]."""
        return t.view(self.count, -1), 0

    def flat(self, t: Tensor, dim: int | None) -> Tensor:
        """t [K, N], neurons in storage order, of all samples together."""
        t = t.unsqueeze(1).expand(t.shape[0], self.count, t.shape[1]) if dim is None else t.movedim(dim, 1)
        return t.reshape(t.shape[0], self.count, *self.apart).transpose(1, 2).reshape(t.shape[0], -1).contiguous()

    def out_flat(self, t: Tensor) -> Mapped:
        """[K, N] of each sample."""
        outer, inside = self.apart
        return t.view(t.shape[0], outer, self.count, inside).transpose(1, 2).flatten(2), 1
