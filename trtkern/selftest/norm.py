"""BatchNorm + neuron against torch's BatchNorm and the reference neuron in float64, cell by cell.

The oracle is ``torch.nn.functional.batch_norm`` over [T * B, C, ...], the residual added, ``trtkern.reference.lif``
and, where it pools, ``avg_pool2d``: nothing of what is tested but the time loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trtkern import reference
from trtkern.ops._norm import BatchNorm
from trtkern.ops.batch_norm_lif import Neuron, batch_norm_lif
from trtkern.ops.lif import wanted
from trtkern.ops.spikes import Spikes, pack, unpack
from trtkern.selftest.lif import PARAMETER_TOLERANCE, TOLERANCE, Cell, broadcast, cells, laid_out, relative, worst

MARGIN = 1e-4
"""A neuron whose potential comes closer to a discontinuity may differ in a spike: it is left out of the comparison, and
no gradient goes into it, so that it changes nobody else's. (LIF draws it again; here that would move its channel.)"""

LEFT_OUT = 0.2
"""The largest share of neurons that may be left out."""

EPS, MOMENTUM = 1e-5, 0.1
RUNNING_TOLERANCE = 1e-6
"""Relative error of the running statistics, whatever y's dtype."""


@dataclass(frozen=True)
class NormCell(Cell):
    """One way to use BatchNorm + LIF; y is ``[timesteps, *shape]`` with the channels on axis 2 (or last)."""

    training: bool = True
    """Statistics of the batch; else running ones."""
    residual: str = "none"
    """"none", "dense" or "packed" (spikes whose words are kept)."""
    pool: bool = False
    """Whether 2x2 averages come out."""
    static: bool = False
    """Whether the input is the same at every step."""
    last: bool = False
    """Channels on the last axis, as after a Linear."""
    offset: float = 0.3
    """Mean of y: large for what cancels."""

    def __str__(self) -> str:
        words = [name for name in ("pool", "static", "last") if getattr(self, name)]
        mode = "batch" if self.training else "running"
        return "-".join([super().__str__(), mode, f"residual={self.residual}", *words, f"mean={self.offset:g}"])


class NormErrors(NamedTuple):
    """Spikes and words that differ, and largest relative errors of what else comes out and goes back."""

    spikes: int
    """How many differ."""
    words: int
    """How many bytes differ."""
    state: float
    """Of the potentials and the state."""
    running: float
    """Of the running statistics."""
    gradient: float
    """Of y, the residual and v0. That of y is scale * (gx - mean - projection), a difference that may cancel: its error
    is relative to the larger of itself and scale * gx, and halved with a residual, whose gradient gx is kept in the
    dtype: it is rounded twice then."""
    parameter: float
    """Of weight, bias and the parameters of the neuron."""

    def within(self, dtype: torch.dtype) -> bool:
        """Whether they are inside the bounds of that dtype; a NaN is not."""
        bound, exact = TOLERANCE[dtype], dtype == torch.float64
        return (
            self.spikes == 0
            and self.words == 0
            and self.state <= bound
            and self.running <= (bound if exact else RUNNING_TOLERANCE)
            and self.gradient <= bound
            and self.parameter <= (bound if exact else PARAMETER_TOLERANCE)
        )


def norm_cells(names: Iterable[str] = ("LIF",), **sizes: Any) -> Iterator[NormCell]:
    """Every dtype x surrogate x reset x detach x learnable of the neurons named; the norm's options take turns.

    Args:
        names: of the neurons.
        sizes: what the cells take beside, such as ``timesteps`` and ``shape``.
    """
    turns: list[dict[str, Any]] = [
        {"training": training, "residual": residual}
        for residual in ("none", "dense", "packed")
        for training in (True, False)
    ]
    for number, cell in enumerate(cells(names, **sizes)):
        # The six combinations of detach and learnable come fastest: shifted, so that each meets every turn.
        yield NormCell(**vars(cell), **turns[(number + number // len(turns)) % len(turns)])


class _Problem(NamedTuple):
    y: Tensor
    residual: Tensor | None
    v0: Tensor
    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor]
    params: list[Tensor]


def _channel(cell: NormCell) -> int:
    return len(cell.shape) if cell.last else 2


def _clear(cell: NormCell, u: Tensor) -> Tensor:
    """[B, C, ...]: which neurons keep the margin at every step; u: potential - threshold."""
    clear = ~cell.close(u, MARGIN).any(0)
    if not clear.float().mean() >= 1 - LEFT_OUT:
        raise RuntimeError(f"selftest: {(~clear).sum()} neurons of {cell} come closer than {MARGIN} to the threshold")
    return clear


def _draw(cell: NormCell, draw: torch.Generator) -> _Problem:
    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    channels = ([cell.timesteps, *cell.shape])[_channel(cell)]
    exact = torch.float64 if cell.dtype == torch.float64 else torch.float32
    y = 1.7 * normal(1 if cell.static else cell.timesteps, *cell.shape, dtype=torch.float64) + cell.offset
    y = y.to(cell.dtype).expand(cell.timesteps, *cell.shape)
    residual = None
    if cell.residual == "packed":
        residual = (normal(*y.shape, dtype=torch.float32) > 0.5).to(cell.dtype)
    elif cell.residual == "dense":
        residual = 0.5 * normal(*y.shape, dtype=cell.dtype)
    count = channels if cell.learnable == "channel" else 1
    params = cell.parameters(count, draw)
    return _Problem(
        y,
        residual,
        0.3 * normal(*cell.state_shape, dtype=exact),
        1 + 0.3 * normal(channels, dtype=exact),
        0.3 * normal(channels, dtype=exact) + 0.3,
        (cell.offset + 0.3 * normal(channels, dtype=exact), 2.5 + 0.3 * normal(channels, dtype=exact).abs()),
        params,
    )


def _double(problem: _Problem) -> _Problem:
    y, residual, v0, weight, bias, (mean, var), params = problem
    wide = None if residual is None else residual.double()
    running = mean.double().clone(), var.double().clone()
    return _Problem(y.double(), wide, v0.double(), weight.double(), bias.double(), running, params)


def _oracle(cell: NormCell, p: _Problem) -> tuple[Tensor, ...]:
    """Spikes, pooled and dense, v or h, the last state, potential - threshold in float64, and what went into the
    neuron; updates p.running as torch does."""
    channel = _channel(cell)
    flat = p.y.movedim(channel, 2).flatten(0, 1)
    x = functional.batch_norm(flat, *p.running, p.weight, p.bias, cell.training, MOMENTUM, EPS)
    x = x.unflatten(0, (cell.timesteps, -1)).movedim(2, channel)
    x = x if p.residual is None else x + p.residual
    params = p.params if cell.last else broadcast(p.params, x)
    trace = reference.lif(x, p.v0, params, cell.spec)
    s = functional.avg_pool2d(trace.s.flatten(0, 1), 2).unflatten(0, x.shape[:2]) if cell.pool else trace.s
    with torch.no_grad():
        u = reference.differences(x, p.v0, params, cell.spec)
    return s, trace.s, getattr(trace, cell.returned), trace.state, u, x


def _of_y(cell: NormCell, p: _Problem, got: Tensor, want: Tensor, gx: Tensor) -> float:
    """The error of y's gradient (``NormErrors.gradient``); gx is the gradient of what went into the neuron."""
    axis = _channel(cell)
    var = p.y.detach().var([a for a in range(p.y.dim()) if a != axis], correction=0) if cell.training else p.running[1]
    scale = (p.weight.detach() * (var + EPS).rsqrt()).view(-1, *[1] * (p.y.dim() - axis - 1))
    largest = max(want.abs().max().item(), (scale * gx).abs().max().item())
    return (got.double().cpu() - want).abs().max().item() / largest / (1 if p.residual is None else 2)


def compare_norm(backend: str, cell: NormCell, device: str = "cpu", seed: int = 0) -> NormErrors:
    """Run the cell on the backend and on the oracle, all outputs and all gradients; the errors.

    Args:
        backend: its name.
        cell: what is tried.
        device: where: "cpu", "cuda", ...
        seed: of the numbers that are drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    problem = _draw(cell, draw)
    # The oracle.
    wide = _double(problem)
    leaves = [t.requires_grad_() for t in (wide.y, wide.residual, wide.v0, wide.weight, wide.bias) if t is not None]
    leaves += [t.clone().requires_grad_() for t in wide.params]
    wide = wide._replace(params=leaves[-len(wide.params) :])
    s, dense, v, last, u, x = _oracle(cell, wide)
    clear = _clear(cell, u)
    # A pooled neuron is clear if all four are.
    out = -functional.max_pool2d(-clear.float(), 2) if cell.pool else clear
    incoming = [(torch.randn(t.shape, generator=draw) * mask).to(cell.dtype) for t, mask in ((s, out), (v, clear))]
    incoming.append(torch.randn(last.shape, generator=draw) * clear)
    wanted_grads = torch.autograd.grad(
        [s, v, last], [*leaves, x], [g.double() for g in incoming], materialize_grads=True
    )
    gx = wanted_grads[-1]

    # What is tested.
    learn = cell.learnable != "none"
    exact = problem.weight.dtype
    y = laid_out(problem.y[:1].to(device), cell.layout) if cell.static else laid_out(problem.y.to(device), cell.layout)
    y = y.expand(problem.y.shape).detach().requires_grad_()
    v0, weight, bias = (t.to(device).requires_grad_() for t in (problem.v0, problem.weight, problem.bias))
    residual = None if problem.residual is None else problem.residual.to(device).requires_grad_()
    params = [p.to(device, exact).squeeze(0).requires_grad_() for p in problem.params]
    numbers: Any = params if learn else [p.item() for p in problem.params]
    values = dict(zip(cell.spec.row.params, numbers, strict=True))
    mean, var = (t.clone().to(device) for t in problem.running)
    norm = BatchNorm(weight, bias, mean, var, torch.tensor(0, device=device), EPS, MOMENTUM, cell.training)
    want = wanted(True, cell.returned == "v", True, True, cell.returned == "h")
    neuron = Neuron(values, cell.spec, cell.pool, want, None, backend)
    carried = Spikes(residual, pack(residual)) if residual is not None and cell.residual == "packed" else residual
    made = batch_norm_lif(y, norm, neuron, carried, v0, -1 if cell.last else 2)
    spikes, state, packed, potentials = (
        t for t in (made.spikes, made.state, made.packed, made.v, made.h) if t is not None
    )
    outputs = [spikes, potentials, state]
    grads = [laid_out(incoming[0].to(device), cell.layout), incoming[1].to(device), incoming[2].to(device, v0.dtype)]
    inputs = [t for t in (y, residual, v0, weight, bias) if t is not None] + (params if learn else [])
    got = torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)

    split = 2 + (residual is not None)
    pairs = [(a, b.reshape(a.shape)) for a, b in zip(got, wanted_grads[: len(got)], strict=True)]
    learned = [torch.stack(side) for side in zip(*pairs[split + 2 :], strict=True)]
    words = unpack(packed, cell.timesteps, dtype=torch.float64)
    return NormErrors(
        spikes=int(((spikes.detach().double().cpu() != s.detach()) & (out > 0)).sum()),
        words=int(((words.cpu() != dense.detach()) & clear).sum()),
        state=worst(
            relative(potentials.cpu().where(clear, 0), v.detach().where(clear, 0)),
            relative(state.cpu().where(clear, 0), last.detach().where(clear, 0)),
        ),
        running=worst(*map(relative, (mean, var), wide.running)) if cell.training else 0.0,
        gradient=worst(_of_y(cell, wide, *pairs[0], gx), *(relative(*pair) for pair in pairs[1:split])),
        parameter=worst(*(relative(*pair) for pair in (*pairs[split : split + 2], *([learned] if learned else [])))),
    )
