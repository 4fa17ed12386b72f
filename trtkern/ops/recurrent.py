"""Neurons that feed each other: x [T, B, N] -> spikes, the product with the recurrent weights within each step.

The forward pass writes the input current, x with what the neurons themselves add to it. To the backward pass that is
what x is to ``trtkern.ops.lif``: traces are computed again from it, a chunk at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, named
from trtkern.backends.base import LIFGrads, RecurrentBackward, RecurrentForward, RecurrentInputs
from trtkern.ops import checks, layout
from trtkern.ops._library import (
    apply,
    define,
    differentiated,
    pushed,
    refuse_duals,
    refuse_mapped,
    refuse_second_derivative,
)
from trtkern.ops._prepared import GIVEN_H, NEED_PARAMS, NEED_V0, WANT_EDGES, WANT_H, WANT_PACKED, WANT_STATE, WANT_V
from trtkern.ops._saved import keep, kept
from trtkern.ops.checks import Number
from trtkern.ops.lif import LIFOutput, from_trace, perform, returned
from trtkern.ops.parameters import firing, reference_rows, scalars, stack, state_dtype
from trtkern.ops.spikes import unpack_all
from trtkern.spec import LIFSpec

OP = "recurrent"
_INSTEAD = 'pass backend="reference", which is plain torch'


def recurrent(
    x: Tensor,
    s0: Tensor | None,
    state: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    values: dict[str, Number],
    spec: LIFSpec,
    want: int,
    backend: str = "auto",
    fire_on_equal: bool = False,
    flag: Tensor | None = None,
) -> LIFOutput:
    """current[t] = x[t] + s[t-1] weight^T + bias, then the step of the neuron that ``spec`` names, for all T steps.

    Args:
        x: [T, B, N] in float32, bfloat16 or float16 (float64 runs on the reference), any strides.
        s0: the spikes before the first step, [B, N] in x's dtype; None is zero.
        state: of the neurons before the first step, [B, N] float32, of a neuron with several states [S, B, N].
        weight: [N, N], weight[j, k] from neuron k to neuron j; bias: [N] or None.
        values, backend, fire_on_equal, flag, want: as in ``trtkern.ops.lif.neuron``; tensors among the values are [] or
            [N].

    Returns:
        LIFOutput; gradients flow through all but packed, to x, s0, state, weight, bias and the values.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
        RuntimeError: a second derivative, torch.vmap or a forward mode on a kernel.
    """
    _check(x, s0, state, weight, bias, spec, flag)
    values = {name: values[name] for name in spec.row.params}
    checks.parameters(OP, values)
    chosen = choose(backend, OP, x.device.type, x.dtype, spec.token)

    def run(want: int, flag: Tensor | None) -> LIFOutput:
        own, dtype = firing(OP, values, fire_on_equal, x), state_dtype(x)
        if chosen == "reference":
            rows = reference_rows(*stack(OP, x, own, 2, dtype), own, x)
            before, w, b = (None if t is None else t.to(dtype) for t in (s0, weight, bias))
            trace = reference.recurrent(x.to(dtype), before, state, w, b, rows, spec)  # type: ignore[arg-type]
            return from_trace(trace, x, want, flag)
        refuse_mapped(OP, "neurons that feed each other", _INSTEAD, x, s0, state, weight, bias)
        refuse_duals(OP, "on a kernel", _INSTEAD, x, s0, state, weight, bias)
        params, _ = stack(OP, x, own, 2, torch.float32)
        numbers = scalars(OP, values, fire_on_equal, x) or (0.0,) * len(spec.row.params)
        tensors = x.contiguous(), s0, state, weight.float().contiguous(), bias, params
        return _fused(tensors, numbers, spec, chosen, want, flag)

    return perform(OP, x, want, flag, run)


def _check(
    x: Tensor, s0: Tensor | None, state: Tensor | None, weight: Tensor, bias: Tensor | None, spec: LIFSpec,
    flag: Tensor | None,
) -> None:  # fmt: skip
    checks.sequence(OP, x)
    if x.dim() != 3:
        raise ValueError(f"{OP}: expected x as [T, B, N], got {checks.describe(x)}; flatten the neurons to one axis")
    N = x.shape[2]
    for name, tensor, shape in (("weight", weight, (N, N)), ("bias", bias, (N,)), ("s0", s0, (x.shape[1], N))):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            raise TypeError(f"{OP}: expected {name} to be a floating tensor {shape}, got {checks.describe(tensor)}")
        checks.plain(OP, name, tensor)
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"{OP}: expected {name} of shape {shape} on {x.device}, got {checks.describe(tensor)} for x "
                f"{tuple(x.shape)}; each of the {N} neurons gives to all {N}"
            )
    checks.state(OP, state, x, spec.row.states)
    checks.flag(OP, flag, x)


class _Fixed(NamedTuple):
    scalars: tuple[float, ...]
    token: str
    want: int
    backend: str


def _fused(
    tensors: tuple, numbers: tuple[float, ...], spec: LIFSpec, backend: str, want: int, flag: Tensor | None
) -> LIFOutput:
    x, s0, state, weight, bias, params = tensors
    s0 = None if s0 is None else s0.to(x.dtype).contiguous()
    state = None if state is None else state.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    differentiable = differentiated(x, s0, state, weight, bias, params)
    pushed(OP, x, s0, state, weight, bias, params)
    if differentiable:
        # The words are all that the gradient of the weight needs of the spikes.
        keep_words = WANT_PACKED if "recurrent_weight_grad" in named(backend).ops else 0
        fixed = _Fixed(numbers, spec.token, want | WANT_EDGES | keep_words, backend)
        s, v, v_final, packed, *_ = apply(_Recurrent, OP, x, s0, state, weight, bias, params, flag, fixed)
    else:
        s, v, v_final, packed, *_ = recurrent_forward(
            x, s0, state, weight, bias, params, numbers, spec.token, flag, want, backend
        )
    return returned(s, v_final, v, packed, want)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(x, s0, state, weight, bias, params, flag, fixed):
        return recurrent_forward(x, s0, state, weight, bias, params, *fixed[:2], flag, fixed.want, fixed.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, s0, state, weight, bias, params, _, ctx.fixed = inputs
        s, _, _, packed, current, edges = output
        ctx.set_materialize_grads(False)
        # Not the current: through it a second derivative finds its way, and is refused.
        ctx.mark_non_differentiable(*(t for t in (packed, edges) if t is not None))
        ctx.biased = bias is not None
        words = "recurrent_weight_grad" in named(ctx.fixed.backend).ops
        keep(ctx, current, packed if words else s, s0, state, weight, params, edges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        current, s, s0, state, weight, params, edges = kept(ctx)
        needs_x, needs_s0, needs_state, needs_weight, needs_bias, needs_params, *_ = ctx.needs_input_grad
        want = ctx.fixed.want
        gs, gv, gv_final, *_ = grads
        gv = gv if want & (WANT_V | WANT_H) else None
        gv_final = gv_final if want & WANT_STATE else None
        needs = NEED_V0 * needs_state + NEED_PARAMS * needs_params + GIVEN_H * bool(want & WANT_H)
        gx, gstate, gparams, gweight = apply(
            _RecurrentBackward, OP, gs, gv, gv_final, current, s, s0, state, weight, params, edges, ctx.fixed, needs,
            needs_weight,
        )  # fmt: skip
        gs0 = gx[0].float().mm(weight).to(gx.dtype) if needs_s0 else None
        gbias = gx.sum((0, 1), dtype=torch.float32) if needs_bias else None
        return (
            gx if needs_x else None, gs0, gstate if needs_state else None, gweight if needs_weight else None, gbias,
            gparams if needs_params else None, None, None,
        )  # fmt: skip


class _RecurrentBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, current, s, s0, state, weight, params, edges, fixed, needs, needs_weight):
        gx, gstate, gparams = recurrent_backward(
            current, state, weight, params, fixed.scalars, fixed.token, edges, gs, gv, gv_final, needs, fixed.backend
        )
        gweight = recurrent_weight_grad(gx, s, s0, fixed.backend) if needs_weight else None
        return gx, gstate, gparams, gweight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative(OP)


# The private ops: they allocate what the backends fill.


def _like(x: Tensor, count: int) -> Tensor:
    shape = (count, *x.shape[1:]) if count > 1 else x.shape[1:]
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _allocate(x: Tensor, token: str, want: int, flag: Tensor | None) -> RecurrentForward:
    spec = LIFSpec.from_token(token)
    states, edges = len(spec.row.states), None
    T, B, N = x.shape
    if want & WANT_EDGES:
        edges = torch.empty(((T - 1) // spec.chunk * states, B * N), dtype=torch.float32, device=x.device)
    return RecurrentForward(
        torch.empty_like(x),
        torch.empty_like(x) if want & WANT_EDGES else None,
        torch.empty_like(x) if want & (WANT_V | WANT_H) else None,
        _like(x, states) if want & WANT_STATE else None,
        edges,
        flag,
        torch.empty(((T + 7) // 8, B, N), dtype=torch.uint8, device=x.device) if want & WANT_PACKED else None,
    )


def _outputs(out: RecurrentForward) -> tuple[Tensor | None, ...]:
    return out.s, out.v, out.v_final, out.packed, out.current, out.edges


def _forward(x, s0, v0, weight, bias, params, scalars, spec, flag, want, backend):
    out = _allocate(x, spec, want, flag)
    if params is not None:
        checks.parameter_values(OP, params, LIFSpec.from_token(spec).row.params)
    if x.numel():
        inputs = RecurrentInputs(
            x, s0, v0, weight, bias, params, tuple(scalars), LIFSpec.from_token(spec), bool(want & WANT_H)
        )
        named(backend).ops["recurrent_forward"](inputs, out)
    return _outputs(out)


def _forward_fake(x, s0, v0, weight, bias, params, scalars, spec, flag, want, backend):
    return _outputs(_allocate(x, spec, want, flag))


recurrent_forward = define(
    "recurrent_forward(Tensor x, Tensor? s0, Tensor? v0, Tensor weight, Tensor? bias, Tensor? params, float[] scalars, "
    "str spec, Tensor(a!)? flag, int want, str backend) -> (Tensor s, Tensor v, Tensor v_final, Tensor packed, "
    "Tensor current, Tensor edges)",
    _forward,
    _forward_fake,
    None,
)


def _allocate_backward(current: Tensor, params: Tensor | None, spec: str, needs: int) -> RecurrentBackward:
    return RecurrentBackward(
        torch.empty_like(current),
        _like(current, len(LIFSpec.from_token(spec).row.states)) if needs & NEED_V0 else None,
        torch.empty_like(params) if params is not None and needs & NEED_PARAMS else None,
    )


def _backward(current, v0, weight, params, scalars, spec, edges, gs, gv, gv_final, needs, backend):
    out = _allocate_backward(current, params, spec, needs)
    gs, gv = (t if t is None else layout.alike(t, current) for t in (gs, gv))
    gv_final = gv_final if gv_final is None else gv_final.float().contiguous()
    if current.numel():
        inputs = RecurrentInputs(
            current, None, v0, weight, None, params, tuple(scalars), LIFSpec.from_token(spec), bool(needs & GIVEN_H)
        )
        named(backend).ops["recurrent_backward"](inputs, edges, LIFGrads(gs, gv, gv_final), out)
    elif out.params is not None:
        out.params.zero_()
    return tuple(out)


def _backward_fake(current, v0, weight, params, scalars, spec, edges, gs, gv, gv_final, needs, backend):
    return tuple(_allocate_backward(current, params, spec, needs))


recurrent_backward = define(
    "recurrent_backward(Tensor current, Tensor? v0, Tensor weight, Tensor? params, float[] scalars, str spec, "
    "Tensor? edges, Tensor? gs, Tensor? gv, Tensor? gv_final, int needs, str backend) -> (Tensor gx, Tensor gv0, "
    "Tensor gparams)",
    _backward,
    _backward_fake,
    None,
)


def _weight_grad(gx, s, s0, backend):
    T, _, N = gx.shape
    total = torch.zeros((N, N), dtype=torch.float32, device=gx.device)
    later, done = gx[1:].float(), T == 1 or not gx.numel()
    if not done and s.dtype == torch.uint8:
        s = s[: (T + 6) // 8]
        done = named(backend).ops["recurrent_weight_grad"](s, later, total)
        s = s if done else unpack_all(s, (T - 1, *gx.shape[1:]), pooled=False, dtype=torch.float32)
    if not done:
        total = later.flatten(0, 1).t().mm(s[: T - 1].flatten(0, 1).float())
    return total if s0 is None else total.addmm_(gx[0].float().t(), s0.float())


def _weight_grad_fake(gx, s, s0, backend):
    return gx.new_empty((gx.shape[2], gx.shape[2]), dtype=torch.float32)


recurrent_weight_grad = define(
    "recurrent_weight_grad(Tensor gx, Tensor s, Tensor? s0, str backend) -> Tensor",
    _weight_grad,
    _weight_grad_fake,
    None,
)
"""The gradient of weight, [N, N] float32: the sum over t and samples of gx[t] s[t-1]^T; s [T, B, N], or its words."""
