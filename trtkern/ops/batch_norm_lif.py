"""BatchNorm + LIF (+ residual) as one op: y [T, B, C, ...] -> spikes, nothing saved but y and two numbers a channel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, sizes
from trtkern.ops import _first_rows, _norm, _tangent, checks, layout
from trtkern.ops._beneath import transformed
from trtkern.ops._known import known, recall, remember
from trtkern.ops._lazy import Lazy, read
from trtkern.ops._library import (
    alone,
    apply,
    bare,
    differentiated,
    keep_for_both,
    needs_grad,
    once,
    pushed,
    refuse_second_derivative,
    undisturbed,
)  # fmt: skip
from trtkern.ops._norm import OP, BatchNorm, Statistics
from trtkern.ops._prepared import (
    IN_FORWARD_MODE,
    NEED_COEF,
    NEED_PARAMS,
    NEED_SUMS,
    NEED_V0,
    NEED_X,
    NEED_Y,
    WANT_LAZY,
    WANT_PACKED,
    Call,
    Prepared,
    lif_backward,
    lif_forward,
    outputs,
    refuse_lengths,
    wanted_with,
    with_spikes,
)
from trtkern.ops._saved import Layout, kept
from trtkern.ops.checks import Number
from trtkern.ops.lif import LIFOutput, from_trace, given, perform, shown, wanted_grads
from trtkern.ops.lif import returned as as_output
from trtkern.ops.parameters import firing, reference_rows, scalars, stack, state_dtype
from trtkern.ops.spikes import Spikes, current, lazily, listening, unpack
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
    lengths: Tensor | None = None,
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
        lengths: int32 or int64 [B], the steps of each sample (``trtkern.ops.lif.lif``); with running statistics only.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do; nothing has been changed then.
        RuntimeError: the backend cannot be used on this machine.

    An error of any check leaves the running statistics where they were: they move behind the last one.
    """
    if isinstance(residual, Spikes):
        # Dynamo loses the gradient of a tensor that a Function keeps words instead of: compiled code keeps it dense.
        words = residual.addends == 1 and not torch.compiler.is_compiling()
        residual = current(residual) if words else residual.spikes
    call = known_by(y, norm, neuron, residual, v0, channel_dim, lengths)
    ready = recall(call)
    new = ready is None
    if ready is None:
        ready = _checked(y, norm, neuron, residual, v0, channel_dim, lengths, call is not None)
    if lengths is not None:
        checks.length_values(OP, lengths, y)
    # Autocast leaves y in half precision beside a residual in float32; its gradient goes back through the cast.
    if isinstance(residual, Spikes):
        if residual.spikes.dtype != y.dtype:
            residual = residual._replace(spikes=residual.spikes.to(y.dtype))
    elif residual is not None and residual.dtype != y.dtype:
        residual = residual.to(y.dtype)

    statistics: Statistics | None = None

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        nonlocal statistics
        run = _reference if ready.backend == "reference" else _fused
        output, statistics = run(y, norm, neuron, residual, v0, ready, want, flag, source, lengths)
        return output

    if ready.laid and not (neuron.want & WANT_PACKED or listening()):
        output = run(neuron.want, neuron.flag)
    else:
        before = _norm.copies(norm) if checks.debugging() else None
        try:
            output = perform(OP, y, neuron.want, neuron.flag, run)
        except RuntimeError:
            _norm.put_back(norm, before)
            raise
    if statistics is not None:
        _norm.update(norm, *statistics)
    if new:
        remember(call, ready)
    return output


def known_by(
    y: Tensor, norm: BatchNorm, neuron: Neuron, residual: Tensor | Spikes | None, v0: Tensor | None, channel_dim: int,
    lengths: Tensor | None = None,
) -> Hashable:  # fmt: skip
    """By what a call is known, or None (``known``)."""
    settings = (
        neuron.spec.token, neuron.backend, neuron.pool, channel_dim, type(channel_dim), neuron.fire_on_equal,
        type(residual), norm.batch_statistics, norm.group is None, *neuron.values,
    )  # fmt: skip
    around = residual if isinstance(residual, Spikes) else (residual,)
    return known(settings, (y, *around, *norm[:5], v0, neuron.flag, lengths, *neuron.values.values()))


class _Ready(NamedTuple):
    """A call that was checked."""

    backend: str
    direct: bool
    """Nothing stands between the call and its kernel."""
    axis: int
    inner: int
    """The stride of the channels where ``laid``."""
    pool: bool
    """The kernel pools; else torch does, where it was asked for."""
    laid: bool
    """y is as the kernel reads it."""
    in_place: bool
    """The kernel can move the running statistics."""
    together: bool
    """It can read weight and bias as they are."""
    numbers: tuple[float, ...] | None
    """The neuron's parameters; None where one is a tensor."""
    fixed: dict[int, Fixed]
    """What the Function is told, by the outputs that it makes; filled as they are asked for."""


def _checked(
    y: Tensor, norm: BatchNorm, neuron: Neuron, residual: Tensor | Spikes | None, v0: Tensor | None, channel_dim: int,
    lengths: Tensor | None, direct: bool,
) -> _Ready:  # fmt: skip
    """The call, when all that its shapes, types, places and numbers say was checked."""
    spec = neuron.spec
    axis = _norm.check(y, norm, residual, v0, neuron.pool, channel_dim, spec.row.states)
    values = {name: neuron.values[name] for name in spec.row.params}
    checks.flag(OP, neuron.flag, y)
    checks.lengths(OP, lengths, y)
    if lengths is not None and norm.batch_statistics:
        raise ValueError(
            f"{OP}: expected running statistics with lengths, got those of the batch, in which what samples are padded "
            "with would count; call eval() (trtkern.nn.freeze_norms), or leave lengths out"
        )
    checks.parameters(OP, values, spec.row.ranges)
    measured = (0, 0, 0) if neuron.want & WANT_PACKED else sizes(y)
    chosen = choose(neuron.backend, OP, y.device.type, y.dtype, spec.token, measured, lengths is not None)
    numbers = scalars(OP, values, neuron.fire_on_equal, y)
    # The last row or column of an odd image is dropped: torch pools the dense spikes then.
    inside = neuron.pool and not (y.shape[-1] % 2 or y.shape[-2] % 2)
    laid = direct and not isinstance(y, Lazy) and _laid(y, inside, lengths) is y
    as_read = all(a is b for a, b in zip((norm.weight, norm.bias), _norm.together(norm.weight, norm.bias), strict=True))
    return _Ready(chosen, direct, axis, y.stride(axis), inside, laid, _norm.in_place(norm), as_read, numbers, {})


def _laid(y: Tensor, pool: bool, lengths: Tensor | None) -> Tensor:
    """y as the kernel reads it."""
    if pool:  # each image in one piece
        return layout.poolable(y)
    return layout.dense(y) if lengths is None else layout.by_sample(y)


def _parameters(y: Tensor, neuron: Neuron, axis: int, dtype: torch.dtype) -> tuple[dict[str, Number], Tensor | None]:
    """The neuron's, by name, and as one tensor [P, C] (or [P, 1]) where one of them is a tensor."""
    values = {name: neuron.values[name] for name in neuron.spec.row.params}
    own = firing(OP, values, neuron.fire_on_equal, y)
    return own, stack(OP, y, own, axis, dtype)[0]


def _reference(
    y: Tensor, norm: BatchNorm, neuron: Neuron, residual: Tensor | Spikes | None, v0: Tensor | None, ready: _Ready,
    want: int, flag: Tensor | None, source: Source | None, lengths: Tensor | None,
) -> tuple[LIFOutput, Statistics | None]:  # fmt: skip
    """The readable form, with autograd all the way; also the statistics, where they are those of the batch."""
    if lengths is not None:  # what is not finite behind the end is not multiplied with the zeros of a gradient
        y = torch.where(reference.live(y, lengths), y, torch.zeros_like(y))
    x, found = normalised(y, norm, residual, ready.axis)
    dtype = state_dtype(y)
    values, params = _parameters(y, neuron, ready.axis, dtype)
    rows = reference_rows(params, ready.axis, values, y, neuron.spec.row.ranges)
    trace = reference.lif(x.to(dtype), v0, rows, neuron.spec, lengths)
    out = from_trace(trace, y, want, flag)
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
    y: Tensor, norm: BatchNorm, neuron: Neuron, residual: Tensor | Spikes | None, v0: Tensor | None, ready: _Ready,
    want: int, flag: Tensor | None, source: Source | None, lengths: Tensor | None,
) -> tuple[LIFOutput, Statistics | None]:  # fmt: skip
    inner, channels = ready.inner, y.shape[ready.axis]
    if lengths is not None:
        lengths = lengths.to(torch.int32).contiguous()
    if not ready.laid:
        y, inner = layout.by_channel(_laid(y, ready.pool, lengths), ready.axis)
    params = None
    if ready.numbers is None:
        params = _parameters(y, neuron, ready.axis, torch.float32)[1]
        params = None if params is None else params.expand(-1, channels).contiguous()
    words = residual.words if isinstance(residual, Spikes) else None
    dense = residual.spikes if isinstance(residual, Spikes) else residual
    weight, bias = (norm.weight, norm.bias) if ready.together else _norm.together(norm.weight, norm.bias)
    tensors = (y, dense, v0, weight, bias, params)
    tracked = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    dual = not ready.direct and pushed(OP, *tensors, *tracked[:2])
    # The kernels move the running statistics, but where torch.func would not see it, their memory is not plain, or the
    # number of values is known on the device alone.
    mean, var, left = None, None, None
    apart = dual or (not ready.direct and transformed()) or not ready.in_place or norm.group is not None
    count = y.numel() // channels if norm.batch_statistics else 0
    if not norm.batch_statistics:
        mean, var = _norm.running(norm)
    elif apart:
        left = _norm.batch(y, norm, channels, inner, ready.backend)
        mean, var, _ = left
    else:
        _norm.enough(count)
    if apart or not norm.batch_statistics:
        tracked = (None, None, None)
    differentiable = needs_grad(*tensors) if ready.direct else differentiated(*tensors)
    asked = wanted_with(y, neuron.spec, want, differentiable)
    lazy = want & WANT_PACKED and neuron.pool == ready.pool and lazily(y, ready.backend)
    if lazy and (ready.direct or (undisturbed() and bare(t for t in tensors if not isinstance(t, Lazy)))):
        asked += WANT_LAZY
    fixed = ready.fixed.get(asked)
    # The settings of the norm are the caller's to change; all else that is fixed is part of what the call is known by.
    if fixed is None or fixed.eps != norm.eps or fixed.momentum != norm.momentum or count != fixed.samples:
        numbers, token = ready.numbers or (0.0,) * len(neuron.spec.row.params), neuron.spec.token
        prepared = Prepared(y, numbers, token, inner, ready.pool, ready.backend) if ready.laid else None
        fixed = Fixed(
            numbers, token, ready.axis, inner, ready.pool, asked, ready.backend, count, norm.group, dual, channels,
            norm.eps, norm.momentum, prepared,
        )  # fmt: skip
        if ready.laid and norm.group is None:
            ready.fixed[asked] = fixed
    # Tangents need y in the forward pass, and what stands for it or for the residual is not theirs.
    again = (None,) if source is None or dual else (source.make, *source.tensors)
    words = None if dual else words
    told = (*tensors, mean, var, *tracked, words, lengths, flag, fixed, *again)
    if ready.direct and differentiable:
        made = alone(Normed, shown).apply(*told)
    else:
        made = shown(apply(Normed, OP, *told) if differentiable or dual else Normed.forward(*told))
    s, v, v_final, packed = made
    if neuron.pool and not ready.pool:
        s = reference.average_pool(s)
    return as_output(s, v_final, v, packed, want), left


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
    """Numbers of this process behind each mean; 0: it is a running one, to which no gradient flows."""
    group: Any
    dual: bool
    """Whether tangents may come."""
    channels: int
    eps: float
    momentum: float | None
    prepared: Prepared | None
    """What runs the call where nothing stands between it and its kernel (``plain``)."""


class Normed(torch.autograd.Function):
    """``make`` and ``source`` are those of a ``Source``; without one, y is kept."""

    @staticmethod
    def forward(
        y, residual, v0, weight, bias, params, mean, var, running_mean, running_var, batches, words, lengths, flag,
        fixed, make=None, *source,
    ):  # fmt: skip
        held, prepared = (weight, bias, running_mean, running_var, batches), fixed.prepared
        residual = read(residual)
        told = (fixed.scalars, fixed.token, fixed.inner, fixed.pool)
        if mean is None:
            norm = (fixed.eps, fixed.momentum, fixed.channels)
            if prepared is not None:
                made = _norm.normed(prepared, y, v0, params, residual, *held, *norm, flag, fixed.want)
            else:
                made = _norm.forward(y, v0, params, residual, *held, *norm, *told, flag, fixed.want, fixed.backend)
            return *with_spikes(made, fixed.want, y, fixed.pool, prepared), None
        numbers = (fixed.samples, fixed.eps, fixed.momentum, fixed.samples == 0, fixed.backend)
        affine, moments, coef = _norm.finish(mean, var, *held, *numbers)
        if prepared is not None:
            made = outputs(prepared.forward(y, v0, params, affine, residual, lengths, flag, fixed.want))
        else:
            made = lif_forward(y, v0, params, affine, residual, lengths, *told, flag, fixed.want, fixed.backend)
        return *with_spikes(made, fixed.want, y, fixed.pool, prepared), affine, moments, coef

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        y, residual, v0, weight, bias, params, _, var, _, _, _, words, lengths, _, fixed, ctx.make, *source = inputs
        ctx.fixed, ctx.first = fixed, _first_rows.recording
        ctx.set_materialize_grads(False)
        if ctx.make is not None:
            ctx.y = Layout.of(y)
        # The words of a residual stand for it.
        kept_residual = residual if words is None else None
        kept_y = y if ctx.make is None else None
        # No gradient needs them.
        kept_weight, kept_bias, kept_var = (weight, bias, var) if fixed.dual else (None, None, None)
        there = bias if weight is None else weight
        ctx.dtype = None if there is None else there.dtype
        keep_for_both(
            ctx, output[3:],
            kept_y, kept_residual, v0, kept_weight, kept_bias, params, kept_var, words, lengths, output[3],
            *output[5:], *source,
            held=None if fixed.prepared is None or ctx.make is not None else fixed.prepared.held,
        )  # fmt: skip

    @staticmethod
    def tangents(ctx: Any, saved: tuple, *tangents: Tensor | None) -> tuple:
        y, residual, v0, weight, bias, params, var, _, lengths, edges, affine, moments, coef, *_ = saved
        refuse_lengths(OP, lengths, IN_FORWARD_MODE)
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
        call = Call(y, v0, params, affine, residual, None, fixed.scalars, fixed.token, fixed.inner, fixed.pool)
        inputs, d = _tangent.Inputs(x, v0, params), _tangent.Inputs(d_x, d_v0, d_params)
        found = _tangent.outputs(call, inputs, d, edges, fixed.axis, fixed.want, fixed.backend)
        return *found, torch.zeros_like(affine), torch.zeros_like(moments), torch.zeros_like(coef)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        y, residual, v0, _, _, params, _, words, lengths, edges, affine, moments, coef, *source = kept(ctx)
        if ctx.make is not None:
            y = ctx.y.restore(ctx.make(*source))
        residual = read(residual) if words is None else unpack(words, y.shape[0], dtype=y.dtype)
        gs, gv, gv_final = wanted_grads(grads, ctx.fixed.want)
        needs = tuple(ctx.needs_input_grad[:6])
        inputs = (y, residual, v0, params, lengths, edges, affine, moments, coef)
        told = (gs, gv, gv_final, *inputs, ctx.fixed, ctx.dtype, needs)
        if once(gs, gv, gv_final, y, residual, v0, params):
            found = NormedBackward.forward(*told, ctx)
        else:
            found = apply(NormedBackward, OP, *told, None)
        wanted = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
        return *wanted, *[None] * (10 + len(source))


class NormedBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        gs, gv, gv_final, y, residual, v0, params, lengths, edges, affine, moments, coef, fixed, dtype, needs, owner
    ):  # fmt: skip
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
        finish = (None, 0, None) if shared else (moments, fixed.samples, dtype)

        def run(coef: Tensor | None, *finish_and_needs: Any) -> tuple:
            given_to, incoming = (y, v0, params, affine, residual, lengths), (edges, gs, gv, gv_final, coef)
            if owner is not None and fixed.prepared is not None:
                # The statistics of a batch tie all steps to each other.
                return fixed.prepared.backward(
                    *given_to, *incoming, *finish_and_needs, None if training else owner
                )  # fmt: skip
            told = (fixed.scalars, fixed.token, fixed.inner, fixed.pool)
            return lif_backward(*given_to, *told, *incoming, *finish_and_needs, fixed.backend)

        gx, gv0, gparams, sums, made, gweight, gbias = run(coef if once else None, *finish, first)
        if shared and first & NEED_SUMS:
            total = _norm.summed(sums, fixed.samples, fixed.group)
            made, gweight, gbias = _norm.coefficients(
                total, sums, affine, moments, fixed.samples, dtype, fixed.backend
            )  # fmt: skip
        gy = gx
        if not once and not both:
            gy = None
            if needs_y and splits and lengths is not None:  # y behind the end is not for torch to multiply with 0
                gy = run(coef, None, 0, None, NEED_X + given(fixed.want))[0]
            elif needs_y and splits:
                gy = _norm.input_grad(gx, y, affine, made if training else coef, fixed.inner, fixed.backend)
            elif needs_y:
                gy = run(made, None, 0, None, NEED_X + given(fixed.want))[0]
        return gy, gx if splits else None, gv0, gweight, gbias, gparams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative(OP)
