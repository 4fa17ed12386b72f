"""Statistics of batch normalisation, and the gradient of its input where it is elementwise.

Bytes moved per neuron-step, e being the bytes of an element: statistics e (and 24 a column), input_grad 3e.

Statistics: memory is [rows, columns] with a multiple of the channels' period as columns. A lane owns a column and sees
nothing but differences from the column's first element: a large mean costs no accuracy. Of a piece of rows it takes
the mean, then the squared deviations from that mean, and merges both into what it has (Chan, Golub and LeVeque 1979). A
second kernel merges the columns of a channel in float64. Nothing depends on timing: two runs are bitwise equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from trtkern.kernels.batch_norm_finish import CHANNELS, finish, momentum_of, move, tensors_of
from trtkern.kernels.channels import channel, combined, vectors
from trtkern.kernels.launch import FEWEST_COLUMNS, Launch, aligned, channel_class, classes, options, warp_size
from trtkern.kernels.lif import load_rows
from trtkern.kernels.numerics import bound, exact, fma, inline, narrow, widen

if TYPE_CHECKING:
    from trtkern.backends.base import Finish, Finished

PIECE = 8  # rows in flight


@inline
def _merge(mean, squares, n, mean_new, squares_new, n_new):
    """Mean and squared deviations of n and n_new elements together."""
    share = n_new / (n + n_new)
    delta = mean_new - mean
    return fma(delta, share, mean), squares + fma(delta * delta, n * share, squares_new)


def column_statistics(
    x, partial, counter,
    total: tl.int64, columns: tl.int64,
    ALIGNED: tl.constexpr, SHARED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partial [3, columns] float32: the first element of each column, and of all elements' differences from it the mean
    and the sum of squared deviations from that. Elements of a column of x [total] are `columns` apart; with SHARED
    LANES columns make one, so that there are columns / LANES. counter, unless None, is set to 0 for merge_columns."""
    if counter is not None:
        tl.store(counter, 0, mask=tl.program_id(0) == 0)
    factor = 16 if ALIGNED else 1
    total = tl.cast(total, tl.int64) * factor
    S = tl.cast(columns, tl.int64) * factor
    base = tl.program_id(0).to(tl.int64) * BLOCK
    column = base + tl.arange(0, BLOCK)
    inside = column < S
    rows = total // S
    zero = tl.zeros([BLOCK], tl.float32)
    pivot = zero
    mean = zero
    squares = zero
    for r in range(0, bound(rows), PIECE):
        piece = load_rows(x, column, inside, r, rows, S, 0, PIECE)
        pivot = tl.where(tl.cast(r, tl.int64) == 0, widen(piece[0]), pivot)
        count = tl.minimum(rows - r, PIECE).to(tl.float32)
        mean_here = zero
        for i in tl.static_range(PIECE):
            mean_here += tl.where(r + i < rows, widen(piece[i]) - pivot, 0.0)
        mean_here = mean_here / count
        squares_here = zero
        for i in tl.static_range(PIECE):
            d = tl.where(r + i < rows, widen(piece[i]) - pivot - mean_here, 0.0)
            squares_here = fma(d, d, squares_here)
        mean, squares = _merge(mean, squares, tl.cast(r, tl.float32), mean_here, squares_here, count)
    # The last row may be short.
    last = rows * S + column
    d = widen(tl.load(x + last, mask=inside & (last < total), other=0.0)) - pivot
    mean_last, squares_last = _merge(mean, squares, rows.to(tl.float32), d, 0.0, 1.0)
    mean = tl.where(last < total, mean_last, mean)
    squares = tl.where(last < total, squares_last, squares)
    if SHARED:
        G: tl.constexpr = BLOCK // LANES
        count = tl.where(last < total, 1.0, 0.0) + rows.to(tl.float32)
        pivots = tl.reshape(pivot, [G, LANES])
        pivot = tl.sum(tl.where(tl.expand_dims(tl.arange(0, LANES), 0) == 0, pivots, 0.0), 1)
        means = tl.reshape(mean, [G, LANES]) + (pivots - tl.expand_dims(pivot, 1))
        mean = tl.sum(means, 1) / LANES
        d = means - tl.expand_dims(mean, 1)
        squares = tl.sum(tl.reshape(squares, [G, LANES]) + tl.reshape(count, [G, LANES]) * d * d, 1)
        S = S // LANES
        column = base // LANES + tl.arange(0, G)
        inside = column < S
    tl.store(partial + column, pivot, mask=inside)
    tl.store(partial + S + column, mean, mask=inside)
    tl.store(partial + 2 * S + column, squares, mask=inside)


def merge_columns(
    partial, stats, counter, weight, bias, running_mean, running_var, batches, moments, affine, coef,
    total: tl.int64, columns: tl.int64, C: tl.int64, inner: tl.int64, count: tl.int64, eps: tl.float64,
    momentum: tl.float64,
    MERGED: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """stats [2, C] float64, the mean and the sum of squared deviations of each channel, from column_statistics.

    With affine the channel is finished; with running_mean the last program, which ``counter`` tells, moves the running
    statistics of all (``kernels/batch_norm_finish.py``). MERGED: elements of a row that were taken together; total,
    columns and inner are divided by it.
    """
    total = tl.cast(total, tl.int64)
    S = tl.cast(columns, tl.int64)
    C = tl.cast(C, tl.int64)
    inner = tl.cast(inner, tl.int64)
    c = tl.program_id(0)
    pivot = tl.load(partial + c * inner).to(tl.float64) + tl.load(partial + S + c * inner).to(tl.float64)
    numbers = tl.zeros([BLOCK], tl.float64)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    members = S // C
    for start in range(0, bound(members), BLOCK):
        lane = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = lane < members
        column = partial + (lane // inner * C + c) * inner + lane % inner
        rows = (total - (lane // inner * C + c) * inner - lane % inner + S - 1) // S
        n = tl.where(inside, rows * MERGED, 0).to(tl.float64)
        d = tl.load(column, mask=inside, other=0.0).to(tl.float64)
        d += tl.load(column + S, mask=inside, other=0.0).to(tl.float64) - pivot
        d = tl.where(inside, d, 0.0)
        numbers += n
        first += n * d
        second += n * d * d + tl.load(column + 2 * S, mask=inside, other=0.0).to(tl.float64)
    n = tl.sum(numbers, 0)
    shift = tl.sum(first, 0) / n
    mean = pivot + shift
    squares = tl.sum(second, 0) - n * shift * shift
    squares = tl.where(squares < 0.0, 0.0, squares)
    tl.store(stats + c, mean)
    tl.store(stats + C + c, squares)
    if affine is not None:
        here = c.to(tl.int64) + tl.zeros([1], tl.int64)
        none = tl.zeros([1], tl.float64)
        finish(here, here < C, none + mean, none + squares / n, weight, bias, moments, affine, coef, C, exact(eps))
    if running_mean is not None:
        tl.debug_barrier()  # what all threads stored comes before the count
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before.to(tl.int64) == C - 1:
            move(
                stats, stats + C, n, running_mean, running_var, batches, C, tl.cast(count, tl.int64), exact(momentum),
                CHANNELS,
            )  # fmt: skip


def input_gradient(
    gx, x, affine, coef, out,
    T: tl.int64, n: tl.int64, C: tl.int64, inner: tl.int64,
    STATIC: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out = coef[0] * gx + coef[1] * (x - center) + coef[2]; gx, x and out [T, N], with STATIC x [N]."""
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    C = tl.cast(C, tl.int64)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = base + tl.arange(0, BLOCK)
    mask = offsets < N
    c = channel(C, tl.cast(inner, tl.int64), base, CHANNELS, BLOCK, LANES)
    a = vectors(affine, c, C, 1, CHANNELS, BLOCK, LANES)
    k = vectors(coef, c, C, 3, CHANNELS, BLOCK, LANES)
    for t0 in range(0, bound(T), STEPS):
        gradients = load_rows(gx, offsets, mask, t0, T, N, 0, STEPS)
        rows = load_rows(x, offsets, mask, t0, T, N, 0, STEPS, STATIC)
        for i in tl.static_range(STEPS):
            value = combined(widen(gradients[i]), rows[i], a, k)
            tl.store(out + (t0 + i) * N + offsets, narrow(value, out.dtype.element_ty), mask=mask & (t0 + i < T))


_COLUMNS = classes(column_statistics)
_MERGE = classes(merge_columns)[0]
_INPUT = classes(input_gradient)


def statistics_columns(total: int, period: int, wide: bool) -> int:
    """The columns of the statistics: a multiple of the channels' period, one element each if there are few."""
    unit = math.lcm(period, 16) if wide else period
    return min(total, -(-FEWEST_COLUMNS // unit) * unit)


def statistics_launches(x: Tensor, channels: int, inner: int, stats: Tensor) -> tuple[Launch, Launch]:
    """From x [T, N] to stats [2, channels] float64, mean and sum of squared deviations: two launches, in this order."""
    return _statistics_launches(x, channels, inner, stats, None, (None,) * 8, (0, 1.0, 0.0))


def affine_launches(x: Tensor, inner: int, norm: Finish, out: Finished) -> tuple[Launch, Launch]:
    """From x [T, N] to ``out`` and the running statistics: two launches, in this order."""
    stats = torch.empty_like(out.moments)
    counter = None
    tensors = tensors_of(norm, out)
    if tensors[2] is not None:
        counter = torch.empty(1, dtype=torch.int32, device=x.device)
    numbers = (norm.samples, float(norm.eps), momentum_of(norm))
    return _statistics_launches(x, out.affine.shape[1], inner, stats, counter, tensors, numbers)


def _statistics_launches(
    x: Tensor, channels: int, inner: int, stats: Tensor, counter: Tensor | None, tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, float, float],
) -> tuple[Launch, Launch]:  # fmt: skip
    """tensors, numbers: of merge_columns, those that are no statistics and no sizes."""
    total = x.numel()
    wide = aligned(total, (x,))
    columns = statistics_columns(total, channels * inner, wide)
    chosen, lanes, block = _block(x, wide)
    merged = lanes if wide and inner % lanes == 0 else 1
    partial = x.new_empty((3, columns // merged), dtype=torch.float32)
    unit = 16 if wide else 1
    args = (x, partial, counter, total // unit, columns // unit, wide, merged > 1, PIECE, block, lanes)
    first = Launch(_COLUMNS[wide], (-(-columns // block),), args, chosen)
    merge = (
        partial, stats, counter, *tensors, total // merged, columns // merged, channels, inner // merged, *numbers,
        merged, 1024, CHANNELS,
    )  # fmt: skip
    return first, Launch(_MERGE, (channels,), merge, options(8))


def input_gradient_launch(gx: Tensor, x: Tensor, affine: Tensor, coef: Tensor, inner: int, out: Tensor) -> Launch:
    """out = coef[0] * gx + coef[1] * (x - center) + coef[2], x maybe the same at every step."""
    T = gx.shape[0]
    N = gx.numel() // T
    wide = aligned(N, (gx, x, out))
    chosen, lanes, block = _block(x, wide)
    C = affine.shape[1]
    kind = channel_class("batch_norm_lif_input_grad", C, inner, lanes, wide)
    args = (
        gx, x, affine, coef, out, T, N // 16 if wide else N, C, inner,
        T > 1 and x.stride(0) == 0, wide, kind, 4, block, lanes,
    )  # fmt: skip
    return Launch(_INPUT[wide], (-(-N // block),), args, chosen)


def _block(x: Tensor, wide: bool) -> tuple[dict[str, Any], int, int]:
    """Options, neurons of a thread and of a program."""
    chosen = options(4)
    lanes = 16 // x.element_size() if wide else 4
    return chosen, lanes, chosen["num_warps"] * warp_size() * lanes
