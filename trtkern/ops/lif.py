"""The LIF op: x [T, ...] -> spikes, one kernel a direction, nothing saved but the input.

The public function and its autograd come first. Below them stand the private ops ``lif_forward`` and ``lif_backward``,
which BatchNorm + LIF calls too: they allocate what the backends fill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, named, sizes
from trtkern.backends.base import PARAMS, LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, NormGrads, Pool
from trtkern.ops import _tangent, checks, layout, spikes
from trtkern.ops._beneath import beneath
from trtkern.ops._call import (
    GIVEN_H,
    NEED_COEF,
    NEED_PARAMS,
    NEED_SUMS,
    NEED_V0,
    NEED_X,
    NEED_Y,
    WANT_EDGES,
    WANT_H,
    WANT_PACKED,
    WANT_SPIKES,
    WANT_STATE,
    WANT_V,
    Call,
    Channels,
)
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
    refuse_second_derivative,
)
from trtkern.ops._mapped import Fold, Mapped, sample
from trtkern.ops._room import norm_grads
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
        LIFOutput(spikes, state, v, packed, h); gradients flow through all but packed. So do tangents (forward mode:
        ``torch.func.jvp``, ``jacfwd``), for which there is no kernel: torch operations make them step by step.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
        RuntimeError: the backend cannot be used on this machine.
    """
    numbers = (decay, gain, bias, v_threshold if reset_amount is None else reset_amount, v_threshold, v_reset)
    values = dict(zip(PARAMS, numbers, strict=True))
    want = wanted(return_spikes, return_v, return_state, return_packed, return_h)
    return neuron(x, v0, values, spec or LIFSpec(), want, backend, channel_dim, fire_on_equal, flag)


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
) -> LIFOutput:
    """The neuron that ``spec`` names (``trtkern.neurons``) over all T steps at once: what ``lif`` is for LIF.

    Args:
        x, backend, channel_dim, fire_on_equal, flag: as in ``lif``.
        state: before the first step, [...] float32, of a neuron with several states [S, ...]; None is zero.
        values: its parameters by name; a number, or a tensor of shape [] or [C], with gradient.
        want: which outputs to make (``wanted``).
    """
    settings = (spec.token, backend, channel_dim, want, fire_on_equal, *values)
    call = known(settings, (x, state, flag, *values.values()))
    ready = recall(call)
    if ready is None:
        ready = _checked(x, state, values, spec, want, backend, channel_dim, fire_on_equal, flag, call is not None)
        remember(call, ready)

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        if ready.fixed is not None and want == ready.fixed.want:
            return _call(x, state, None, flag, ready.fixed, spec)
        chosen, op = ready.backend, spec.neuron.lower()
        own = firing(op, {name: values[name] for name in spec.row.params}, fire_on_equal, x)
        if chosen == "reference":
            dtype = state_dtype(x)
            rows = reference_rows(*stack(op, x, own, channel_dim, dtype), own, x)
            return from_trace(reference.lif(x.to(dtype), state, rows, spec), x, want, flag)
        return _fused(layout.dense(x), state, own, spec, chosen, channel_dim, want, flag, call is not None)

    return perform(spec.neuron.lower(), x, want, flag, run)


class _Fixed(NamedTuple):
    """What the Function is told besides tensors."""

    scalars: tuple[float, ...]
    token: str
    channels: Channels
    want: int
    backend: str
    direct: bool
    """Nothing stands between the call and its kernel (``plain``)."""


class _Ready(NamedTuple):
    """A call that was checked."""

    backend: str
    fixed: _Fixed | None
    """What its Function is told, where that follows from what the call is known by: its parameters are numbers."""


def _checked(
    x: Tensor, state: Tensor | None, values: dict[str, Number], spec: LIFSpec, want: int, backend: str,
    channel_dim: int, fire_on_equal: bool, flag: Tensor | None, direct: bool,
) -> _Ready:  # fmt: skip
    """The call, when all that its shapes, types, places and numbers say was checked."""
    op, row = spec.neuron.lower(), spec.row
    values = {name: values[name] for name in row.params}
    checks.sequence(op, x)
    checks.state(op, state, x, row.states)
    checks.flag(op, flag, x)
    checks.parameters(op, values)
    measured = (0, 0, 0) if want & WANT_PACKED else sizes(x)
    chosen = choose(backend, "lif", x.device.type, x.dtype, spec.token, measured)
    numbers = not fire_on_equal and not any(isinstance(value, Tensor) for value in values.values())
    if not (direct and numbers and chosen != "reference" and layout.dense(x) is x):
        return _Ready(chosen, None)
    return _Ready(chosen, _Fixed(tuple(scalars(values, None)), spec.token, Channels(None, 1), want, chosen, True))


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
    values: dict[str, Number],
    spec: LIFSpec,
    backend: str,
    channel_dim: int,
    want: int,
    flag: Tensor | None,
    direct: bool,
) -> LIFOutput:
    params, axis = stack(spec.neuron.lower(), x, values, channel_dim, torch.float32)
    x, inner = (x, 1) if axis is None else layout.by_channel(x, axis)
    fixed = _Fixed(tuple(scalars(values, params)), spec.token, Channels(axis, inner), want, backend, direct)
    return _call(x, v0, params, flag, fixed, spec)


def _call(
    x: Tensor, v0: Tensor | None, params: Tensor | None, flag: Tensor | None, fixed: _Fixed, spec: LIFSpec
) -> LIFOutput:
    direct, want = fixed.direct, fixed.want
    differentiable = needs_grad(x, v0, params) if direct else differentiated(x, v0, params)
    dual = not direct and pushed(spec.neuron.lower(), x, v0, params)
    if differentiable and x.shape[0] > spec.chunk:
        fixed = fixed._replace(want=want + WANT_EDGES)
    if not (differentiable or dual):
        made = _LIF.forward(x, v0, params, flag, fixed)
    elif direct:
        made = alone(_LIF).apply(x, v0, params, flag, fixed)
    else:
        made = apply(_LIF, "lif", x, v0, params, flag, fixed)
    s, v, v_final, _, packed = made
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


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(x, v0, params, flag, fixed):
        scalars, token, channels, want, backend, direct = fixed
        run = lif_forward.direct if direct else lif_forward
        return run(x, v0, params, None, None, scalars, token, channels.inner, False, flag, want, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, v0, params, _, ctx.fixed = inputs
        ctx.set_materialize_grads(False)
        keep_for_both(ctx, output[3:], x, v0, params, output[3])

    @staticmethod
    def tangents(ctx: Any, saved: tuple, *tangents: Tensor | None) -> tuple:
        x, v0, params, edges = saved
        scalars, token, channels, want, backend, _ = ctx.fixed
        call = Call(x, v0, params, None, None, scalars, token, channels.inner, False)
        inputs, d = _tangent.Inputs(x, v0, params), _tangent.Inputs(*tangents[:3])
        return _tangent.outputs(call, inputs, d, edges, channels.axis, want, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, v0, params, edges = kept(ctx)
        fixed = ctx.fixed
        _, needs_v0, needs_params, *_ = ctx.needs_input_grad
        gs, gv, gv_final = wanted_grads(grads, fixed.want)
        needs = NEED_X + NEED_V0 * needs_v0 + NEED_PARAMS * needs_params + given(fixed.want)
        given_to = (gs, gv, gv_final, x, v0, params, edges, fixed, needs)
        if once(gs, gv, gv_final, x, v0, params):
            gx, gv0, gparams = _LIFBackward.forward(*given_to, True)
        else:
            gx, gv0, gparams = apply(_LIFBackward, "lif", *given_to, False)
        return gx, gv0 if needs_v0 else None, gparams if needs_params else None, None, None


class _LIFBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, x, v0, params, edges, fixed, needs, direct):
        scalars, token, channels, _, backend, _ = fixed
        run = lif_backward.direct if direct else lif_backward
        return run(
            x, v0, params, None, None, scalars, token, channels.inner, False, edges, gs, gv, gv_final, None, None, 0,
            None, needs, backend,
        )[:3]  # fmt: skip

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


def inputs_of(call: Call, before: bool) -> LIFInputs:
    """What the backend reads, in the layout that it expects; the last look before addresses are taken."""
    x, v0, params, affine, residual, scalars, token, inner, pool = call
    if not (layout.is_dense(x) or layout.is_static(x)):
        raise RuntimeError(f"lif: expected x to be dense with time outermost, got {checks.describe(x)}")
    if pool and (x.shape[-2] % 2 or x.shape[-1] % 2):
        raise RuntimeError(f"lif: expected images with even sides to pool, got {checks.describe(x)}")
    spec = LIFSpec.from_token(token)
    if params is not None:
        checks.parameter_values(spec.neuron.lower(), params, spec.row.params)
    if v0 is not None:
        v0 = layout.aligned_state(v0, x)
    norm = None
    if affine is not None:
        if residual is not None:
            residual = layout.aligned(residual, x.shape, layout.strides(x), x.dtype, x)
        norm = Norm(affine, residual)
    halves = Pool(x.stride(-2), x.stride(-1)) if pool else None
    return LIFInputs(x, v0, params, tuple(scalars), spec, inner, norm, halves, before)


def _empty_spikes(x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return layout.empty(x)
    return torch.empty_strided(*layout.pooled_shape(x), dtype=x.dtype, device=x.device)


def _states(token: str) -> int:
    return len(LIFSpec.from_token(token).row.states)


def allocate(x: Tensor, token: str, pool: bool, want: int, flag: Tensor | None = None) -> LIFForward:
    """The outputs of the forward pass, in x's layout; an unwanted one is None."""
    steps, states = x.shape[0], _states(token)
    edges = packed = None
    if want & WANT_EDGES:
        count = (steps - 1) // LIFSpec.from_token(token).chunk
        edges = torch.empty((count * states, layout.neurons(x)), dtype=torch.float32, device=x.device)
    if want & WANT_PACKED:
        planes = ((steps + 7) // 8, *x.shape[1:])
        packed = torch.empty_strided(planes, layout.strides(x), dtype=torch.uint8, device=x.device)
    return LIFForward(
        s=_empty_spikes(x, pool) if want & WANT_SPIKES else None,
        v=layout.empty(x) if want & (WANT_V | WANT_H) else None,
        v_final=layout.empty_state(x, states) if want & WANT_STATE else None,
        edges=edges,
        flag=flag,
        packed=packed,
    )


def _forward(x, v0, params, affine, residual, scalars, spec, inner, pool, flag, want, backend):
    inputs = inputs_of(Call(x, v0, params, affine, residual, scalars, spec, inner, pool), bool(want & WANT_H))
    out = allocate(x, spec, pool, want, flag)
    if x.numel():
        named(backend).ops["lif_forward"](inputs, out)
    return *out[:4], out.packed


def _forward_fake(x, v0, params, affine, residual, scalars, spec, inner, pool, flag, want, backend):
    out = allocate(x, spec, pool, want)
    return *out[:4], out.packed


def _folded(count: int, dims: tuple, call: Call, own: bool) -> tuple[Fold, Call]:
    """The call of all samples together; ``own``: each has sums of its own over the neurons of a channel."""
    at: Any = Call(*dims[: len(call)])
    rows, at_rows = (call.params, at.params) if call.affine is None else (call.affine, at.affine)
    own = own or at.params is not None or at.affine is not None
    channels = sample(rows, at_rows).shape[1] if own and rows is not None else None
    fold = Fold(call.x, at.x, count, channels, call.inner, call.pool)
    return fold, call._replace(
        x=fold.steps(call.x, at.x),  # type: ignore[arg-type]
        v0=fold.state(call.v0, at.v0, _states(call.token)),
        params=fold.rows(call.params, at.params),
        affine=fold.rows(call.affine, at.affine),
        residual=fold.steps(call.residual, at.residual),
        inner=fold.inner,
    )


def _made(*outputs: tuple[bool, Callable[[Tensor], Mapped], Tensor]) -> tuple[tuple[Tensor, ...], tuple]:
    """What a rule returns: of every output that was wanted, the samples apart."""
    tensors, dims = zip(*((apart(t) if wanted else (t, None)) for wanted, apart, t in outputs), strict=True)
    return tensors, dims


def _forward_mapped(info: Any, dims: tuple, *arguments: Any) -> tuple:
    *inputs, flag, want, backend = arguments
    fold, call = _folded(info.batch_size, dims, Call(*inputs), False)
    # The kernel raises one flag, which is then that of every sample.
    raised = flag if dims[len(inputs)] is None else flag.new_zeros(1)
    s, v, v_final, edges, packed = torch.ops.trtkern.lif_forward(*call, raised, want, backend)
    if raised is not flag:
        flag.bitwise_or_(raised)
    return _made(
        (bool(want & WANT_SPIKES), fold.out_steps, s),
        (bool(want & (WANT_V | WANT_H)), fold.out_steps, v),
        (bool(want & WANT_STATE), partial(fold.out_state, states=_states(call.token)), v_final),
        (bool(want & WANT_EDGES), fold.out_flat, edges),
        (bool(want & WANT_PACKED), fold.out_steps, packed),
    )


_CALL = (
    "Tensor x, Tensor? v0, Tensor? params, Tensor? affine, Tensor? residual, float[] scalars, str spec, SymInt inner, "
    "bool pool"
)
lif_forward = define(
    f"lif_forward({_CALL}, Tensor(a!)? flag, int want, str backend) "
    "-> (Tensor s, Tensor v, Tensor v_final, Tensor edges, Tensor packed)",
    _forward,
    _forward_fake,
    _forward_mapped,
)


def _allocate_backward(x: Tensor, token: str, params: Tensor | None, affine: Tensor | None, needs: int) -> LIFBackward:
    sums = None
    if needs & NEED_SUMS and affine is not None:
        sums = torch.empty((2, affine.shape[1]), dtype=torch.float64, device=x.device)
    return LIFBackward(
        x=layout.empty(x) if needs & (NEED_X | NEED_Y) else None,
        v0=layout.empty_state(x, _states(token)) if needs & NEED_V0 else None,
        params=torch.empty_like(params) if needs & NEED_PARAMS and params is not None else None,
        sums=sums,
    )


def _finished(affine: Tensor | None, norm: Tensor | None, needs: int, count: int, dtype: Any) -> NormGrads | None:
    if norm is None or affine is None or not needs & NEED_SUMS:
        return None
    return norm_grads(affine, norm, count, bool(needs & NEED_COEF), dtype)


def _backward(
    x, v0, params, affine, residual, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, moments, count, dtype,
    needs, backend,
):  # fmt: skip
    inputs = inputs_of(Call(x, v0, params, affine, residual, scalars, spec, inner, pool), bool(needs & GIVEN_H))
    spikes = layout.pooled_shape(x) if pool else (x.shape, layout.strides(x))
    grads = LIFGrads(
        None if gs is None else layout.aligned(gs, *spikes, x.dtype, x),
        None if gv is None else layout.aligned(gv, x.shape, layout.strides(x), x.dtype, x),
        None if gv_final is None else layout.aligned_state(gv_final, x),
        coef,
    )
    out, norm = _allocate_backward(x, spec, params, affine, needs), _finished(affine, moments, needs, count, dtype)
    run = named(backend).ops
    if edges is not None and not edges.numel():
        edges = None
    if x.numel():
        run["lif_backward"](inputs, edges, grads, out._replace(x=None) if needs & NEED_Y else out, norm)
        if needs & NEED_Y and norm is not None:
            run["lif_backward"](inputs, edges, grads._replace(coef=norm.coef), LIFBackward(out.x, None, None), None)
    else:
        for sums in (out.params, out.sums):
            if sums is not None:
                sums.zero_()
        if norm is not None:
            run["batch_norm_lif_coefficients"](out.sums, None, norm)
    return *out, *((None, None, None) if norm is None else norm[3:])


def _backward_fake(
    x, v0, params, affine, residual, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, moments, count, dtype,
    needs, backend,
):  # fmt: skip
    norm = _finished(affine, moments, needs, count, dtype)
    made = _allocate_backward(x, spec, params, affine, needs)
    return *made, *((None, None, None) if norm is None else norm[3:])


def _backward_mapped(info: Any, dims: tuple, *arguments: Any) -> tuple:
    *inputs, edges, gs, gv, gv_final, coef, moments, count, dtype, needs, backend = arguments
    at_edges, at_gs, at_gv, at_gv_final, at_coef, at_moments = dims[len(inputs) : len(inputs) + 6]
    own = bool(needs & (NEED_PARAMS | NEED_SUMS)) or at_coef is not None
    fold, call = _folded(info.batch_size, dims, Call(*inputs), own)
    gx, gv0, gparams, gsums, gcoef, gweight, gbias = torch.ops.trtkern.lif_backward(
        *call,
        fold.flat(edges, at_edges) if edges is not None and edges.dim() > 1 else edges,
        fold.steps(gs, at_gs),
        fold.steps(gv, at_gv),
        fold.state(gv_final, at_gv_final, _states(call.token)),
        fold.rows(coef, at_coef),
        fold.rows(moments, at_moments),
        count,
        dtype,
        needs,
        backend,
    )
    summed = bool(needs & NEED_SUMS) and call.affine is not None
    finished = summed and moments is not None
    return _made(
        (bool(needs & (NEED_X | NEED_Y)), fold.out_steps, gx),
        (bool(needs & NEED_V0), partial(fold.out_state, states=_states(call.token)), gv0),
        (bool(needs & NEED_PARAMS) and call.params is not None, fold.out_rows, gparams),
        (summed, fold.out_rows, gsums),
        (finished and bool(needs & NEED_COEF), fold.out_rows, gcoef),
        (finished and dtype is not None, fold.out_channels, gweight),
        (finished and dtype is not None, fold.out_channels, gbias),
    )


lif_backward = define(
    f"lif_backward({_CALL}, Tensor? edges, Tensor? gs, Tensor? gv, Tensor? gv_final, Tensor? coef, Tensor? moments, "
    "SymInt count, ScalarType? dtype, int needs, str backend) -> (Tensor gx, Tensor gv0, Tensor gparams, Tensor sums, "
    "Tensor made_coef, Tensor gweight, Tensor gbias)",
    _backward,
    _backward_fake,
    _backward_mapped,
)
