"""The LIF op: x [T, ...] -> spikes, one kernel a direction, nothing saved but the input.

The public function and its autograd. The private ops beneath, which BatchNorm + LIF calls too, are in ``_prepared``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, sizes
from trtkern.backends.base import PARAMS
from trtkern.ops import _first_rows, _tangent, checks, layout, spikes
from trtkern.ops._beneath import beneath
from trtkern.ops._known import known, recall, remember
from trtkern.ops._lazy import Lazy
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
)
from trtkern.ops._prepared import (
    GIVEN_H,
    IN_FORWARD_MODE,
    NEED_PARAMS,
    NEED_V0,
    NEED_X,
    WANT_H,
    WANT_LAZY,
    WANT_PACKED,
    WANT_SPIKES,
    WANT_STATE,
    WANT_V,
    Call,
    Channels,
    Prepared,
    lif_backward,
    lif_forward,
    outputs,
    refuse_lengths,
    wanted_with,
    with_spikes,
)
from trtkern.ops._saved import kept
from trtkern.ops.checks import Number
from trtkern.ops.parameters import firing, reference_rows, scalars, stack, state_dtype
from trtkern.spec import LIFSpec


class LIFOutput(NamedTuple):
    """What ``lif`` returns; what was not asked for is None."""

    spikes: Tensor | None
    """[T, ...] in x's dtype."""
    state: Tensor | None
    """[...] float32: v after the last step; of a neuron with several states [S, ...], all of them."""
    v: Tensor | None
    """[T, ...] in x's dtype: v after the reset of every step."""
    packed: Tensor | None
    """[ceil(T / 8), ...] uint8: bit t % 8 of plane t // 8 is the spike of step t."""
    h: Tensor | None = None
    """[T, ...] in x's dtype: h before the firing and the reset of every step."""


def lif(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    decay: Number = 0.5,
    gain: Number = 1.0,
    bias: Number = 0.0,
    reset_amount: Number | None = None,
    v_threshold: Number = 1.0,
    v_reset: Number = 0.0,
    spec: LIFSpec | None = None,
    backend: str = "auto",
    channel_dim: int = 2,
    return_spikes: bool = True,
    return_state: bool = False,
    return_v: bool = False,
    return_packed: bool = False,
    return_h: bool = False,
    fire_on_equal: bool = False,
    flag: Tensor | None = None,
    lengths: Tensor | None = None,
) -> LIFOutput:
    """Leaky integrate-and-fire over all T steps at once.

    h[t] = decay * v[t-1] + gain * x[t] + bias; s[t] = 1 if h[t] > v_threshold else 0; then v[t] = v_reset where it
    fired (hard reset), h[t] - reset_amount * s[t] (soft) or h[t] (none). Spikes carry the surrogate derivative of
    ``spec``; the reset carries it too unless ``spec.detach_reset``. With decay = 1/tau this is the neuron of TRT
    (arXiv 2506.19256); ``docs/equations.md`` lists the values for other libraries.

    Args:
        x: input current [T, ...] in float32, bfloat16 or float16 (float64 runs on the reference), any strides.
        v0: potential before the first step, [...] float32; None is zero.
        decay, gain, bias, reset_amount, v_threshold, v_reset: a number, or a tensor of shape [] or [C], with gradient.
            ``reset_amount=None`` is the threshold.
        spec: reset, surrogate, alpha, detach_reset; default: hard reset and the triangle.
        backend: "auto", or one of ``trtkern.backends.NAMES``; a named backend runs or raises.
        channel_dim: the axis of x that per-channel tensors belong to.
        return_spikes, return_state, return_v, return_packed, return_h: which outputs to make; v or h, not both.
        fire_on_equal: fire where h[t] >= v_threshold, which must then be above 0.
        flag: int32 [1]; set to 1 if any potential is not finite, in float32 or as it is returned; never cleared.
        lengths: int32 or int64 [B] for x [T, B, ...]: the steps of each sample, 0 to T. Behind its end nothing is read
            of a sample; its outputs are 0 there, and its state stays as it is. None: each has T.

    Returns:
        LIFOutput(spikes, state, v, packed, h); gradients flow through all but packed. So do tangents (forward mode:
        ``torch.func.jvp``, ``jacfwd``), for which there is no kernel: torch operations make them step by step.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
        RuntimeError: the backend cannot be used on this machine.
    """
    numbers = (decay, gain, bias, v_threshold if reset_amount is None else reset_amount, v_threshold, v_reset)
    values = dict(zip(PARAMS, numbers, strict=True))
    want = wanted(return_spikes, return_v, return_state, return_packed, return_h)
    return neuron(x, v0, values, spec or LIFSpec(), want, backend, channel_dim, fire_on_equal, flag, lengths)


def neuron(
    x: Tensor,
    state: Tensor | None,
    values: dict[str, Number],
    spec: LIFSpec,
    want: int,
    backend: str = "auto",
    channel_dim: int = 2,
    fire_on_equal: bool = False,
    flag: Tensor | None = None,
    lengths: Tensor | None = None,
) -> LIFOutput:
    """The neuron that ``spec`` names (``trtkern.neurons``) over all T steps at once: what ``lif`` is for LIF.

    Args:
        x, backend, channel_dim, fire_on_equal, flag, lengths: as in ``lif``. A DTensor that is cut along an axis of the
            neurons: each process runs its own, and what comes out is cut alike.
        state: before the first step, [...] float32, of a neuron with several states [S, ...]; None is zero.
        values: its parameters by name; a number, or a tensor of shape [] or [C], with gradient.
        want: which outputs to make (``wanted``).
    """
    call = known_by(x, state, values, spec, want, backend, channel_dim, fire_on_equal, flag, lengths)
    if call is None and checks.is_distributed(x):

        def own(x: Tensor, state: Tensor | None, values: dict[str, Number], lengths: Tensor | None) -> LIFOutput:
            return neuron(x, state, values, spec, want, backend, channel_dim, fire_on_equal, flag, lengths)

        shards, states = import_module("trtkern.ops._shards"), len(spec.row.states)
        made: LIFOutput = shards.neuron(spec.op, x, state, values, states, channel_dim, want, lengths, own)
        return made
    ready = recall(call)
    new = ready is None
    if ready is None:
        ready = _checked(
            x, state, values, spec, want, backend, channel_dim, fire_on_equal, flag, lengths, call is not None
        )  # fmt: skip
    if lengths is not None:
        checks.length_values(spec.op, lengths, x)
    if new:
        remember(call, ready)

    if ready.numbers is not None and ready.plain and not (want & WANT_PACKED or spikes.listening()):
        return _fused(x, state, None, None, lengths, spec, ready, want, flag)

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        op = spec.op
        own = firing(op, {name: values[name] for name in spec.row.params}, fire_on_equal, x)
        if ready.backend == "reference":
            dtype = state_dtype(x)
            rows = reference_rows(*stack(op, x, own, channel_dim, dtype), own, x, spec.row.ranges)
            return from_trace(reference.lif(x.to(dtype), state, rows, spec, lengths), x, want, flag)
        params, axis = stack(op, x, own, channel_dim, torch.float32)
        laid = x if ready.plain else layout.dense(x) if lengths is None else layout.by_sample(x)
        return _fused(laid, state, params, axis, lengths, spec, ready, want, flag)

    return perform(spec.op, x, want, flag, run)


def known_by(
    x: Tensor, state: Tensor | None, values: dict[str, Number], spec: LIFSpec, want: int, backend: str,
    channel_dim: int, fire_on_equal: bool, flag: Tensor | None, lengths: Tensor | None = None,
) -> Hashable:  # fmt: skip
    """By what a call of ``neuron`` is known, or None (``known``)."""
    settings = (spec.token, backend, channel_dim, type(channel_dim), want, fire_on_equal, *values)
    return known(settings, (x, state, flag, lengths, *values.values()))


class _Fixed(NamedTuple):
    """What the Function is told besides tensors."""

    scalars: tuple[float, ...]
    token: str
    channels: Channels
    want: int
    backend: str
    prepared: Prepared | None
    """What runs the call where nothing stands between it and its kernel (``plain``)."""


class _Ready(NamedTuple):
    """A call that was checked."""

    backend: str
    plain: bool
    """Nothing stands between the call and its kernel, and x is as the kernel reads it."""
    numbers: tuple[float, ...] | None
    """The neuron's parameters; None where one is a tensor."""
    fixed: dict[int, _Fixed]
    """What its Function is told, by the outputs that it makes; filled as they are asked for."""


def _checked(
    x: Tensor, state: Tensor | None, values: dict[str, Number], spec: LIFSpec, want: int, backend: str,
    channel_dim: int, fire_on_equal: bool, flag: Tensor | None, lengths: Tensor | None, direct: bool,
) -> _Ready:  # fmt: skip
    """The call, when all that its shapes, types, places and numbers say was checked."""
    op, row = spec.op, spec.row
    checks.sequence(op, x)
    checks.state(op, state, x, row.states)
    checks.flag(op, flag, x)
    checks.lengths(op, lengths, x)
    values = {name: values[name] for name in row.params}
    checks.parameters(op, values, row.ranges)
    numbers = scalars(op, values, fire_on_equal, x)
    measured = (0, 0, 0) if want & WANT_PACKED else sizes(x)
    chosen = choose(backend, "lif", x.device.type, x.dtype, spec.token, measured, lengths is not None)
    as_read = not isinstance(x, Lazy) and (layout.dense(x) if lengths is None else layout.by_sample(x)) is x
    return _Ready(chosen, direct and chosen != "reference" and as_read, numbers, {})


def perform(
    op: str, x: Tensor, want: int, flag: Tensor | None, run: Callable[[int, Tensor | None], LIFOutput]
) -> LIFOutput:
    """run(want, flag), with the words for whoever listens; under ``trtkern.debug()`` an error if the flag rises."""
    heard = bool(want & WANT_SPIKES) and spikes.listening()
    # A flag of its own: the caller's may be set already, by another call.
    watched = torch.zeros(1, dtype=torch.int32, device=x.device) if checks.debugging() else flag
    output = run(want | WANT_PACKED if heard else want, watched)
    if watched is not flag and watched is not None and watched.item():
        if flag is not None:
            flag.fill_(1)
        raise RuntimeError(f"{op}: expected finite potentials, got NaN or Inf from {checks.describe(x)}")
    if output.spikes is not None and output.packed is not None:
        spikes.remember(output.spikes)
    if heard and output.spikes is not None and output.packed is not None:
        spikes.announce(output.spikes, output.packed)
        output = output if want & WANT_PACKED else output._replace(packed=None)
    return output


def _fused(
    x: Tensor,
    v0: Tensor | None,
    params: Tensor | None,
    axis: int | None,
    lengths: Tensor | None,
    spec: LIFSpec,
    ready: _Ready,
    want: int,
    flag: Tensor | None,
) -> LIFOutput:
    x, inner = (x, 1) if axis is None else layout.by_channel(x, axis)
    if lengths is not None:
        lengths = lengths.to(torch.int32).contiguous()
    differentiable = needs_grad(x, v0, params) if ready.plain else differentiated(x, v0, params)
    dual = not ready.plain and pushed(spec.op, x, v0, params)
    made = wanted_with(x, spec, want, differentiable)
    lazy = want & WANT_PACKED and want & WANT_SPIKES and spikes.lazily(x, ready.backend)
    if lazy and (ready.plain or (undisturbed() and bare((x, v0, params)))):
        made += WANT_LAZY
    fixed = ready.fixed.get(made)
    if fixed is None:
        backend, numbers = ready.backend, ready.numbers or (0.0,) * len(spec.row.params)
        prepared = Prepared(x, numbers, spec.token, inner, False, backend) if ready.plain else None
        fixed = _Fixed(numbers, spec.token, Channels(axis, inner), made, backend, prepared)
        if ready.plain:
            ready.fixed[made] = fixed
    if ready.plain and differentiable:
        found = alone(_LIF, shown).apply(x, v0, params, lengths, flag, fixed)
    elif differentiable or dual:
        found = shown(apply(_LIF, "lif", x, v0, params, lengths, flag, fixed))
    else:
        found = shown(_LIF.forward(x, v0, params, lengths, flag, fixed))
    s, v, v_final, packed = found
    return returned(s, v_final, v, packed, want)


def wanted(spikes: bool, v: bool, state: bool, packed: bool, h: bool = False) -> int:
    """Which outputs, as one number.

    Raises:
        ValueError: v and h at once; the kernels write one of the two.
    """
    if v and h:
        raise ValueError(
            "lif: expected return_v or return_h, got both; ask for h, of which torch makes v: "
            "(1 - spikes) * h + spikes * v_reset after the hard reset, h - reset_amount * spikes after the soft one "
            "(with spikes.detach() for detach_reset)"
        )
    return WANT_SPIKES * spikes + WANT_V * v + WANT_STATE * state + WANT_PACKED * packed + WANT_H * h


def returned(spikes: Tensor, state: Tensor, v: Tensor, packed: Tensor | None, want: int) -> LIFOutput:
    """The outputs that were asked for, v being h where that was; None in place of the others."""
    return LIFOutput(
        spikes if want & WANT_SPIKES else None,
        state if want & WANT_STATE else None,
        v if want & WANT_V else None,
        packed if want & WANT_PACKED else None,
        v if want & WANT_H else None,
    )


def from_trace(trace: reference.Trace, x: Tensor, want: int, flag: Tensor | None) -> LIFOutput:
    """What the reference computed, in x's dtype, with the flag and the words that the kernels make on the way."""
    v = (trace.h if want & WANT_H else trace.v).to(x.dtype)
    if flag is not None:
        seen = [trace.h, *[trace.state] * bool(want & WANT_STATE), *[v] * bool(want & (WANT_V | WANT_H))]
        beneath(
            lambda flag, *seen: flag.bitwise_or_(
                torch.stack([~torch.isfinite(t).all() for t in seen]).any().to(flag.dtype)
            ),
            flag,
            *seen,
        )
    packed = reference.spikes_pack(trace.s) if want & WANT_PACKED else None
    return returned(trace.s.to(x.dtype), trace.state, v, packed, want)


def shown(made: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """s, v, v_final and the words, of what a Function makes: the rest is kept for its backward pass."""
    return made[0], made[1], made[2], made[4]


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(x, v0, params, lengths, flag, fixed):
        scalars, token, channels, want, backend, prepared = fixed
        if prepared is not None:
            made = outputs(prepared.forward(x, v0, params, None, None, lengths, flag, want))
        else:
            told = (scalars, token, channels.inner, False)
            made = lif_forward(x, v0, params, None, None, lengths, *told, flag, want, backend)
        return with_spikes(made, want, x, False, prepared)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, v0, params, lengths, _, fixed = inputs
        ctx.fixed, ctx.first = fixed, _first_rows.recording
        ctx.set_materialize_grads(False)
        held = None if fixed.prepared is None else fixed.prepared.held
        keep_for_both(ctx, output[3:], x, v0, params, lengths, output[3], held=held)

    @staticmethod
    def tangents(ctx: Any, saved: tuple, *tangents: Tensor | None) -> tuple:
        x, v0, params, lengths, edges = saved
        scalars, token, channels, want, backend, _ = ctx.fixed
        refuse_lengths("lif", lengths, IN_FORWARD_MODE)
        call = Call(x, v0, params, None, None, None, scalars, token, channels.inner, False)
        inputs, d = _tangent.Inputs(x, v0, params), _tangent.Inputs(*tangents[:3])
        return _tangent.outputs(call, inputs, d, edges, channels.axis, want, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, v0, params, lengths, edges = kept(ctx)
        fixed = ctx.fixed
        _, needs_v0, needs_params, *_ = ctx.needs_input_grad
        gs, gv, gv_final = wanted_grads(grads, fixed.want)
        needs = NEED_X + NEED_V0 * needs_v0 + NEED_PARAMS * needs_params + given(fixed.want)
        if fixed.prepared is not None and once(gs, gv, gv_final, x, v0, params):
            gx, gv0, gparams, *_ = fixed.prepared.backward(
                x, v0, params, None, None, lengths, edges, gs, gv, gv_final, None, None, 0, None, needs, ctx
            )
        else:
            given_to = (x, v0, params, lengths, edges)
            gx, gv0, gparams = apply(_LIFBackward, "lif", gs, gv, gv_final, *given_to, fixed, needs)
        return gx, gv0 if needs_v0 else None, gparams if needs_params else None, None, None, None


class _LIFBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, x, v0, params, lengths, edges, fixed, needs):
        call = Call(x, v0, params, None, None, lengths, fixed.scalars, fixed.token, fixed.channels.inner, False)
        return lif_backward(*call, edges, gs, gv, gv_final, None, None, 0, None, needs, fixed.backend)[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative("lif")


def wanted_grads(grads: tuple, want: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of s, v (or h) and v_final; None where the output was not made."""
    gs, gv, gv_final, *_ = grads
    made = gs if want & WANT_SPIKES else None, gv if want & (WANT_V | WANT_H) else None
    return *made, gv_final if want & WANT_STATE else None


def given(want: int) -> int:
    """Added to what a backward pass needs: whether the gradient that comes for v is that of h."""
    return GIVEN_H if want & WANT_H else 0
