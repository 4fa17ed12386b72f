"""The autograd of BatchNorm + LIF, with y kept or made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.ops import _norm
from trtkern.ops._library import apply, refuse_second_derivative
from trtkern.ops._saved import Layout, keep, kept
from trtkern.ops.lif import NEED_PARAMS, NEED_SUMS, NEED_V0, NEED_X, given, wanted_grads
from trtkern.ops.spikes import unpack

OP = "batch_norm_lif"


class Source(NamedTuple):
    """What y was made from, to make it again in the backward pass instead of keeping it."""

    make: Callable[..., Tensor]
    """y from ``tensors``; it holds no tensor itself."""
    tensors: tuple[Tensor | None, ...]
    """What is kept in place of y."""


class Fixed(NamedTuple):
    """What the Function is told besides tensors."""

    scalars: tuple[float, ...]
    token: str
    inner: int
    pool: bool
    want: int
    backend: str
    samples: int
    """Numbers behind each mean; 0: it is a running one, to which no gradient flows."""
    group: Any


class Normed(torch.autograd.Function):
    """``make`` and ``source`` are those of a ``Source``; without one, y is kept."""

    @staticmethod
    def forward(y, residual, v0, weight, bias, params, mean, rstd, words, flag, fixed, make=None, *source):
        affine = _norm.affine(mean, rstd, weight, bias)
        return *torch.ops.trtkern.lif_forward(
            y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool, flag, fixed.want,
            fixed.backend,
        ), affine  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        y, residual, v0, weight, _, params, mean, rstd, words, _, ctx.fixed, ctx.make, *source = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        if ctx.make is not None:
            ctx.y = Layout.of(y)
        # The words of a residual stand for it.
        kept_residual = residual if words is None else None
        kept_y = y if ctx.make is None else None
        keep(ctx, kept_y, kept_residual, v0, weight, params, mean, rstd, words, output[3], output[5], *source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        y, residual, v0, weight, params, mean, rstd, words, edges, affine, *source = kept(ctx)
        if ctx.make is not None:
            y = ctx.y.restore(ctx.make(*source))
        if words is not None:
            residual = unpack(words, y.shape[0], dtype=y.dtype)
        gs, gv, gv_final = wanted_grads(grads, ctx.fixed.want)
        needs = tuple(ctx.needs_input_grad[:6])
        found = apply(
            NormedBackward,
            OP,
            gs,
            gv,
            gv_final,
            y,
            residual,
            v0,
            weight,
            params,
            mean,
            rstd,
            edges,
            affine,
            ctx.fixed,
            needs,
        )
        wanted = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
        return *wanted, *[None] * (6 + len(source))


class NormedBackward(torch.autograd.Function):
    @staticmethod
    def forward(gs, gv, gv_final, y, residual, v0, weight, params, mean, rstd, edges, affine, fixed, needs):
        needs_y, needs_residual, needs_v0, needs_weight, needs_bias, needs_params = needs

        def run(needed: int, coef: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return torch.ops.trtkern.lif_backward(
                y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool, edges,
                gs, gv, gv_final, coef, needed + given(fixed.want), fixed.backend,
            )  # fmt: skip

        training = fixed.samples > 0
        first = NEED_V0 * needs_v0 + NEED_PARAMS * needs_params
        if needs_weight or needs_bias or (training and needs_y):
            first += NEED_SUMS
        if needs_residual or (residual is not None and needs_y):
            # The gradient of x is the residual's, and what that of y is made of: no second recomputation.
            gx, gv0, gparams, sums = run(first + NEED_X, None)
            gy = y.new_empty(0)
            if needs_y:
                coef = _norm.coefficients(sums, mean, rstd, affine, fixed.samples, fixed.group)
                gy = torch.ops.trtkern.batch_norm_lif_input_grad(gx, y, affine, coef, fixed.inner, fixed.backend)
            residual_grad = gx
        elif training:
            _, gv0, gparams, sums = run(first, None)
            gy = y.new_empty(0)
            if needs_y:
                coef = _norm.coefficients(sums, mean, rstd, affine, fixed.samples, fixed.group)
                gy = run(NEED_X, coef)[0]
            residual_grad = y.new_empty(0)
        else:
            coef = _norm.coefficients(None, mean, rstd, affine, 0, None)
            gy, gv0, gparams, sums = run(first + NEED_X, coef)
            residual_grad = y.new_empty(0)
        gweight, gbias = _norm.affine_grads(sums, mean, rstd, affine, weight if needs_weight or needs_bias else None)
        return gy, residual_grad, gv0, gweight, gbias, gparams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative(OP)
