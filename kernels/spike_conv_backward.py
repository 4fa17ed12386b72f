"""The weight's gradient of a convolution of packed spikes: the spikes are a bit each here too.

    gw[k, u, v, c] = sum over t, b, i, j of g[t, b, i, j, k] * s[t, b, i', j', c]      (i', j': kernels/spike_conv.py)

A program owns a tile of the gradient, BLOCK_C input channels of one tap and BLOCK_K output channels, and a range of the
pixels and steps that are summed over. Ranges are added up by a second kernel in their order: there are no atomics, and
two runs are bitwise equal.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import bound, inline, narrow
from trtkern.kernels.spike_conv_operand import first_pixels, product, spikes, tap_pixels, unit
from trtkern.kernels.spike_conv_parts import three_halves


@inline
def _multiplied(x, g, total, PRECISION: tl.constexpr):
    """total + x @ g; of bf16x3 the three parts of g, made in registers, the smallest first."""
    if PRECISION == "bf16x3":
        three = three_halves(g)
        for i in tl.static_range(3):
            total = product(x, three[2 - i], total, PRECISION)
    else:
        total = product(x, g, total, PRECISION)
    return total


def spike_conv_weight_gradient(
    packed, g, out,
    T: tl.int64, B: tl.int64, H: tl.int64, W: tl.int64, c: tl.int64, k: tl.int64, height: tl.int64, width: tl.int64,
    taps: tl.int64, kernel_width: tl.int64, stride: tl.int64, padding: tl.int64, ranges: tl.int64,
    PRECISION: tl.constexpr, POOL: tl.constexpr, POINT: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [ranges, K, taps, C] from packed [ceil(T / 8), B, H, W, C] and g [T, B, height, width, K].

    ALIGNED: C and K are passed divided by 16.
    """
    UNIT: tl.constexpr = 16 if ALIGNED else 1
    C = tl.cast(c, tl.int64) * UNIT
    K = tl.cast(k, tl.int64) * UNIT
    image = (tl.cast(B, tl.int32), tl.cast(H, tl.int32), tl.cast(W, tl.int32))
    window = (
        tl.cast(height, tl.int32), tl.cast(width, tl.int32), tl.cast(kernel_width, tl.int32), tl.cast(stride, tl.int32),
        tl.cast(padding, tl.int32),
    )  # fmt: skip
    P = image[0] * window[0] * window[1]
    columns = tl.cdiv(K, BLOCK_K).to(tl.int32)
    groups = tl.cdiv(C, BLOCK_C).to(tl.int32)
    tile = tl.program_id(0)
    channels = (tile % columns).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = tile // columns
    inputs = (tile % groups).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tile // groups
    tap = tile % tl.cast(taps, tl.int32)
    part = tile // tl.cast(taps, tl.int32)

    blocks = tl.cdiv(P, BLOCK_P)
    pieces = blocks * tl.cdiv(tl.cast(T, tl.int32), STEPS)
    each = tl.cdiv(pieces, tl.cast(ranges, tl.int32))
    TYPE: tl.constexpr = tl.bfloat16 if PRECISION == "bf16x3" else g.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    rows = tl.arange(0, BLOCK_P * STEPS)
    of_rows = ((rows % STEPS).to(tl.int64) * P + rows // STEPS)[:, None] * K + channels[None, :]
    for i in range(bound(part * each), bound(tl.minimum(part * each + each, pieces))):
        t0 = i // blocks * STEPS
        p0 = i % blocks * BLOCK_P
        p = p0 + tl.arange(0, BLOCK_P)
        first, row, column = first_pixels(p, t0 // 8, image, window, POOL)
        ahead, inside = tap_pixels(row, column, p < P, tap, image, window, POOL, POINT)
        mask = (inputs < C)[:, None] & inside[None, :]
        offsets = (first + ahead)[None, :] * C + inputs[:, None]
        x = spikes(packed, offsets, mask, image[2], C, t0 % 8, STEPS, POOL, True, TYPE)
        mask = ((t0 + rows % STEPS < T) & (p0 + rows // STEPS < P))[:, None] & (channels < K)[None, :]
        these = tl.load(g + (t0.to(tl.int64) * P + p0) * K + of_rows, mask=mask, other=0.0)
        total = _multiplied(x, these, total, PRECISION)

    total = total * unit(0, STEPS, BLOCK_C, POOL, PRECISION)
    offsets = ((part * K + channels)[None, :] * taps + tap) * C + inputs[:, None]
    mask = (inputs < C)[:, None] & (channels < K)[None, :]
    tl.store(out + offsets, narrow(total, out.dtype.element_ty), mask=mask)


def add_ranges(
    partial, out,
    n: tl.int64, ranges: tl.int64,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [N] = the sum of partial [ranges, N] in the order of the ranges."""
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, bound(tl.cast(ranges, tl.int32))):
        total += tl.load(partial + i * N + offsets, mask=offsets < N, other=0.0)
    tl.store(out + offsets, narrow(total, out.dtype.element_ty), mask=offsets < N)
