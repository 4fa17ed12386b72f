"""What is done between the passes of a BatchNorm + neuron, channel by channel; ``csrc/norm/finish.h`` says the same.

Statistics become the three numbers that the kernels take, and move the running ones; sums of gradients become the
numbers that the input's gradient takes, and the gradients of weight and bias. All of it is float64, whatever types the
tensors have. Running statistics move only where those of all channels are finite, so one program has to see them all:
the only one of ``finish_known``, and the last to come of ``merge_columns`` (``kernels/batch_norm.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.language as tl
from torch import Tensor

from trtkern.kernels.launch import Launch, classes, options
from trtkern.kernels.numerics import bound, exact, inline, narrow, widen

if TYPE_CHECKING:
    from trtkern.backends.base import Finish, Finished, NormGrads

CHANNELS = 256
"""Of a program that has more than one."""
ADDENDS = 2048
"""That a program has in flight: 8 of a thread."""


@inline
def number(x):
    """x in float64."""
    if x.dtype == tl.float64:
        result = x
    else:
        result = widen(x).to(tl.float64)
    return result


@inline
def rounded(x, DTYPE: tl.constexpr):
    """float64 x in DTYPE."""
    if DTYPE == tl.float64:  # noqa: SIM300 (Triton compares a constexpr so)
        result = x
    else:
        result = narrow(x.to(tl.float32), DTYPE)
    return result


@inline
def finish(c, inside, mean, var, weight, bias, moments, affine, coef, C, eps):
    """moments, affine and coef of the channels c from their mean and variance (``trtkern.backends.base.Finished``).

    The center is the mean as float32 has it, and the shift makes up for the rest: exact however large the mean is.
    """
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * number(tl.load(weight + c, mask=inside, other=0.0))
    center = mean.to(tl.float32)
    shift = (center.to(tl.float64) - mean) * scale
    if bias is not None:
        shift = shift + number(tl.load(bias + c, mask=inside, other=0.0))
    tl.store(moments + c, mean, mask=inside)
    tl.store(moments + C + c, rstd, mask=inside)
    tl.store(affine + c, center, mask=inside)
    tl.store(affine + C + c, scale.to(tl.float32), mask=inside)
    tl.store(affine + 2 * C + c, shift.to(tl.float32), mask=inside)
    if coef is not None:
        tl.store(coef + c, scale.to(tl.float32), mask=inside)
        tl.store(coef + C + c, tl.zeros_like(center), mask=inside)
        tl.store(coef + 2 * C + c, tl.zeros_like(center), mask=inside)


@inline
def _statistics(mean, spread, c, inside, values):
    """Mean and variance of the channels c, past the caches that other programs do not write through."""
    return (
        number(tl.load(mean + c, mask=inside, other=0.0, cache_modifier=".cg")),
        number(tl.load(spread + c, mask=inside, other=0.0, cache_modifier=".cg")) / values,
    )


@inline
def move(mean, spread, values, running_mean, running_var, batches, C, count, momentum, CHANNELS: tl.constexpr):
    """Running statistics after a batch, as torch's BatchNorm has them, unless a statistic is not finite.

    spread / values is the variance, count the numbers behind each mean; momentum below 0: plain averages.
    """
    finite = tl.full([CHANNELS], 1, tl.int32)
    for start in range(0, bound(C), CHANNELS):
        c = start + tl.arange(0, CHANNELS).to(tl.int64)
        m, var = _statistics(mean, spread, c, c < C, values)
        finite = tl.where((m - m == 0.0) & (var - var == 0.0), finite, 0)
    if tl.min(finite, 0) == 1:
        number_of = tl.load(batches) + 1
        tl.debug_barrier()  # all threads have read it
        tl.store(batches, number_of)
        factor = tl.where(momentum < 0.0, 1.0 / number_of.to(tl.float64), momentum)
        n = count.to(tl.float64)
        for start in range(0, bound(C), CHANNELS):
            c = start + tl.arange(0, CHANNELS).to(tl.int64)
            inside = c < C
            m, var = _statistics(mean, spread, c, inside, values)
            unbiased = var * (n / (n - 1.0))
            old_mean = number(tl.load(running_mean + c, mask=inside, other=0.0))
            old_var = number(tl.load(running_var + c, mask=inside, other=0.0))
            new_mean = old_mean + factor * (m - old_mean)
            new_var = old_var + factor * (unbiased - old_var)
            tl.store(running_mean + c, rounded(new_mean, running_mean.dtype.element_ty), mask=inside)
            tl.store(running_var + c, rounded(new_var, running_var.dtype.element_ty), mask=inside)


@inline
def finish_sums(c, inside, total, product, own, moments, affine, coef, gweight, gbias, C, count):
    """coef, and the gradients of weight and bias, of the channels c (``trtkern.backends.base.NormGrads``).

    total, product: the sums of gx and of gx * (x - center) over all processes; own [2, C]: those of this one.
    """
    mean = tl.load(moments + c, mask=inside, other=0.0)
    rstd = tl.load(moments + C + c, mask=inside, other=0.0)
    offset = mean - tl.load(affine + c, mask=inside, other=0.0).to(tl.float64)
    if coef is not None:
        scale = tl.load(affine + C + c, mask=inside, other=0.0).to(tl.float64)
        n = count.to(tl.float64)
        slope = scale * rstd * rstd * (product - offset * total) / n
        tl.store(coef + c, scale.to(tl.float32), mask=inside)
        tl.store(coef + C + c, (-slope).to(tl.float32), mask=inside)
        tl.store(coef + 2 * C + c, (slope * offset - scale * total / n).to(tl.float32), mask=inside)
    if own is not None:
        total = tl.load(own + c, mask=inside, other=0.0)
        product = tl.load(own + C + c, mask=inside, other=0.0)
    if gweight is not None:
        tl.store(gweight + c, rounded(rstd * (product - offset * total), gweight.dtype.element_ty), mask=inside)
    if gbias is not None:
        tl.store(gbias + c, rounded(total, gbias.dtype.element_ty), mask=inside)


def finish_known(
    mean, var, weight, bias, running_mean, running_var, batches, moments, affine, coef,
    C: tl.int64, count: tl.int64, eps: tl.float64, momentum: tl.float64,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """finish(), and move() unless running_mean is None, of all channels from mean and var [C]: one program."""
    C = tl.cast(C, tl.int64)
    for start in range(0, bound(C), CHANNELS):
        c = start + tl.arange(0, CHANNELS).to(tl.int64)
        m, v = _statistics(mean, var, c, c < C, exact(1.0))
        finish(c, c < C, m, v, weight, bias, moments, affine, coef, C, exact(eps))
    if running_mean is not None:
        count = tl.cast(count, tl.int64)
        move(mean, var, exact(1.0), running_mean, running_var, batches, C, count, exact(momentum), CHANNELS)


def coefficients(
    sums, own, moments, affine, coef, gweight, gbias,
    C: tl.int64, count: tl.int64,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """finish_sums() from sums [2, C] float64: a program has some channels."""
    C = tl.cast(C, tl.int64)
    c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    total = tl.load(sums + c, mask=inside, other=0.0)
    product = tl.load(sums + C + c, mask=inside, other=0.0)
    count = tl.cast(count, tl.int64)
    finish_sums(c, inside, total, product, own, moments, affine, coef, gweight, gbias, C, count)


@inline
def _added_up(partial, c, repeats, C, side, COUNT: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """[ROWS] float64, of which COUNT are there: the sums of partial [COUNT, repeats, C, side] of channel c."""
    row = tl.expand_dims(tl.arange(0, ROWS).to(tl.int64), 1)
    members = repeats * side
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(0, bound(members), BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        # 32-bit division where it is enough: the other costs a GPU a hundred instructions.
        outer = (k.to(tl.int32) // side.to(tl.int32)).to(tl.int64) if SHORT else k // side
        at = tl.expand_dims((outer * C + c) * side + (k - outer * side), 0)
        there = (row < COUNT) & tl.expand_dims(k < members, 0)
        total += tl.load(partial + row * (members * C) + at, mask=there, other=0.0).to(tl.float64)
    return tl.sum(total, 1)


def add_up(
    partial, partial_moments, gparams, sums, moments, affine, coef, gweight, gbias,
    repeats: tl.int64, C: tl.int64, side: tl.int64, count: tl.int64,
    PARAMS: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, ADDENDS: tl.constexpr,
):  # fmt: skip
    """The partial sums of a backward pass, [PARAMS or 2, repeats, C, side], of channel ``program_id``: gparams
    [PARAMS, C] and sums [2, C] float64, unless None; with moments also finish_sums()."""
    repeats = tl.cast(repeats, tl.int64)
    C = tl.cast(C, tl.int64)
    side = tl.cast(side, tl.int64)
    c = tl.program_id(0).to(tl.int64)
    if gparams is not None:
        row = tl.arange(0, ROWS)
        learned = _added_up(partial, c, repeats, C, side, PARAMS, ROWS, SHORT, ADDENDS // ROWS)
        tl.store(gparams + row.to(tl.int64) * C + c, learned.to(tl.float32), mask=row < PARAMS)
    if sums is not None:
        both = _added_up(partial_moments, c, repeats, C, side, 2, 2, SHORT, ADDENDS // 2)
        row = tl.arange(0, 2)
        tl.store(sums + row.to(tl.int64) * C + c, both)
        if moments is not None:
            here = c + tl.zeros([1], tl.int64)
            none = tl.zeros([1], tl.float64)
            total = none + tl.sum(tl.where(row == 0, both, 0.0), 0)
            product = none + tl.sum(tl.where(row == 1, both, 0.0), 0)
            count = tl.cast(count, tl.int64)
            finish_sums(here, here < C, total, product, None, moments, affine, coef, gweight, gbias, C, count)


_KNOWN, _COEFFICIENTS, _ADD_UP = (classes(function)[0] for function in (finish_known, coefficients, add_up))


def tensors_of(norm: Finish, out: Finished) -> tuple[Tensor | None, ...]:
    """weight, bias, running_mean, running_var, batches, moments, affine, coef: what does not move is None."""
    running = (norm.running_mean, norm.running_var, norm.batches) if norm.samples else (None, None, None)
    if running[0] is None:
        running = (None, None, None)
    return norm.weight, norm.bias, *running, out.moments, out.affine, out.coef


def momentum_of(norm: Finish) -> float:
    """As the kernels take it: below 0 for plain averages."""
    return -1.0 if norm.momentum is None else float(norm.momentum)


def known_launch(mean: Tensor, var: Tensor, norm: Finish, out: Finished) -> Launch:
    """From a mean and a variance [C] that are known to ``out`` and the running statistics."""
    C = out.affine.shape[1]
    args = (mean, var, *tensors_of(norm, out), C, norm.samples, float(norm.eps), momentum_of(norm), CHANNELS)
    return Launch(_KNOWN, (1,), args, options(4))


def coefficients_launch(sums: Tensor, own: Tensor | None, norm: NormGrads) -> Launch:
    """From sums [2, C] that are known to ``norm``."""
    C = norm.affine.shape[1]
    args = (sums, own, norm.moments, norm.affine, norm.coef, norm.weight, norm.bias, C, norm.samples, CHANNELS)
    return Launch(_COEFFICIENTS, (-(-C // CHANNELS),), args, options(4))


def add_up_launch(
    learned: Tensor | None, normed: Tensor | None, gparams: Tensor | None, sums: Tensor | None, norm: NormGrads | None
) -> Launch:
    """From partial sums [P, repeats, C, side] and [2, repeats, C, side] to gparams, sums and ``norm``."""
    partial = learned if learned is not None else normed
    if partial is None:
        raise ValueError("add_up_launch: expected partial sums, got None")
    params = 1 if learned is None else learned.shape[0]
    _, repeats, C, side = partial.shape
    finished = (None,) * 5 if norm is None else (norm.moments, norm.affine, norm.coef, norm.weight, norm.bias)
    count = 0 if norm is None else norm.samples
    rows = 1 << (params - 1).bit_length()
    args = (
        learned, normed, gparams, sums, *finished,
        repeats, C, side, count, params, rows, repeats * side < 1 << 31, ADDENDS,
    )  # fmt: skip
    return Launch(_ADD_UP, (C,), args, options(8))
