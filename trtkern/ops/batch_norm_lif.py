"""BatchNorm + LIF (+ residual) as one op: y [T, B, C, ...] -> spikes, nothing saved but y and two numbers a channel."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose
from trtkern.backends.base import CHUNK
from trtkern.ops import _norm, checks, layout
from trtkern.ops._batch_norm_lif import OP, Fixed, Normed, Source
from trtkern.ops._library import apply, differentiated, refuse_duals
from trtkern.ops._norm import BatchNorm, Statistics
from trtkern.ops.checks import Number
from trtkern.ops.lif import WANT_EDGES, LIFOutput, from_trace, perform
from trtkern.ops.lif import returned as as_output
from trtkern.ops.parameters import firing, reference_rows, scalars, stack, state_dtype
from trtkern.ops.spikes import Spikes, current
from trtkern.spec import LIFSpec


class Neuron(NamedTuple):
    """How the neurons behind the normalisation behave, as ``trtkern.ops.lif`` takes it."""

    values: dict[str, Number]
    """decay, gain, bias, reset_amount, v_threshold, v_reset."""
    spec: LIFSpec
    pool: bool
    """2x2 averages of the spikes over the last two axes instead of the spikes."""
    want: int
    """Which outputs to make (``trtkern.ops.lif.wanted``)."""
    flag: Tensor | None
    """int32 [1], set to 1 if any potential is not finite."""
    backend: str
    fire_on_equal: bool = False
    """Fire where the potential equals the threshold, too."""


def batch_norm_lif(
    y: Tensor,
    norm: BatchNorm,
    neuron: Neuron,
    residual: Tensor | Spikes | None,
    v0: Tensor | None,
    channel_dim: int,
    source: Source | None = None,
) -> LIFOutput:
    """LIF neurons over x = weight * (y - mean) / sqrt(var + eps) + bias (+ residual).

    mean and var are those of each channel over time, batch and space (``norm.batch_statistics``), or the running ones.

    Args:
        y: [T, B, C, ...] in float32, bfloat16 or float16 (float64 runs on the reference), any strides; where its stride
            along time is 0 (a static image) it is read once, not T times, by the statistics.
        norm: the affine, the running statistics (updated in place) and their settings.
        neuron: what happens to x.
        residual: added to x, of y's shape, in y's dtype or cast to it: exact for spikes and small integers, else
            rounded where that is narrower; as ``Spikes`` its words are what is saved for the backward pass.
        v0: potential before the first step, [B, C, ...] float32; None is zero.
        channel_dim: the axis of y that the channels are on.
        source: y is not kept: the backward pass makes it again. The reference keeps it all the same.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do; nothing has been changed then.
        RuntimeError: the backend cannot be used on this machine.

    The running statistics move last, so that no error, of whatever kind, leaves them moved.
    """
    if isinstance(residual, Spikes):
        residual = current(residual)
    axis = _norm.check(y, norm, residual, v0, neuron.pool, channel_dim)
    chosen = choose(neuron.backend, OP, y.device.type, y.dtype, neuron.spec.token)
    checks.parameters(OP, neuron.values)
    # Autocast leaves y in half precision beside a residual in float32; its gradient goes back through the cast.
    if isinstance(residual, Spikes):
        residual = residual._replace(spikes=residual.spikes.to(y.dtype))
    elif residual is not None:
        residual = residual.to(y.dtype)

    neuron = neuron._replace(values=firing(OP, neuron.values, neuron.fire_on_equal, y))
    statistics: Statistics | None = None

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        nonlocal statistics
        settled = neuron._replace(want=want, flag=flag, backend=chosen)
        if chosen == "reference":
            output, statistics = _reference(y, norm, settled, residual, v0, axis)
        else:
            output, statistics = _fused(y, norm, settled, residual, v0, axis, source)
        return output

    output = perform(OP, y, neuron.want, neuron.flag, run)
    if statistics is not None:
        _norm.update(norm, *statistics)
    return output


def _reference(
    y: Tensor, norm: BatchNorm, neuron: Neuron, residual: Tensor | Spikes | None, v0: Tensor | None, axis: int
) -> tuple[LIFOutput, Statistics | None]:
    """The readable form, with autograd all the way; also the statistics, where they are those of the batch."""
    x, found = normalised(y, norm, residual, axis)
    dtype = state_dtype(y)
    rows = reference_rows(*stack(OP, y, neuron.values, axis, dtype), neuron.values, y)
    trace = reference.lif(x.to(dtype), v0, rows, neuron.spec)
    out = from_trace(trace, y, neuron.want, neuron.flag)
    if neuron.pool and out.spikes is not None:
        out = out._replace(spikes=reference.average_pool(out.spikes))
    return out, found


def normalised(
    y: Tensor, norm: BatchNorm, residual: Tensor | Spikes | None, axis: int
) -> tuple[Tensor, Statistics | None]:
    """What the neurons get, in float64 with autograd; also the statistics, where they are those of the batch."""
    # Once: two casts would add two gradients in y's own precision.
    wide = y.double()
    found = _norm.reference_statistics(wide, norm, axis) if norm.batch_statistics else None
    mean, var = _norm.running(norm) if found is None else found[:2]
    dense = residual.spikes if isinstance(residual, Spikes) else residual
    return reference.batch_norm(wide, mean, (var + norm.eps).rsqrt(), norm.weight, norm.bias, dense, axis), found


def _fused(
    y: Tensor,
    norm: BatchNorm,
    neuron: Neuron,
    residual: Tensor | Spikes | None,
    v0: Tensor | None,
    axis: int,
    source: Source | None,
) -> tuple[LIFOutput, Statistics | None]:
    # The last row or column of an odd image is dropped: torch pools the dense spikes then.
    inside = neuron.pool and y.shape[-1] % 2 == y.shape[-2] % 2 == 0
    y = layout.poolable(y) if inside else layout.dense(y)
    (y, inner), channels = layout.by_channel(y, axis), y.shape[axis]
    params, _ = stack(OP, y, neuron.values, axis, torch.float32)
    if params is not None:
        params = params.expand(-1, channels).contiguous()
    words = residual.words if isinstance(residual, Spikes) else None
    dense = residual.spikes if isinstance(residual, Spikes) else residual
    refuse_duals(OP, y, dense, v0, params, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    found = _norm.batch(y, norm, channels, inner, neuron.backend) if norm.batch_statistics else None
    mean, var, count = (*_norm.running(norm), 0) if found is None else found
    rstd = (var + norm.eps).rsqrt()
    want = neuron.want
    tensors = (y, dense, v0, norm.weight, norm.bias, params)
    differentiable = differentiated(*tensors)
    if differentiable and y.shape[0] > CHUNK:
        want += WANT_EDGES
    fixed = Fixed(
        tuple(scalars(neuron.values, params)), neuron.spec.token, inner, inside, want, neuron.backend, count, norm.group
    )
    run = partial(apply, Normed, OP) if differentiable else Normed.forward
    again = (None,) if source is None else (source.make, *source.tensors)
    s, v, v_final, _, packed, _ = run(*tensors, mean, rstd, words, neuron.flag, fixed, *again)
    if neuron.pool and not inside:
        s = reference.average_pool(s)
    return as_output(s, v_final, v, packed, want), found
