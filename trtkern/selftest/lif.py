"""Neurons against the float64 reference, cell by cell.

A cell is one way to use one (neuron, dtype, surrogate, reset, detach, learnable). Its inputs keep every potential away
from the threshold, and from the edges of the rectangle, by a margin: then spikes must agree exactly and gradients
within a bound that depends on the dtype alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import neurons, reference, surrogates
from trtkern.ops.lif import neuron, wanted
from trtkern.rows import Registered
from trtkern.spec import LIFSpec

MARGIN = 1e-3
"""No potential comes closer to a discontinuity; float32 rounding moves it by about 1e-6."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}
"""Largest error of an output or an input gradient in that dtype, relative to the largest magnitude in it."""

PARAMETER_TOLERANCE = 1e-4
"""The same for gradients of learnable parameters: sums over many neurons in float32."""


@dataclass(frozen=True)
class Cell:
    """One way to use a neuron, and the size at which it is tried: x is ``[timesteps, *shape]``, channels on axis 2."""

    dtype: torch.dtype = torch.float32
    """Of the input."""
    surrogate: str = "triangle"
    """A name in ``trtkern.surrogates.TABLE``."""
    reset: str = "hard"
    """"hard", "soft" or "none"."""
    detach_reset: bool = False
    """No gradient through the spike in the reset."""
    learnable: str = "none"
    """"none", "scalar" or "channel": all parameters as numbers, 0-dim tensors or per-channel tensors."""
    timesteps: int = 4
    """T."""
    shape: tuple[int, ...] = (3, 5, 7)
    """B, C, ..."""
    layout: str = "contiguous"
    """"contiguous", "channels_last" or "strided" (every second column of a larger tensor)."""
    returned: str = "v"
    """Which potential comes back and is differentiated: "v" after the reset, or "h" before it."""
    neuron: str = "LIF"
    """A name in ``trtkern.neurons.TABLE``."""
    lengths: tuple[int, ...] | None = None
    """The steps of each sample, of which ``shape`` has as many; behind them x is NaN. None: each has all."""

    @property
    def spec(self) -> LIFSpec:
        """What selects code."""
        return LIFSpec(self.reset, self.surrogate, None, self.detach_reset, self.neuron)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the state before the first step and after the last."""
        count = len(self.spec.row.states)
        return (count, *self.shape) if count > 1 else self.shape

    def close(self, u: Tensor, margin: float) -> Tensor:
        """Where a potential comes closer than that to the threshold, or to an edge of the rectangle; u: their
        difference."""
        near = u.abs() < margin
        if self.surrogate == "rectangle":
            near |= (u.abs() - 0.5 / (self.spec.alpha or 1.0)).abs() < margin
        return near

    def parameters(self, count: int, draw: torch.Generator) -> list[Tensor]:
        """The neuron's parameters, float64 [count] each; numbers that float32 holds exactly, so that every backend and
        the oracle read the same ones."""
        spread = 0.0 if self.learnable == "none" else 0.1
        row = self.spec.row
        own = row.defaults if isinstance(row, Registered) else {}
        centers = {**neurons.CENTERS, **{name: value for name, value in own.items() if value is not None}}
        return [(centers[name] + spread * torch.rand(count, generator=draw)).double() for name in row.params]

    def __str__(self) -> str:
        detach = "detached" if self.detach_reset else "attached"
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, (self.timesteps, *self.shape)))
        name = f"{self.neuron}-{dtype}-{self.surrogate}-{self.reset}-{detach}-{self.learnable}-{size}-{self.layout}"
        name = name if self.returned == "v" else f"{name}-{self.returned}"
        return name if self.lengths is None else f"{name}-lengths {','.join(map(str, self.lengths))}"

    def padded(self, x: Tensor) -> Tensor:
        """x, NaN behind the end of each sample."""
        if self.lengths is None:
            return x
        return torch.where(reference.live(x, torch.tensor(self.lengths)), x, torch.nan)


class Errors(NamedTuple):
    """Spikes that differ, and the largest relative errors of v or h, of the gradients of x and v0, and of the
    parameters."""

    spikes: int
    """How many differ."""
    output: float
    """Of v or h."""
    gradient: float
    """Of those of x and v0."""
    parameter: float
    """Of those of the parameters."""

    def within(self, dtype: torch.dtype) -> bool:
        """Whether they are inside the bounds of that dtype; a NaN is not."""
        bound = TOLERANCE[dtype]
        return (
            self.spikes == 0
            and self.output <= bound
            and self.gradient <= bound
            and self.parameter <= (bound if dtype == torch.float64 else PARAMETER_TOLERANCE)
        )


def cells(names: Iterable[str] = ("LIF",), **sizes: object) -> Iterator[Cell]:
    """Every dtype x surrogate x reset x detach x learnable that the fused backends hold, of the neurons named.

    Args:
        names: of the neurons.
        sizes: what the cells take beside, such as ``timesteps`` and ``shape``.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for name in names:
        resets = neurons.lookup(name).settle
        grid = itertools.product(dtypes, surrogates.BUILTIN, resets, (False, True), ("none", "scalar", "channel"))
        for dtype, surrogate, reset, detach, learnable in grid:
            yield Cell(dtype, surrogate, reset, detach, learnable, neuron=name, **sizes)  # type: ignore[arg-type]


class _Problem(NamedTuple):
    x: Tensor
    v0: Tensor
    params: list[Tensor]
    gs: Tensor
    gv: Tensor
    gstate: Tensor


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout of the axes after time."""
    if layout == "channels_last":
        return t.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "strided":
        return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
    return t


def broadcast(params: list[Tensor], x: Tensor) -> list[Tensor]:
    return [p.reshape(-1, *[1] * (x.dim() - 3)) if p.numel() > 1 else p for p in params]


def _problem(cell: Cell, seed: int) -> _Problem:
    """Inputs whose potentials keep the margin; values in the cell's dtype, held in float64 where the oracle reads."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = cell.dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    params = cell.parameters(cell.shape[1] if cell.learnable == "channel" else 1, draw)
    x = normal(cell.timesteps, *cell.shape) + 0.5
    v0 = 0.3 * normal(*cell.state_shape, dtype=torch.float32)
    for _ in range(300):
        u = reference.differences(x.double(), v0.double(), broadcast(params, x), cell.spec)
        bad = cell.close(u, MARGIN).any(0)
        if not bad.any():
            break
        x = torch.where(bad, normal(*x.shape) + 0.5, x)
    else:
        raise RuntimeError(f"selftest: no inputs for {cell} keep a margin of {MARGIN} from the threshold")
    gs, gv = normal(*x.shape) + 0.2, normal(*x.shape)
    return _Problem(cell.padded(x), v0, params, gs, gv, normal(*cell.state_shape, dtype=torch.float32))


def worst(*errors: float) -> float:
    """The largest; infinite if one is NaN, which Python's ``max`` drops unless it comes first.

    Args:
        errors: any numbers.
    """
    return max(math.inf if math.isnan(error) else error for error in errors)


def relative(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().item() if want.numel() else 0.0
    error = (got.detach().double().cpu() - want).abs().max().item() if want.numel() else 0.0
    return worst(error / scale if scale else error)


def compare(backend: str, cell: Cell, device: str = "cpu", seed: int = 0) -> Errors:
    """Run the cell on the backend and on the float64 reference, all outputs and all gradients; the errors.

    Args:
        backend: its name.
        cell: what is tried.
        device: where: "cpu", "cuda", ...
        seed: of the numbers that are drawn.
    """
    problem = _problem(cell, seed)
    oracle_inputs = [t.double().requires_grad_() for t in (problem.x, problem.v0, *problem.params)]
    lengths = None if cell.lengths is None else torch.tensor(cell.lengths)
    rows = broadcast(oracle_inputs[2:], problem.x)
    oracle = reference.lif(oracle_inputs[0], oracle_inputs[1], rows, cell.spec, lengths)
    incoming = [g.double() for g in (problem.gs, problem.gv, problem.gstate)]
    potentials = getattr(oracle, cell.returned)
    outputs = [oracle.s, potentials, oracle.state]
    expected = torch.autograd.grad(outputs, oracle_inputs, incoming, materialize_grads=True)

    x = laid_out(problem.x.to(device), cell.layout).requires_grad_()
    exact = torch.float64 if cell.dtype == torch.float64 else torch.float32
    v0 = problem.v0.to(device, exact).requires_grad_()
    tensors = [p.to(device, exact).squeeze(0).requires_grad_() for p in problem.params]
    learn = cell.learnable != "none"
    numbers: Any = tensors if learn else [p.item() for p in problem.params]
    values = dict(zip(cell.spec.row.params, numbers, strict=True))
    before = cell.returned == "h"
    ends = None if lengths is None else lengths.to(device)
    out = neuron(x, v0, values, cell.spec, wanted(True, not before, True, False, before), backend, lengths=ends)
    spikes, state, v = (tensor for tensor in out if tensor is not None)
    grads = [laid_out(g.to(device), cell.layout) for g in (problem.gs, problem.gv)]
    inputs = [x, v0, *(tensors if learn else [])]
    incoming = [*grads, problem.gstate.to(device, v0.dtype)]
    got = torch.autograd.grad([spikes, v, state], inputs, incoming, materialize_grads=True)
    # The parameters' gradients are measured together, for one of them may be a difference that cancels.
    learned = [(g, t.reshape(g.shape)) for g, t in zip(got[2:], expected[2:], strict=False)]  # none where none learns
    return Errors(
        spikes=int((spikes.detach().double().cpu() != oracle.s.detach()).sum()),
        output=worst(relative(v, potentials.detach()), relative(state, oracle.state.detach())),
        gradient=worst(*map(relative, got[:2], expected[:2])),
        parameter=relative(*map(torch.stack, zip(*learned, strict=True))) if learn else 0.0,
    )
