"""BatchNorm + LIF (+ residual) as one op: y [T, B, C, ...] -> spikes, nothing saved but y and two numbers a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, named
from trtkern.backends.base import Finish
from trtkern.ops import _norm, _tangent, checks, layout
from trtkern.ops._beneath import transformed
from trtkern.ops._call import NEED_COEF, NEED_PARAMS, NEED_SUMS, NEED_V0, NEED_X, NEED_Y, WANT_EDGES, WANT_H, Call
from trtkern.ops._known import known, recall, remember
from trtkern.ops._library import (
    alone,
    apply,
    define,
    differentiated,
    keep_for_both,
    needs_grad,
    once,
    pushed,
    refuse_mapped,
    refuse_second_derivative,
)  # fmt: skip
from trtkern.ops._norm import OP, BatchNorm, Statistics
from trtkern.ops._room import finished
from trtkern.ops._saved import Layout, kept
from trtkern.ops.checks import Number
from trtkern.ops.lif import (
    LIFOutput,
    allocate,
    from_trace,
    given,
    inputs_of,
    lif_backward,
    lif_forward,
    perform,
    wanted_grads,
)
from trtkern.ops.lif import returned as as_output
from trtkern.ops.parameters import firing, reference_rows, scalars, stack, state_dtype
from trtkern.ops.spikes import Spikes, current, unpack
from trtkern.spec import LIFSpec


class Source(NamedTuple):
    """What y was made from, to make it again in the backward pass instead of keeping it."""

    make: Callable[..., Tensor]
    """y from ``tensors``; it holds no tensor itself."""
    tensors: tuple[Tensor | None, ...]
    """What is kept in place of y."""


class Neuron(NamedTuple):
    """How the neurons behind the normalisation behave, as ``trtkern.ops.lif`` takes it."""

    values: dict[str, Number]
    """Its parameters by name, at least those of ``spec.row.params``."""
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

    An error of any check leaves the running statistics where they were: they move behind the last one.
    """
    if isinstance(residual, Spikes):
        residual = current(residual)
    values = {name: neuron.values[name] for name in neuron.spec.row.params}
    numbers = (neuron.spec.token, neuron.backend, neuron.pool, channel_dim, neuron.fire_on_equal, type(residual))
    held = (*norm[:5], v0, neuron.flag, *values.values())
    around = residual if isinstance(residual, Spikes) else (residual,)
    call = known((*numbers, norm.batch_statistics, norm.group is None), (y, *around, *held))
    chosen = recall(call)
    new = chosen is None
    if chosen is None:
        check(y, norm, residual, v0, neuron.pool, channel_dim, neuron.spec.row.states)
        checks.flag(OP, neuron.flag, y)
        checks.parameters(OP, values)
        chosen = choose(neuron.backend, OP, y.device.type, y.dtype, neuron.spec.token)
    axis = channel_dim % y.dim()
    # Autocast leaves y in half precision beside a residual in float32; its gradient goes back through the cast.
    if isinstance(residual, Spikes):
        if residual.spikes.dtype != y.dtype:
            residual = residual._replace(spikes=residual.spikes.to(y.dtype))
    elif residual is not None and residual.dtype != y.dtype:
        residual = residual.to(y.dtype)

    neuron = neuron._replace(values=firing(OP, values, neuron.fire_on_equal, y))
    statistics: Statistics | None = None

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        nonlocal statistics
        settled = neuron._replace(want=want, flag=flag, backend=chosen)
        if chosen == "reference":
            output, statistics = _reference(y, norm, settled, residual, v0, axis)
        else:
            output, statistics = _fused(y, norm, settled, residual, v0, axis, source, call is not None)
        return output

    before = _norm.copies(norm) if checks.debugging() else None
    try:
        output = perform(OP, y, neuron.want, neuron.flag, run)
    except RuntimeError:
        _norm.put_back(norm, before)
        raise
    if statistics is not None:
        _norm.update(norm, *statistics)
    if new:
        remember(call, chosen)
    return output


def check(
    y: Tensor,
    norm: BatchNorm,
    residual: Tensor | Spikes | None,
    v0: Tensor | None,
    pool: bool,
    channel_dim: int,
    states: Sequence[str] = ("v",),
) -> int:
    """Everything that can be wrong with the inputs, before anything runs; returns the axis of the channels."""
    checks.sequence(OP, y)
    axis = checks.axis(OP, "channel_dim", channel_dim, y)
    if axis == 0:
        raise ValueError(f"{OP}: expected channel_dim to differ from the time axis, got the time axis for both")
    channels = y.shape[axis]
    for name, tensor in norm._asdict().items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            continue
        checks.plain(OP, name, tensor)
        if tensor.numel() != channels:
            raise ValueError(
                f"{OP}: expected y with {tensor.numel()} channels (num_features), got {channels} on axis {axis} of "
                f"{checks.describe(y)}; check num_features and channel_dim"
            )
        if tensor.device != y.device:
            raise ValueError(
                f"{OP}: expected {name} on {y.device} like y, got {checks.describe(tensor)}; move the layer with "
                "layer.to(y.device)"
            )
    if norm.batch_statistics and norm.group is None and y.numel() <= channels:
        raise ValueError(
            f"{OP}: expected more than 1 value per channel when training, got {checks.describe(y)}; use a larger batch "
            "or layer.eval()"
        )
    if not norm.batch_statistics and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{OP}: expected running statistics to normalise with, got none; pass batch_statistics")
    dense = residual.spikes if isinstance(residual, Spikes) else residual
    if dense is not None:
        if not isinstance(dense, Tensor):
            raise TypeError(f"{OP}: expected a residual in {y.dtype} like y, got {checks.describe(dense)}")
        checks.plain(OP, "residual", dense)
        if dense.dtype not in checks.FLOATS or (dense.dtype == torch.float64) > (y.dtype == torch.float64):
            raise TypeError(
                f"{OP}: expected a residual in {y.dtype} like y, or in what it is cast from (float32, bfloat16, "
                f"float16), got {checks.describe(dense)}; convert it with residual.to(y.dtype)"
            )
        if dense.shape != y.shape or dense.device != y.device:
            raise ValueError(
                f"{OP}: expected a residual of shape {tuple(y.shape)} on {y.device} like y, got "
                f"{checks.describe(dense)}; project it with a convolution first"
            )
    if isinstance(residual, Spikes) and residual.pooled:
        raise ValueError(f"{OP}: expected the words of a residual to be its own, got those of what was pooled")
    checks.state(OP, v0, y, states)
    if pool and (y.dim() != 5 or axis != 2 or min(y.shape[-2:]) < 2):
        raise ValueError(
            f"{OP}: expected y as [T, B, C, H, W] with H and W of 2 or more to pool, got {checks.describe(y)} with "
            f"channels on axis {axis}; use pool=1"
        )
    if norm.batch_statistics and norm.group is not None:
        what = "statistics that processes share (sync=True)"
        refuse_mapped(OP, what, "construct the layer with sync=False, or call layer.eval()", y, dense)
    return axis


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
    mean, var = [t.double() for t in _norm.running(norm)] if found is None else found[:2]
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
    direct: bool,
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
    weight, bias = _together(norm.weight, norm.bias)
    tensors = (y, dense, v0, weight, bias, params)
    tracked = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    dual = not direct and pushed(OP, *tensors, *tracked[:2])
    # The kernels move the running statistics, but where torch.func would not see it, or their memory is not plain.
    mean, var, left = None, None, None
    apart = dual or (not direct and transformed()) or not _norm.in_place(norm)
    if not norm.batch_statistics:
        (mean, var), count = _norm.running(norm), 0
    elif norm.group is None and not apart:
        count = y.numel() // channels
        _norm.enough(count)
    else:
        mean, var, count = _norm.batch(y, norm, channels, inner, neuron.backend)
        left = (mean, var, count) if apart else None
    if apart or not norm.batch_statistics:
        tracked = (None, None, None)
    want = neuron.want
    differentiable = needs_grad(*tensors) if direct else differentiated(*tensors)
    if differentiable and y.shape[0] > neuron.spec.chunk:
        want += WANT_EDGES
    fixed = Fixed(
        tuple(scalars(neuron.values, params)), neuron.spec.token, axis, inner, inside, want, neuron.backend, count,
        norm.group, dual, channels, norm.eps, norm.momentum, direct,
    )  # fmt: skip
    run = Normed.forward
    if differentiable or dual:
        run = alone(Normed).apply if direct else partial(apply, Normed, OP)
    # Tangents need y in the forward pass, and what stands for it or for the residual is not theirs.
    again = (None,) if source is None or dual else (source.make, *source.tensors)
    words = None if dual else words
    s, v, v_final, _, packed, *_ = run(*tensors, mean, var, *tracked, words, neuron.flag, fixed, *again)
    if neuron.pool and not inside:
        s = reference.average_pool(s)
    return as_output(s, v_final, v, packed, want), left


def _together(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as a kernel reads them: dense, and of one type."""
    if weight is None or bias is None:
        return weight, bias
    return weight.contiguous(), (bias if bias.dtype == weight.dtype else bias.to(weight.dtype)).contiguous()


class Fixed(NamedTuple):
    """What the Function is told besides tensors."""

    scalars: tuple[float, ...]
    token: str
    axis: int
    inner: int
    pool: bool
    want: int
    backend: str
    samples: int
    """Numbers behind each mean; 0: it is a running one, to which no gradient flows."""
    group: Any
    dual: bool
    """Whether tangents may come."""
    channels: int
    eps: float
    momentum: float | None
    direct: bool
    """Nothing stands between the call and its kernel (``plain``)."""


class Normed(torch.autograd.Function):
    """``make`` and ``source`` are those of a ``Source``; without one, y is kept."""

    @staticmethod
    def forward(
        y, residual, v0, weight, bias, params, mean, var, running_mean, running_var, batches, words, flag, fixed,
        make=None, *source,
    ):  # fmt: skip
        held = (weight, bias, running_mean, running_var, batches)
        if mean is None:
            run = _forward.direct if fixed.direct else _forward
            return *run(
                y, v0, params, residual, *held, fixed.scalars, fixed.token, fixed.channels, fixed.inner, fixed.pool,
                fixed.eps, fixed.momentum, flag, fixed.want, fixed.backend,
            ), None  # fmt: skip
        numbers = (fixed.samples, fixed.eps, fixed.momentum, fixed.samples == 0, fixed.backend)
        finish = _norm.finish.direct if fixed.direct else _norm.finish
        affine, moments, coef = finish(mean, var, *held, *numbers)
        run = lif_forward.direct if fixed.direct else lif_forward
        return *run(
            y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool, flag, fixed.want,
            fixed.backend,
        ), affine, moments, coef  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        y, residual, v0, weight, bias, params, _, var, _, _, _, words, _, ctx.fixed, ctx.make, *source = inputs
        ctx.set_materialize_grads(False)
        if ctx.make is not None:
            ctx.y = Layout.of(y)
        # The words of a residual stand for it.
        kept_residual = residual if words is None else None
        kept_y = y if ctx.make is None else None
        # No gradient needs them.
        kept_bias, kept_var = (bias, var) if ctx.fixed.dual else (None, None)
        ctx.dtype = None if weight is None else weight.dtype
        keep_for_both(
            ctx, output[3:],
            kept_y, kept_residual, v0, weight if ctx.fixed.dual else None, kept_bias, params, kept_var, words,
            output[3], *output[5:], *source,
        )  # fmt: skip

    @staticmethod
    def tangents(ctx: Any, saved: tuple, *tangents: Tensor | None) -> tuple:
        y, residual, v0, weight, bias, params, var, _, edges, affine, moments, coef, *_ = saved
        d_y, d_residual, d_v0, d_weight, d_bias, d_params, d_mean, d_var, *_ = tangents
        fixed, (mean, rstd) = ctx.fixed, moments.unbind(0)
        d_mean = None if d_mean is None else d_mean.double()
        if d_var is not None:
            rstd = rstd if fixed.samples else (var.double() + fixed.eps).rsqrt()
            d_var = -0.5 * rstd**3 * d_var.double()
        x, d_x = _tangent.normalised(
            _tangent.Normed(y, residual, weight, bias, mean, rstd),
            _tangent.Normed(d_y, d_residual, d_weight, d_bias, d_mean, d_var),
            fixed.axis,
            fixed.samples,
            fixed.group,
        )
        call = Call(y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool)
        inputs, d = _tangent.Inputs(x, v0, params), _tangent.Inputs(d_x, d_v0, d_params)
        found = _tangent.outputs(call, inputs, d, edges, fixed.axis, fixed.want, fixed.backend)
        return *found, torch.zeros_like(affine), torch.zeros_like(moments), torch.zeros_like(coef)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        y, residual, v0, _, _, params, _, words, edges, affine, moments, coef, *source = kept(ctx)
        if ctx.make is not None:
            y = ctx.y.restore(ctx.make(*source))
        if words is not None:
            residual = unpack(words, y.shape[0], dtype=y.dtype)
        gs, gv, gv_final = wanted_grads(grads, ctx.fixed.want)
        needs = tuple(ctx.needs_input_grad[:6])
        told = (gs, gv, gv_final, y, residual, v0, params, edges, affine, moments, coef, ctx.fixed, ctx.dtype, needs)
        if once(gs, gv, gv_final, y, residual, v0, params):
            found = NormedBackward.forward(*told, True)
        else:
            found = apply(NormedBackward, OP, *told, False)
        wanted = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
        return *wanted, *[None] * (9 + len(source))


class NormedBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, y, residual, v0, params, edges, affine, moments, coef, fixed, dtype, needs, direct):
        needs_y, needs_residual, needs_v0, needs_weight, needs_bias, needs_params = needs
        dtype = dtype if needs_weight or needs_bias else None
        training, shared = fixed.samples > 0, fixed.group is not None
        first = NEED_V0 * needs_v0 + NEED_PARAMS * needs_params + given(fixed.want)
        if dtype is not None or (training and needs_y):
            first += NEED_SUMS
        # The gradient of x is the residual's, and what that of y is made of: no second recomputation. Without one the
        # op takes both passes, unless other processes have to be asked between; with running statistics there is one.
        splits = needs_residual or (residual is not None and needs_y)
        once = not training and not splits
        both = training and needs_y and not splits and not shared
        if training and needs_y:
            first += NEED_COEF
        first += NEED_X if once or splits else NEED_Y if both else 0
        run = lif_backward.direct if direct else lif_backward
        given_to = (
            y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool, edges,
            gs, gv, gv_final,
        )  # fmt: skip
        finish = (None, 0, None) if shared else (moments, fixed.samples, dtype)
        gx, gv0, gparams, sums, made, gweight, gbias = run(
            *given_to, coef if once else None, *finish, first, fixed.backend
        )  # fmt: skip
        if shared and first & NEED_SUMS:
            total = _norm.summed_sums(sums, fixed.group)
            made, gweight, gbias = _norm.coefficients(
                total, sums, affine, moments, fixed.samples, dtype, fixed.backend
            )  # fmt: skip
        gy = gx
        if not once and not both:
            gy = None
            if needs_y and splits:
                gy = _norm.input_grad(gx, y, affine, made if training else coef, fixed.inner, fixed.backend)
            elif needs_y:
                gy = run(*given_to, made, None, 0, None, NEED_X + given(fixed.want), fixed.backend)[0]
        return gy, gx if splits else None, gv0, gweight, gbias, gparams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative(OP)


def _run_forward(
    y, v0, params, residual, weight, bias, running_mean, running_var, batches, scalars, spec, channels, inner, pool,
    eps, momentum, flag, want, backend,
):  # fmt: skip
    """Statistics, finish, the fused pass. The running statistics move when all is checked and has its memory."""
    made, room = allocate(y, spec, pool, want, flag), finished(y, channels, False)
    call = Call(y, v0, params, room.affine, residual, scalars, spec, inner, pool)
    inputs, run = inputs_of(call, bool(want & WANT_H)), named(backend).ops
    norm = Finish(weight, bias, running_mean, running_var, batches, eps, momentum, y.numel() // channels)
    # The statistics of T equal steps are those of one.
    run["batch_norm_lif_affine"](y[:1] if layout.is_static(y) else y, inner, norm, room)
    _norm.moved(running_mean, running_var, batches)
    run["lif_forward"](inputs, made)
    return *made[:4], made.packed, *room[:2]


def _run_forward_fake(
    y, v0, params, residual, weight, bias, running_mean, running_var, batches, scalars, spec, channels, inner, pool,
    eps, momentum, flag, want, backend,
):  # fmt: skip
    made = allocate(y, spec, pool, want)
    return *made[:4], made.packed, *finished(y, channels, False)[:2]


_forward = define(
    "batch_norm_lif_forward(Tensor y, Tensor? v0, Tensor? params, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float[] scalars, str spec, "
    "SymInt channels, SymInt inner, bool pool, float eps, float? momentum, Tensor(d!)? flag, int want, str backend) "
    "-> (Tensor s, Tensor v, Tensor v_final, Tensor edges, Tensor packed, Tensor affine, Tensor moments)",
    _run_forward,
    _run_forward_fake,
    None,
)
