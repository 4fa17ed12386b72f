"""The LIF op: x [T, ...] -> spikes, one kernel a direction, nothing saved but the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose
from trtkern.backends.base import CHUNK, PARAMS
from trtkern.ops import checks, layout, spikes
from trtkern.ops._beneath import beneath
from trtkern.ops._library import apply, differentiated, refuse_duals, refuse_second_derivative
from trtkern.ops._lif import (
    NEED_PARAMS,
    NEED_V0,
    NEED_X,
    WANT_EDGES,
    WANT_H,
    WANT_PACKED,
    WANT_SPIKES,
    WANT_STATE,
    WANT_V,
    given,
    wanted_grads,
)
from trtkern.ops._saved import keep, kept
from trtkern.ops.checks import Number
from trtkern.spec import LIFSpec


class LIFOutput(NamedTuple):
    """What ``lif`` returns; what was not asked for is None."""

    spikes: Tensor | None
    """[T, ...] in x's dtype."""
    state: Tensor | None
    """[...] float32: v after the last step."""
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
) -> LIFOutput:
    """Leaky integrate-and-fire over all T steps at once.

    h[t] = decay * v[t-1] + gain * x[t] + bias; s[t] = 1 if h[t] > v_threshold else 0; then v[t] = v_reset where it
    fired (hard reset), h[t] - reset_amount * s[t] (soft) or h[t] (none). Spikes carry the surrogate derivative of
    ``spec``; the reset carries it too unless ``spec.detach_reset``. With decay = 1/tau this is the neuron of TRT
    (arXiv 2506.19256); ``docs/design.md`` lists the values for other libraries.

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

    Returns:
        LIFOutput(spikes, state, v, packed, h); gradients flow through all but packed.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
        RuntimeError: the backend cannot be used on this machine.
    """
    spec = spec or LIFSpec()
    checks.sequence("lif", x)
    checks.state("lif", v0, x)
    given = (decay, gain, bias, v_threshold if reset_amount is None else reset_amount, v_threshold, v_reset)
    values = dict(zip(PARAMS, given, strict=True))
    checks.parameters("lif", values)
    values = firing("lif", values, fire_on_equal, x)
    want = wanted(return_spikes, return_v, return_state, return_packed, return_h)
    chosen = choose(backend, "lif", x.device.type, x.dtype, spec.token)

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        if chosen == "reference":
            dtype = state_dtype(x)
            rows = reference_rows(*stack("lif", x, values, channel_dim, dtype), values, x)
            return from_trace(reference.lif(x.to(dtype), v0, rows, spec), x, want, flag)
        return _fused(layout.dense(x), v0, values, spec, chosen, channel_dim, want, flag)

    return perform("lif", x, want, flag, run)


def perform(
    op: str, x: Tensor, want: int, flag: Tensor | None, run: Callable[[int, Tensor | None], LIFOutput]
) -> LIFOutput:
    """run(want, flag), with the words for whoever listens; under ``trtkern.debug()`` an error if the flag rises."""
    checks.flag(op, flag, x)
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
    values: dict[str, Number],
    spec: LIFSpec,
    backend: str,
    channel_dim: int,
    want: int,
    flag: Tensor | None,
) -> LIFOutput:
    params, axis = stack("lif", x, values, channel_dim, torch.float32)
    refuse_duals("lif", x, v0, params)
    x, inner = (x, 1) if axis is None else layout.by_channel(x, axis)
    differentiable = differentiated(x, v0, params)
    if differentiable and x.shape[0] > CHUNK:
        want += WANT_EDGES
    run = partial(apply, _LIF, "lif") if differentiable else _LIF.forward
    s, v, v_final, _, packed = run(x, v0, params, scalars(values, params), spec.token, inner, flag, want, backend)
    return returned(s, v_final, v, packed, want)


def state_dtype(x: Tensor) -> torch.dtype:
    """In what the reference computes: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def firing(op: str, values: dict[str, Number], on_equal: bool, x: Tensor) -> dict[str, Number]:
    """The values of a neuron that fires where h > v_threshold; ``on_equal``: of one that fires where h >= it.

    That is the same neuron with the number before the threshold for one, in the precision of the potential.
    """
    if not on_equal:
        return values
    threshold, dtype = values["v_threshold"], state_dtype(x)
    checks.above_zero(op, threshold)
    if not isinstance(threshold, Tensor):
        return {**values, "v_threshold": _number_before(float(threshold), dtype == torch.float64)}
    held = threshold.to(dtype)
    before = torch.nextafter(held.detach(), torch.full_like(held, -torch.inf))
    # Exactly the number before; the gradient is the threshold's.
    return {**values, "v_threshold": held + (before - held.detach())}


def _number_before(value: float, double: bool) -> float:
    """The float32 (float64 if ``double``) number before ``value`` as that dtype has it."""
    held = torch.tensor(value, dtype=torch.float64 if double else torch.float32)
    return torch.nextafter(held, torch.full_like(held, -torch.inf)).item()


_number_before._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as ``trtkern.backends.choose``


def scalars(values: dict[str, Number], params: Tensor | None) -> list[float]:
    """The six numbers; zeros where a tensor holds them."""
    return [0.0] * len(PARAMS) if params is not None else [float(value) for value in values.values()]


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


def stack(
    op: str, x: Tensor, values: dict[str, Number], channel_dim: int, dtype: torch.dtype
) -> tuple[Tensor | None, int | None]:
    """The parameters as one tensor [6, C] and the axis of the channels; (None, None) when all are numbers."""
    if not any(isinstance(value, Tensor) for value in values.values()):
        return None, None
    axis = checks.channel_axis(op, values, channel_dim, x)
    count = 1 if axis is None else x.shape[axis]
    rows = [
        value.to(dtype).reshape(-1).expand(count)
        if isinstance(value, Tensor)
        else torch.full((count,), float(value), dtype=dtype, device=x.device)
        for value in values.values()
    ]
    return torch.stack(rows), axis


def reference_rows(params: Tensor | None, axis: int | None, values: dict[str, Number], x: Tensor) -> list[Any]:
    """The six parameters as the reference takes them: numbers, or tensors that broadcast with x[0]."""
    if params is None:
        return list(values.values())
    checks.parameter_values("lif", params)
    trailing = 0 if axis is None else x.dim() - axis - 1
    return list(params.reshape(len(PARAMS), -1, *[1] * trailing).unbind(0))


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


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(x, v0, params, scalars, token, inner, flag, want, backend):
        return torch.ops.trtkern.lif_forward(
            x, v0, params, None, None, scalars, token, inner, False, flag, want, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, v0, params, ctx.scalars, ctx.token, ctx.inner, _, ctx.want, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        keep(ctx, x, v0, params, output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, v0, params, edges = kept(ctx)
        _, needs_v0, needs_params, *_ = ctx.needs_input_grad
        gs, gv, gv_final = wanted_grads(grads, ctx.want)
        needs = NEED_X + NEED_V0 * needs_v0 + NEED_PARAMS * needs_params + given(ctx.want)
        gx, gv0, gparams = apply(
            _LIFBackward,
            "lif",
            gs,
            gv,
            gv_final,
            x,
            v0,
            params,
            edges,
            ctx.scalars,
            ctx.token,
            ctx.inner,
            needs,
            ctx.backend,
        )
        return gx, gv0 if needs_v0 else None, gparams if needs_params else None, *[None] * 6


class _LIFBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, x, v0, params, edges, scalars, token, inner, needs, backend):
        return torch.ops.trtkern.lif_backward(
            x, v0, params, None, None, scalars, token, inner, False, edges, gs, gv, gv_final, None, needs, backend
        )[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative("lif")
