"""Forward mode of the fused ops: tangents of the outputs from those of the inputs, in torch operations.

It has no kernel of its own, and costs what a plain loop over time costs. The spikes are those of the kernel: a
potential that is computed again, and rounded otherwise, moves no spike.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference, tangent
from trtkern._torch import outside
from trtkern.expressions import rebind
from trtkern.neurons import Neuron
from trtkern.ops import _norm
from trtkern.ops._library import differentiated
from trtkern.ops._prepared import WANT_H, WANT_PACKED, WANT_SPIKES, WANT_STATE, WANT_V, Call
from trtkern.spec import LIFSpec


class Inputs(NamedTuple):
    """What the neurons get, or the tangents of that; a tangent that is None is zero."""

    x: Tensor | None
    """[T, ...], the input current."""
    v0: Tensor | None
    """The state before the first step, [...] or [S, ...]."""
    params: Tensor | None
    """[P, C]; None: they are numbers."""


class Tangents(NamedTuple):
    """Those of what an op returns, as float32."""

    s: Tensor
    v: Tensor
    """Of h, where ``before``."""
    state: Tensor


@cache
def _functions(spec: LIFSpec, of_x: bool, of_p: bool) -> tuple[Any, ...]:
    made = tangent.functions(spec.neuron, spec.reset, spec.detach_reset, of_x, of_p)
    return tuple(rebind(function, reference.NAMES) for function in made)


def outputs(call: Call, inputs: Inputs, d: Inputs, edges: Tensor, axis: int | None, want: int, backend: str) -> tuple:
    """The tangents of the five outputs of ``lif_forward``; empty of what was not made.

    Args:
        call: of the kernel.
        inputs, d: what it makes of that for the neurons, and the tangents.
        edges: that output.
        axis: of the channels.
    """
    constants = (t.detach() if isinstance(t, Tensor) else t for t in call._replace(pool=False))
    s = torch.ops.trtkern.lif_forward(*constants, None, WANT_SPIKES, backend)[0]
    spec, dtype, none = LIFSpec.from_token(call.token), call.x.dtype, call.x.new_empty(0)
    found = neuron(inputs, d, s, tuple(call.scalars), spec, axis, bool(want & WANT_H))
    d_s = reference.average_pool(found.s) if call.pool else found.s
    return (
        d_s.to(dtype) if want & WANT_SPIKES else none,
        found.v.to(dtype) if want & (WANT_V | WANT_H) else none,
        found.state if want & WANT_STATE else none,
        torch.zeros_like(edges),
        None if want & WANT_PACKED else none,
    )


def neuron(
    inputs: Inputs, d: Inputs, s: Tensor, scalars: tuple[float, ...], spec: LIFSpec, axis: int | None, before: bool
) -> Tangents:
    """Charge, fire and settle step by step (``trtkern.neurons``), and beside them their tangents.

    Args:
        inputs: of the op; x is a tensor.
        d: their tangents.
        s: [T, ...], the spikes that the kernel made of the inputs.
        scalars: the parameters, where they are numbers.
        spec, axis: the neuron, and the axis of x that per-channel parameters belong to.
        before: whether the potential that comes back is h.
    """
    x, row = inputs.x, spec.row
    assert x is not None
    surrogate: Any = spec.surrogate, spec.alpha
    charge, fire, settle = reference.steps(spec.neuron, spec.reset)
    d_charge, d_fire, d_settle = _functions(spec, d.x is not None, d.params is not None)
    p, d_p = _rows(inputs.params, axis, x) or scalars, _rows(d.params, axis, x)
    state, d_state = _state(inputs.v0, x, row), _state(d.v0, x, row)
    # A tangent is differentiated once more, by what made the spikes too, only where something asks for it.
    again = _again(*inputs) and not spec.detach_reset
    spikes, potentials = [], []
    steps = zip(x.unbind(0), s.unbind(0), [None] * len(x) if d.x is None else d.x.unbind(0), strict=True)
    for current, fired, d_current in steps:
        current = current.float()
        trace = charge(current, state, p)
        d_trace = d_charge(current, state, p, d_current if d_current is None else d_current.float(), d_state, d_p)
        potential, threshold = fire(trace, p)
        u = potential - threshold
        slope = reference.surrogate_derivative(u, *surrogate)
        (d_s,) = d_fire(trace, p, slope, d_trace, d_p)
        fired = reference.spike(u, spec, fired.float()) if again else fired > 0
        state, d_state = settle(trace, fired, p), d_settle(trace, fired, p, d_trace, d_s, d_p)
        spikes.append(d_s)
        potentials.append(d_trace[row.potential] if before else d_state[row.membrane])
    last = d_state[0] if len(row.states) == 1 else torch.stack(d_state)
    return Tangents(torch.stack(spikes), torch.stack(potentials), last)


def _again(*tensors: Tensor | None) -> bool:
    """Whether tangents may be differentiated themselves, with what they are made of."""
    return differentiated(*tensors) or outside()


def _rows(params: Tensor | None, axis: int | None, x: Tensor) -> tuple[Tensor, ...]:
    """Parameters [P, C] one by one, as they broadcast with x[0]."""
    if params is None:
        return ()
    trailing = 0 if axis is None else x.dim() - axis - 1
    return params.reshape(params.shape[0], -1, *[1] * trailing).unbind(0)


def _state(v0: Tensor | None, x: Tensor, row: Neuron) -> tuple[Tensor, ...]:
    count = len(row.states)
    if v0 is None:
        return (torch.zeros_like(x[0], dtype=torch.float32),) * count
    return (v0.float(),) if count == 1 else v0.float().unbind(0)


class Normed(NamedTuple):
    """What the normalisation in front reads, or the tangents of that; a tangent that is None is zero."""

    y: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    """mean, rstd: [C] float64."""


def normalised(inputs: Normed, d: Normed, axis: int, samples: int, group: Any) -> tuple[Tensor, Tensor | None]:
    """x = weight * (y - mean) * rstd + bias (+ residual) in float32, and its tangent.

    Args:
        inputs: y, mean and rstd are tensors.
        d: their tangents; with batch statistics those of mean and rstd follow from that of y.
        axis: of y, the channels.
        samples: numbers of this process behind each mean; 0: a running one.
        group: the processes that share the statistics; None: this one alone.
    """
    y, residual, weight, bias, mean, rstd = inputs
    assert y is not None and mean is not None and rstd is not None
    shape, others = [-1, *[1] * (y.dim() - axis - 1)], [a for a in range(y.dim()) if a != axis]

    def along(channels: Tensor) -> Tensor:
        return channels.float().view(shape)

    # Per-channel arithmetic is float64, and the center is the mean as float32 has it (``_norm.affine``).
    center = mean.detach().float()
    centered = y.float() - along(center)
    if samples and _again(y):
        mean, rstd = _norm.differentiable(y, rstd, axis, group)
    offset = mean - center
    scale = rstd if weight is None else rstd * weight
    x = centered * along(scale) + along(-offset * scale if bias is None else bias - offset * scale)
    d_mean, d_rstd = d.mean, d.rstd
    if samples and d.y is not None:
        sums = torch.stack([each.sum(others, dtype=torch.float64) for each in (d.y, d.y * centered)])
        if group is not None:
            sums = _norm.summed(sums, samples, group)
        d_mean = sums[0] / samples
        d_rstd = -(rstd**3) * (sums[1] - offset * sums[0]) / samples
    d_scale = _plus(_times(d_rstd, weight), _times(d.weight, rstd))
    d_shift = _plus(d.bias, _times(d_mean, -scale), _times(d_scale, -offset))
    d_x = _plus(
        None if d.y is None else d.y.float() * along(scale),
        None if d_scale is None else centered * along(d_scale),
        None if d_shift is None else along(d_shift).expand(y.shape),
        None if d.residual is None else d.residual.float(),
    )
    return (x if residual is None else x + residual.float()), d_x


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a * b


def _plus(*terms: Tensor | None) -> Tensor | None:
    there = [term for term in terms if term is not None]
    return sum(there[1:], there[0]) if there else None
