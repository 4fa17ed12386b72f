"""Delays against float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.ops.delay import delay
from trtkern.selftest.lif import TOLERANCE, relative, worst


@dataclass(frozen=True)
class DelayCell:
    """One way to use delays."""

    dtype: torch.dtype = torch.float32
    """Of the input."""
    timesteps: int = 17
    """T."""
    shape: tuple[int, ...] = (2, 5)
    """B, C, ..."""
    most: int = 4
    """The most steps that a delay may have."""
    rounded: bool = False
    """Whether delays are rounded to whole steps."""
    learnable: bool = True
    """Whether the delays have a gradient."""
    started: bool = True
    """Whether there are steps before the first one."""
    shared: bool = False
    """One delay for all channels."""


class DelayErrors(NamedTuple):
    """The largest error of each result, relative to the largest number wanted; 0 of what there is not."""

    y: float
    """Of what comes out."""
    x: float
    """Of the gradient of the input."""
    delays: float
    """Of the gradient of the delays."""
    v0: float
    """Of the gradient of the steps before."""

    def within(self, dtype: torch.dtype) -> bool:
        """Whether none is larger than that of a neuron may be; NaN is."""
        return worst(*self) <= TOLERANCE[dtype]


def compare_delay(backend: str, cell: DelayCell, device: str = "cpu", seed: int = 0) -> DelayErrors:
    """Run a cell on the backend and in float64: y, and the gradients of x, of the delays and of what was before.

    Args:
        backend: its name.
        cell: what is tried.
        device: where: "cpu", "cuda", ...
        seed: of the numbers that are drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(cell.timesteps, *cell.shape, generator=draw).to(cell.dtype)
    before = torch.randn(cell.most, *cell.shape, generator=draw).to(cell.dtype)
    delays = cell.most * torch.rand(() if cell.shared else (cell.shape[1],), generator=draw)
    delays = torch.where(torch.rand(delays.shape, generator=draw) < 0.3, delays.round(), delays)
    g = torch.randn(x.shape, generator=draw).to(cell.dtype)
    given = (x, delays, before if cell.started else None)
    return errors(backend, given, g, cell.most, cell.rounded, learnable=cell.learnable, device=device)


def errors(
    backend: str, given: tuple[Tensor, Tensor, Tensor | None], g: Tensor, most: int, rounded: bool = False, *,
    channel_dim: int = 2, learnable: bool = True, device: str = "cpu",
) -> DelayErrors:  # fmt: skip
    """The same of x, delays and v0 that are given, and the gradient g of y."""

    def run(backend: str, given: tuple[Tensor | None, ...], g: Tensor) -> list[Tensor | None]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        if not learnable and leaves[1] is not None:
            leaves[1].requires_grad_(False)
        x, delays, v0 = leaves
        assert x is not None and delays is not None
        y = delay(x, delays, v0, max_delay=most, rounded=rounded, channel_dim=channel_dim, backend=backend)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, g))
        return [y, *(next(found) if t is not None and t.requires_grad else None for t in leaves)]

    here = tuple(None if t is None else t.to(device) for t in given)
    got = run(backend, here, g.to(device))
    want = run("reference", tuple(None if t is None else t.detach().double().cpu() for t in given), g.double().cpu())
    pairs = zip(got, want, strict=True)
    return DelayErrors(*(0.0 if a is None or b is None else relative(a.detach().cpu(), b) for a, b in pairs))
