"""The LIF op: x [T, ...] -> spikes, one kernel a direction, nothing saved but the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, named
from trtkern.backends.base import CHUNK, PARAMS, LIFBackward, LIFForward, LIFGrads, LIFInputs
from trtkern.ops import _check
from trtkern.ops._check import Number
from trtkern.ops._library import define, refuse_second_derivative
from trtkern.spec import LIFSpec

WANT_SPIKES, WANT_V, WANT_STATE, WANT_EDGES = 1, 2, 4, 8


class LIFOutput(NamedTuple):
    """What ``lif`` returns; what was not asked for is None."""

    spikes: Tensor | None
    """[T, ...] in x's dtype."""
    state: Tensor | None
    """[...] float32: v after the last step."""
    v: Tensor | None
    """[T, ...] in x's dtype: v after the reset of every step."""


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
        return_spikes, return_state, return_v: which outputs to make.
        flag: int32 [1]; set to 1 if any potential is not finite, never cleared.

    Returns:
        LIFOutput(spikes, state, v); gradients flow through all three.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
        RuntimeError: the backend cannot be used on this machine.
    """
    spec = spec or LIFSpec()
    _check.sequence("lif", x)
    _check.state("lif", v0, x)
    given = (decay, gain, bias, v_threshold if reset_amount is None else reset_amount, v_threshold, v_reset)
    values = dict(zip(PARAMS, given, strict=True))
    _check.parameters("lif", values)
    _check.flag("lif", flag, x)
    # A flag of its own: the caller's may be set already, by another call.
    watched = x.new_zeros(1, dtype=torch.int32) if _check.debugging() else flag
    want = WANT_SPIKES * return_spikes + WANT_V * return_v + WANT_STATE * return_state
    chosen = choose(backend, "lif", x.device.type, x.dtype, spec.token)
    if chosen == "reference":
        output = _reference(x, v0, values, spec, channel_dim, want, watched)
    else:
        output = _fused(_check.dense(x), v0, values, spec, chosen, channel_dim, want, watched)
    if watched is not flag and watched is not None and watched.item():
        if flag is not None:
            flag.fill_(1)
        raise RuntimeError(f"lif: expected finite potentials, got NaN or Inf from {_check.describe(x)}")
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
    params, axis = _stack(x, values, channel_dim, torch.float32)
    inner = 1 if axis is None else x.stride(axis)
    scalars = [0.0] * len(PARAMS) if params is not None else [float(value) for value in values.values()]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, v0, params))
    if differentiable and x.shape[0] > CHUNK:
        want += WANT_EDGES
    run = _LIF.apply if differentiable else torch.ops.trtkern.lif_forward
    s, v, v_final, _ = run(x, v0, params, flag, scalars, spec.token, inner, want, backend)
    return _wanted(s, v_final, v, want)


def _wanted(spikes: Tensor, state: Tensor, v: Tensor, want: int) -> LIFOutput:
    """The outputs that were asked for; None in place of the others."""
    return LIFOutput(
        spikes if want & WANT_SPIKES else None, state if want & WANT_STATE else None, v if want & WANT_V else None
    )


def _stack(
    x: Tensor, values: dict[str, Number], channel_dim: int, dtype: torch.dtype
) -> tuple[Tensor | None, int | None]:
    """The parameters as one tensor [6, C] and the axis of the channels; (None, None) when all are numbers."""
    if not any(isinstance(value, Tensor) for value in values.values()):
        return None, None
    axis = _check.channel_axis("lif", values, channel_dim, x)
    count = 1 if axis is None else x.shape[axis]
    rows = [
        value.to(dtype).reshape(-1).expand(count)
        if isinstance(value, Tensor)
        else x.new_full((count,), float(value), dtype=dtype)
        for value in values.values()
    ]
    return torch.stack(rows), axis


def _reference(
    x: Tensor,
    v0: Tensor | None,
    values: dict[str, Number],
    spec: LIFSpec,
    channel_dim: int,
    want: int,
    flag: Tensor | None,
) -> LIFOutput:
    """The readable loop, in float32 (float64 for float64), with autograd all the way."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    params, axis = _stack(x, values, channel_dim, dtype)
    if params is None:
        rows: list[Any] = list(values.values())
    else:
        _check.parameter_values("lif", params)
        trailing = 0 if axis is None else x.dim() - axis - 1
        rows = list(params.reshape(len(PARAMS), -1, *[1] * trailing).unbind(0))
    trace = reference.lif(x.to(dtype), v0, rows, spec)
    if flag is not None:
        with torch.no_grad():
            flag.bitwise_or_((~torch.isfinite(trace.h)).any().to(flag.dtype))
    return _wanted(trace.s.to(x.dtype), trace.v[-1], trace.v.to(x.dtype), want)


def _inputs(
    x: Tensor, v0: Tensor | None, params: Tensor | None, scalars: Sequence[float], token: str, inner: int
) -> LIFInputs:
    """What the backend reads, in the layout that it expects; the last look before addresses are taken."""
    if not _check.is_dense(x):
        raise RuntimeError(f"lif: expected x to be dense with time outermost, got {_check.describe(x)}")
    _check.parameter_values("lif", params)
    if v0 is not None:
        v0 = _check.aligned_like(v0, x[0], torch.float32)
    return LIFInputs(x, v0, params, tuple(scalars), LIFSpec.from_token(token), inner)


def _allocate(x: Tensor, want: int) -> LIFForward:
    """The outputs of the forward pass, with x's strides; an unwanted one is None."""
    steps, neurons = x.shape[0], x[0].numel()
    edges = None
    if want & WANT_EDGES:
        edges = x.new_empty(((steps - 1) // CHUNK, neurons), dtype=torch.float32)
    return LIFForward(
        s=torch.empty_like(x) if want & WANT_SPIKES else None,
        v=torch.empty_like(x) if want & WANT_V else None,
        v_final=torch.empty_like(x[0], dtype=torch.float32) if want & WANT_STATE else None,
        edges=edges,
        flag=None,
    )


def _returned(x: Tensor, out: LIFForward) -> tuple[Tensor, ...]:
    """The outputs as the op's schema has them: an empty tensor stands for an unwanted one."""
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in out[:4])


def _forward(x, v0, params, flag, scalars, spec, inner, want, backend):
    inputs = _inputs(x, v0, params, scalars, spec, inner)
    out = _allocate(x, want)
    if x.numel():
        named(backend).ops["lif_forward"](inputs, out._replace(flag=flag))
    return _returned(x, out)


def _forward_fake(x, v0, params, flag, scalars, spec, inner, want, backend):
    return _returned(x, _allocate(x, want))


define(
    "lif_forward(Tensor x, Tensor? v0, Tensor? params, Tensor(a!)? flag, float[] scalars, str spec, SymInt inner, "
    "int want, str backend) -> (Tensor s, Tensor v, Tensor v_final, Tensor edges)",
    _forward,
    _forward_fake,
)


def _allocate_backward(x, v0, params, needs):
    return LIFBackward(
        x=torch.empty_like(x),
        v0=torch.empty_like(x[0], dtype=torch.float32) if needs & 1 else None,
        params=torch.empty_like(params) if needs & 2 else None,
    )


def _backward(gs, gv, gv_final, x, v0, params, edges, scalars, spec, inner, needs, backend):
    inputs = _inputs(x, v0, params, scalars, spec, inner)
    grads = LIFGrads(
        None if gs is None else _check.aligned_like(gs, x, x.dtype),
        None if gv is None else _check.aligned_like(gv, x, x.dtype),
        None if gv_final is None else _check.aligned_like(gv_final, x[0], torch.float32),
    )
    out = _allocate_backward(x, v0, params, needs)
    if x.numel():
        named(backend).ops["lif_backward"](inputs, edges if edges.numel() else None, grads, out)
    elif out.params is not None:
        out.params.zero_()
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in out)


def _backward_fake(gs, gv, gv_final, x, v0, params, edges, scalars, spec, inner, needs, backend):
    out = _allocate_backward(x, v0, params, needs)
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in out)


define(
    "lif_backward(Tensor? gs, Tensor? gv, Tensor? gv_final, Tensor x, Tensor? v0, Tensor? params, Tensor edges, "
    "float[] scalars, str spec, SymInt inner, int needs, str backend) -> (Tensor gx, Tensor gv0, Tensor gparams)",
    _backward,
    _backward_fake,
)


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(x, v0, params, flag, scalars, token, inner, want, backend):
        return torch.ops.trtkern.lif_forward(x, v0, params, flag, scalars, token, inner, want, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, v0, params, _, ctx.scalars, ctx.token, ctx.inner, ctx.want, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(x, v0, params, output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, v0, params, edges = ctx.saved_tensors
        _, needs_v0, needs_params, *_ = ctx.needs_input_grad
        gs, gv, gv_final = (
            grad if ctx.want & bit else None
            for grad, bit in zip(grads, (WANT_SPIKES, WANT_V, WANT_STATE), strict=False)
        )
        needs = int(needs_v0) + 2 * int(needs_params)
        gx, gv0, gparams = _LIFBackward.apply(
            gs, gv, gv_final, x, v0, params, edges, ctx.scalars, ctx.token, ctx.inner, needs, ctx.backend
        )
        return gx, gv0 if needs_v0 else None, gparams if needs_params else None, *[None] * 6


class _LIFBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, x, v0, params, edges, scalars, token, inner, needs, backend):
        return torch.ops.trtkern.lif_backward(
            gs, gv, gv_final, x, v0, params, edges, scalars, token, inner, needs, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative("lif")
