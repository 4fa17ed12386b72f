"""The autograd of BatchNorm + LIF, with y kept or made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.ops import _check, _norm
from trtkern.ops._library import refuse_second_derivative
from trtkern.ops._lif import NEED_PARAMS, NEED_SUMS, NEED_V0, NEED_X, given, wanted_grads
from trtkern.ops.spikes import unpack

OP = "batch_norm_lif"


class Source(NamedTuple):
    """What y was made from, to make it again in the backward pass instead of keeping it."""

    x: Tensor
    """[T, B, ...] dense."""
    words: Tensor | None
    """Kept in place of x; x is then 2x2 averages of them if ``pooled``."""
    pooled: bool
    weight: Tensor
    bias: Tensor | None
    make: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """y from x, weight and bias."""


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
    @staticmethod
    def forward(y, residual, v0, weight, bias, params, mean, rstd, words, flag, fixed):
        affine = _norm.affine(mean, rstd, weight, bias)
        return *torch.ops.trtkern.lif_forward(
            y, v0, params, affine, residual, fixed.scalars, fixed.token, fixed.inner, fixed.pool, flag, fixed.want,
            fixed.backend,
        ), affine  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        y, residual, v0, weight, _, params, mean, rstd, words, _, ctx.fixed = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        # The words of a residual stand for it.
        ctx.dtype = y.dtype
        kept = residual if words is None else None
        ctx.save_for_backward(y, kept, v0, weight, params, mean, rstd, words, output[3], output[5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        y, residual, v0, weight, params, mean, rstd, words, edges, affine = ctx.saved_tensors
        if words is not None:
            residual = unpack(words, y.shape[0], dtype=ctx.dtype)
        gs, gv, gv_final = wanted_grads(grads, ctx.fixed.want)
        needs = tuple(ctx.needs_input_grad[:6])
        found = NormedBackward.apply(
            gs, gv, gv_final, y, residual, v0, weight, params, mean, rstd, edges, affine, ctx.fixed, needs
        )
        wanted = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
        return *wanted, *[None] * 5


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


class Recomputed(torch.autograd.Function):
    """The same from what y was made of: neither y nor, where there are words, the dense input is kept."""

    @staticmethod
    def forward(x, x_words, conv_weight, conv_bias, y, residual, v0, weight, bias, params, mean, rstd, words, flag,
                fixed, source):  # fmt: skip
        return Normed.forward(y, residual, v0, weight, bias, params, mean, rstd, words, flag, fixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, x_words, conv_weight, conv_bias, y, residual, v0, weight, _, params, mean, rstd, words, _, *rest = inputs
        ctx.fixed, source = rest
        ctx.pooled, ctx.make, ctx.dtype, ctx.x_dtype, ctx.steps = source.pooled, source.make, y.dtype, x.dtype, len(y)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        kept_x = x if x_words is None else None
        kept_residual = residual if words is None else None
        ctx.save_for_backward(
            kept_x, x_words, conv_weight, conv_bias, kept_residual, v0, weight, params, mean, rstd, words, output[3],
            output[5],
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, x_words, conv_weight, conv_bias, residual, v0, weight, params, mean, rstd, words, edges, affine = (
            ctx.saved_tensors
        )
        if x_words is not None:
            x = unpack(x_words, ctx.steps, pooled=ctx.pooled, dtype=ctx.x_dtype)
        if words is not None:
            residual = unpack(words, ctx.steps, dtype=ctx.dtype)
        needs_x, _, needs_weight, needs_bias, _, *others = ctx.needs_input_grad[:10]
        leaves = [t if t is None else t.detach().requires_grad_(needed)
                  for t, needed in ((x, needs_x), (conv_weight, needs_weight), (conv_bias, needs_bias))]  # fmt: skip
        through = needs_x or needs_weight or needs_bias
        with torch.enable_grad():
            made = ctx.make(*leaves)
        y = made.detach()
        y = _check.poolable(y) if ctx.fixed.pool else _check.dense(y)
        needs = (through, *others)
        gy, gresidual, gv0, gweight, gbias, gparams = NormedBackward.forward(
            *wanted_grads(grads, ctx.fixed.want), y, residual, v0, weight, params, mean, rstd, edges, affine,
            ctx.fixed, needs,
        )  # fmt: skip
        asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(made, asked, gy) if through else ())
        behind = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        rest = [
            grad if needed else None
            for grad, needed in zip((gresidual, gv0, gweight, gbias, gparams), others, strict=True)
        ]
        return behind[0], None, behind[1], behind[2], None, *rest, *[None] * 6
