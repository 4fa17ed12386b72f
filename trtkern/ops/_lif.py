"""The private LIF ops: what the backends fill, allocated and registered once for LIF and for BatchNorm + LIF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.backends import named
from trtkern.backends.base import CHUNK, LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, Pool
from trtkern.ops import checks, layout
from trtkern.ops._library import define
from trtkern.ops._mapped import Fold, Mapped, sample
from trtkern.spec import LIFSpec

WANT_SPIKES, WANT_V, WANT_STATE, WANT_EDGES, WANT_PACKED, WANT_H = 1, 2, 4, 8, 16, 32
NEED_V0, NEED_PARAMS, NEED_X, NEED_SUMS, GIVEN_H = 1, 2, 4, 8, 16


def wanted_grads(grads: tuple, want: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of s, v (or h) and v_final; None where the output was not made."""
    gs, gv, gv_final, *_ = grads
    made = gs if want & WANT_SPIKES else None, gv if want & (WANT_V | WANT_H) else None
    return *made, gv_final if want & WANT_STATE else None


def given(want: int) -> int:
    """Added to what a backward pass needs: whether the gradient that comes for v is that of h."""
    return GIVEN_H if want & WANT_H else 0


class Call(NamedTuple):
    """What both directions are told, in the order of the schemas; tensors first."""

    x: Tensor
    """[T, ...], dense, or one dense step expanded along time."""
    v0: Tensor | None
    params: Tensor | None
    affine: Tensor | None
    """[3, C] float32: center, scale, shift; None: x is the input current."""
    residual: Tensor | None
    scalars: Sequence[float]
    token: str
    inner: int
    pool: bool
    """Average s over 2 x 2 neurons; x is then [T, B, C, H, W], contiguous or channels last, H and W even."""


def _inputs(call: Call, before: bool) -> LIFInputs:
    """What the backend reads, in the layout that it expects; the last look before addresses are taken."""
    x, v0, params, affine, residual, scalars, token, inner, pool = call
    if not (layout.is_dense(x) or layout.is_static(x)):
        raise RuntimeError(f"lif: expected x to be dense with time outermost, got {checks.describe(x)}")
    if pool and (x.shape[-2] % 2 or x.shape[-1] % 2):
        raise RuntimeError(f"lif: expected images with even sides to pool, got {checks.describe(x)}")
    checks.parameter_values("lif", params)
    if v0 is not None:
        v0 = layout.aligned_like(v0, x[0], torch.float32)
    norm = None
    if affine is not None:
        if residual is not None:
            residual = layout.aligned(residual, x.shape, layout.strides(x), x.dtype, x)
        norm = Norm(affine, residual)
    halves = Pool(x.stride(-2), x.stride(-1)) if pool else None
    return LIFInputs(x, v0, params, tuple(scalars), LIFSpec.from_token(token), inner, norm, halves, before)


def _empty_spikes(x: Tensor, pool: bool) -> Tensor:
    return x.new_empty_strided(*layout.pooled_shape(x)) if pool else layout.empty(x)


def _allocate(x: Tensor, pool: bool, want: int) -> LIFForward:
    """The outputs of the forward pass, in x's layout; an unwanted one is None."""
    steps, neurons = x.shape[0], x[0].numel()
    edges = packed = None
    if want & WANT_EDGES:
        edges = x.new_empty(((steps - 1) // CHUNK, neurons), dtype=torch.float32)
    if want & WANT_PACKED:
        planes = ((steps + 7) // 8, *x.shape[1:])
        packed = x.new_empty_strided(planes, layout.strides(x), dtype=torch.uint8)
    return LIFForward(
        s=_empty_spikes(x, pool) if want & WANT_SPIKES else None,
        v=layout.empty(x) if want & (WANT_V | WANT_H) else None,
        v_final=layout.empty(x[:1], torch.float32)[0] if want & WANT_STATE else None,
        edges=edges,
        flag=None,
        packed=packed,
    )


def _returned(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs as a schema has them: an empty tensor stands for an unwanted one."""
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _forward(x, v0, params, affine, residual, scalars, spec, inner, pool, flag, want, backend):
    inputs = _inputs(Call(x, v0, params, affine, residual, scalars, spec, inner, pool), bool(want & WANT_H))
    out = _allocate(x, pool, want)
    if x.numel():
        named(backend).ops["lif_forward"](inputs, out._replace(flag=flag))
    return _returned(x, *out[:4], out.packed)


def _forward_fake(x, v0, params, affine, residual, scalars, spec, inner, pool, flag, want, backend):
    out = _allocate(x, pool, want)
    return _returned(x, *out[:4], out.packed)


def _folded(count: int, dims: tuple, call: Call, own: bool) -> tuple[Fold, Call]:
    """The call of all samples together; ``own``: each has sums of its own over the neurons of a channel."""
    at: Any = Call(*dims[: len(call)])
    rows, at_rows = (call.params, at.params) if call.affine is None else (call.affine, at.affine)
    own = own or at.params is not None or at.affine is not None
    channels = sample(rows, at_rows).shape[1] if own and rows is not None else None
    fold = Fold(call.x, at.x, count, channels, call.inner, call.pool)
    return fold, call._replace(
        x=fold.steps(call.x, at.x),  # type: ignore[arg-type]
        v0=fold.step(call.v0, at.v0),
        params=fold.rows(call.params, at.params),
        affine=fold.rows(call.affine, at.affine),
        residual=fold.steps(call.residual, at.residual),
        inner=fold.inner,
    )


def _made(*outputs: tuple[bool, Callable[[Tensor], Mapped], Tensor]) -> tuple[tuple[Tensor, ...], tuple]:
    """What a rule returns: of every output that was wanted, the samples apart."""
    tensors, dims = zip(*((apart(t) if wanted else (t, None)) for wanted, apart, t in outputs), strict=True)
    return tensors, dims


def _forward_mapped(info: Any, dims: tuple, *given: Any) -> tuple:
    *inputs, flag, want, backend = given
    fold, call = _folded(info.batch_size, dims, Call(*inputs), False)
    # The kernel raises one flag, which is then that of every sample.
    raised = flag if dims[len(inputs)] is None else flag.new_zeros(1)
    s, v, v_final, edges, packed = torch.ops.trtkern.lif_forward(*call, raised, want, backend)
    if raised is not flag:
        flag.bitwise_or_(raised)
    return _made(
        (bool(want & WANT_SPIKES), fold.out_steps, s),
        (bool(want & (WANT_V | WANT_H)), fold.out_steps, v),
        (bool(want & WANT_STATE), fold.out_step, v_final),
        (bool(want & WANT_EDGES), fold.out_flat, edges),
        (bool(want & WANT_PACKED), fold.out_steps, packed),
    )


_CALL = (
    "Tensor x, Tensor? v0, Tensor? params, Tensor? affine, Tensor? residual, float[] scalars, str spec, SymInt inner, "
    "bool pool"
)
define(
    f"lif_forward({_CALL}, Tensor(a!)? flag, int want, str backend) "
    "-> (Tensor s, Tensor v, Tensor v_final, Tensor edges, Tensor packed)",
    _forward,
    _forward_fake,
    _forward_mapped,
)


def _allocate_backward(x: Tensor, params: Tensor | None, affine: Tensor | None, needs: int) -> LIFBackward:
    return LIFBackward(
        x=layout.empty(x) if needs & NEED_X else None,
        v0=layout.empty(x[:1], torch.float32)[0] if needs & NEED_V0 else None,
        params=torch.empty_like(params) if needs & NEED_PARAMS and params is not None else None,
        sums=x.new_empty((2, affine.shape[1]), dtype=torch.float64)
        if needs & NEED_SUMS and affine is not None
        else None,
    )


def _backward(
    x, v0, params, affine, residual, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, needs, backend
):
    inputs = _inputs(Call(x, v0, params, affine, residual, scalars, spec, inner, pool), bool(needs & GIVEN_H))
    spikes = layout.pooled_shape(x) if pool else (x.shape, layout.strides(x))
    grads = LIFGrads(
        None if gs is None else layout.aligned(gs, *spikes, x.dtype, x),
        None if gv is None else layout.aligned(gv, x.shape, layout.strides(x), x.dtype, x),
        None if gv_final is None else layout.aligned_like(gv_final, x[0], torch.float32),
        coef,
    )
    out = _allocate_backward(x, params, affine, needs)
    if x.numel():
        named(backend).ops["lif_backward"](inputs, edges if edges.numel() else None, grads, out)
    else:
        for sums in (out.params, out.sums):
            if sums is not None:
                sums.zero_()
    return _returned(x, *out)


def _backward_fake(
    x, v0, params, affine, residual, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, needs, backend
):
    return _returned(x, *_allocate_backward(x, params, affine, needs))


def _backward_mapped(info: Any, dims: tuple, *given: Any) -> tuple:
    *inputs, edges, gs, gv, gv_final, coef, needs, backend = given
    at_edges, at_gs, at_gv, at_gv_final, at_coef = dims[len(inputs) : len(inputs) + 5]
    own = bool(needs & (NEED_PARAMS | NEED_SUMS)) or at_coef is not None
    fold, call = _folded(info.batch_size, dims, Call(*inputs), own)
    gx, gv0, gparams, gsums = torch.ops.trtkern.lif_backward(
        *call,
        fold.flat(edges, at_edges) if edges.dim() > 1 else edges,
        fold.steps(gs, at_gs),
        fold.steps(gv, at_gv),
        fold.step(gv_final, at_gv_final),
        fold.rows(coef, at_coef),
        needs,
        backend,
    )
    return _made(
        (bool(needs & NEED_X), fold.out_steps, gx),
        (bool(needs & NEED_V0), fold.out_step, gv0),
        (bool(needs & NEED_PARAMS) and call.params is not None, fold.out_rows, gparams),
        (bool(needs & NEED_SUMS) and call.affine is not None, fold.out_rows, gsums),
    )


define(
    f"lif_backward({_CALL}, Tensor edges, Tensor? gs, Tensor? gv, Tensor? gv_final, Tensor? coef, int needs, "
    "str backend) -> (Tensor gx, Tensor gv0, Tensor gparams, Tensor sums)",
    _backward,
    _backward_fake,
    _backward_mapped,
)
