"""Neurons that feed each other against the float64 reference, cell by cell.

A spike that differs changes all that follows, and no inputs keep every potential away from its threshold when the
potentials hang on each other. So the reference is given the currents and the spikes of what is compared, and the three
parts of a step are looked at each: the currents are x + s W^T + b to within a rounding; whoever fired, or did not, was
above its threshold, or not, or within a margin of it; and all else, gradients through time above all, follows from
currents and spikes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import neurons, reference
from trtkern.ops._prepared import WANT_EDGES
from trtkern.ops.lif import wanted
from trtkern.ops.recurrent import recurrent, recurrent_forward
from trtkern.selftest.lif import PARAMETER_TOLERANCE, TOLERANCE, relative, worst
from trtkern.spec import LIFSpec

MARGIN = 1e-4
"""How far from its threshold a potential may be on the other side, in float32."""


@dataclass(frozen=True)
class RecurrentCell:
    """One way to use neurons that feed each other, and the size at which it is tried: x is [timesteps, batch, size]."""

    neuron: str = "LIF"
    """A name in ``trtkern.neurons.TABLE``."""
    dtype: torch.dtype = torch.float32
    """Of the input."""
    surrogate: str = "atan"
    """A name in ``trtkern.surrogates.TABLE``."""
    reset: str = "soft"
    """"hard", "soft" or "none"."""
    detach_reset: bool = False
    """No gradient through the spike in the reset."""
    learnable: str = "channel"
    """"none", "scalar" or "channel": all parameters as numbers, 0-dim tensors or a number a neuron."""
    timesteps: int = 17
    """T."""
    batch: int = 3
    """B."""
    size: int = 11
    """How many neurons feed each other."""
    returned: str = "v"
    """Which potential comes back and is differentiated: "v" after the reset, or "h" before it."""
    started: bool = True
    """Whether spikes and a state before the first step are given."""
    bias: bool = True
    """Whether the weights between them have a bias."""

    @property
    def spec(self) -> LIFSpec:
        """What selects code."""
        return LIFSpec(self.reset, self.surrogate, None, self.detach_reset, self.neuron)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [
            f"recurrent {self.neuron}", dtype, self.surrogate, self.reset, self.learnable,
            f"{self.timesteps}x{self.batch}x{self.size}", self.returned,
        ]  # fmt: skip
        parts += ["detached"] * self.detach_reset + ["from zero"] * (not self.started) + ["no bias"] * (not self.bias)
        return "-".join(parts)


class RecurrentErrors(NamedTuple):
    """Spikes on the wrong side of the threshold; how far the currents are off, in roundings of their dtype; the largest
    relative errors of the potentials and the state, of the gradients of x, s0 and the state, and of those of the
    weight, the bias and the parameters."""

    spikes: int
    """How many are on the wrong side."""
    current: float
    """In roundings of the dtype."""
    output: float
    """Of the potentials and the state."""
    gradient: float
    """Of those of x, s0 and the state."""
    parameter: float
    """Of those of the weight, the bias and the parameters."""

    def within(self, dtype: torch.dtype) -> bool:
        """Whether they are inside the bounds of that dtype; a NaN is not."""
        bound = 2 * TOLERANCE[dtype]
        learned = max(bound, PARAMETER_TOLERANCE)
        return (
            self.spikes == 0
            and self.current <= 1.0
            and self.output <= bound
            and self.gradient <= bound
            and self.parameter <= learned
        )


class _Problem(NamedTuple):
    x: Tensor
    s0: Tensor | None
    state: Tensor | None
    weight: Tensor
    bias: Tensor | None
    params: list[Tensor]
    incoming: tuple[Tensor, Tensor, Tensor]
    """Of the spikes, the potentials and the last state."""


def _problem(cell: RecurrentCell, seed: int) -> _Problem:
    """Values in the dtype in which they are handed over."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    T, B, N, row = cell.timesteps, cell.batch, cell.size, cell.spec.row
    shape = (len(row.states), B, N) if len(row.states) > 1 else (B, N)
    count, spread = N if cell.learnable == "channel" else 1, 0.0 if cell.learnable == "none" else 0.1
    params = [neurons.CENTERS[name] + spread * torch.rand(count, generator=draw) for name in row.params]
    return _Problem(
        normal(T, B, N, dtype=cell.dtype) + 0.5,
        (torch.rand(B, N, generator=draw) < 0.3).to(cell.dtype) if cell.started else None,
        0.3 * normal(*shape) if cell.started else None,
        normal(N, N) * (0.4 / N**0.5),
        0.1 * normal(N) if cell.bias else None,
        params,
        (normal(T, B, N, dtype=cell.dtype) + 0.2, normal(T, B, N, dtype=cell.dtype), normal(*shape)),
    )


def _wrong_spikes(current: Tensor, s: Tensor, state: Tensor | None, params: list[Tensor], spec: LIFSpec) -> int:
    """Neuron-steps whose spike is not what their potential, in float64 from these currents and spikes, says."""
    charge, fire, settle = reference.steps(spec.neuron, spec.reset)
    zero = torch.zeros_like(current[0])
    now: Any = (zero,) * len(spec.row.states)
    if state is not None:
        now = (state,) if len(now) == 1 else state.unbind(0)
    wrong = 0
    for drive, fired in zip(current, s > 0, strict=True):
        trace = charge(drive, now, params)
        potential, threshold = fire(trace, params)
        over = potential - threshold
        wrong += int((((over > 0) != fired) & ~(over.abs() < MARGIN)).sum())
        now = settle(trace, fired, params)
    return wrong


def _linear(s: Tensor, s0: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the neurons add to each step."""
    first = torch.zeros_like(s[:1]) if s0 is None else s0[None]
    return torch.nn.functional.linear(torch.cat((first, s[:-1])), weight, bias)


def _currents(given: tuple, cell: RecurrentCell, params: Tensor | None, scalars: list[float], backend: str) -> Tensor:
    """The currents as the backend wrote them."""
    x, s0, state, weight, bias = (None if t is None else t.detach() for t in given)
    private = x, s0, state, weight, bias, params, scalars, cell.spec.token, None, WANT_EDGES, backend
    return recurrent_forward(*private)[4].double().cpu()


def compare_recurrent(backend: str, cell: RecurrentCell, device: str = "cpu", seed: int = 0) -> RecurrentErrors:
    """Run the cell on the backend and on the float64 reference, all outputs and all gradients; the errors.

    Args:
        backend: its name.
        cell: what is tried.
        device: where: "cpu", "cuda", ...
        seed: of the numbers that are drawn.
    """
    problem, names = _problem(cell, seed), cell.spec.row.params
    moved: Any = [None if t is None else t.to(device).requires_grad_() for t in problem[:5]]
    tensors = [p.to(device).squeeze(0).requires_grad_() for p in problem.params]
    learn = cell.learnable != "none"
    numbers: Any = tensors if learn else [p.item() for p in problem.params]
    want = wanted(True, cell.returned == "v", True, False, cell.returned == "h")
    values = dict(zip(names, numbers, strict=True))
    out = recurrent(moved[0], moved[1], moved[2], moved[3], moved[4], values, cell.spec, want, backend)
    s, state, v = (tensor for tensor in out if tensor is not None)
    inputs = [t for t in moved if t is not None] + (tensors if learn else [])
    got = torch.autograd.grad([s, v, state], inputs, [g.to(device) for g in problem.incoming])

    spikes = s.detach().double().cpu()
    rows = torch.stack([p.detach().reshape(-1) for p in tensors]) if learn else None
    current = _currents(tuple(moved), cell, rows, [] if learn else numbers, backend)
    leaves: Any = [None if t is None else t.double().requires_grad_() for t in problem[:5]]
    params = [p.double().requires_grad_() for p in problem.params]
    x, s0, state0, weight, bias = leaves
    with torch.no_grad():
        sums = x + _linear(spikes, s0, weight, bias)
        unit = (torch.finfo(cell.dtype).eps + 64 * torch.finfo(torch.float32).eps) * (sums.abs() + 1)
        off = ((current - sums).abs() / unit).max().item()
        wrong = _wrong_spikes(current, spikes, state0, params, cell.spec)
    oracle = reference.recurrent(x + (current - sums), s0, state0, weight, bias, params, cell.spec, known=spikes)
    potentials = getattr(oracle, cell.returned)
    exact = [t for t in leaves if t is not None] + (params if learn else [])
    expected = torch.autograd.grad(
        [oracle.s, potentials, oracle.state], exact, [g.double() for g in problem.incoming], materialize_grads=True
    )
    expected = tuple(b.reshape(a.shape) for a, b in zip(got, expected, strict=True))
    # x, s0, state; then weight, bias; then the parameters, measured together, for one of them may cancel.
    few = sum(t is not None for t in problem[:3])
    many = sum(t is not None for t in problem[:5])
    learned = [relative(torch.stack(got[many:]), torch.stack(expected[many:]))] if learn else []
    return RecurrentErrors(
        spikes=wrong,
        current=worst(off),
        output=worst(relative(v, potentials.detach()), relative(state, oracle.state.detach())),
        gradient=worst(*map(relative, got[:few], expected[:few])),
        parameter=worst(*map(relative, got[few:many], expected[few:many]), *learned),
    )
