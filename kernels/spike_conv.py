"""Convolutions and linear layers of packed spikes, forward: an implicit matrix product that reads a bit a spike.

    out[t, b, i, j, k] = sum over taps (u, v) and channels c of weight[k, u, v, c] * s[t, b, i', j', c]   (+ bias[k])

with i' = stride * i + u - padding and j' alike. A program owns BLOCK_P output pixels at STEPS steps, which are the rows
of its tile, and BLOCK_K output channels; it walks over taps and channels, and in each step loads a byte for all STEPS
rows of a pixel and channel (``kernels/spike_conv_operand.py``). A linear layer is a convolution of images of one pixel.

PRECISION says what multiplies: "ieee" float32, "half" the half types as they are, "bf16x3" and "int8x3" float32 weights
in three parts (``kernels/spike_conv_parts.py``). Sums are float32, of int8 int32.

Bytes read for a tile and a step of the walk: BLOCK_P * BLOCK_C of spikes, four times that with POOL, and BLOCK_C *
BLOCK_K weights, in three parts 3 bytes each of int8 and 6 of bfloat16. ``kernels/spike_conv_launch.py`` chooses all of
this.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import bound, fma, inline, narrow, widen
from trtkern.kernels.spike_conv_operand import first_pixels, product, spikes, tap_pixels, unit


@inline
def _summed(totals, scale, channels, inside, PRECISION: tl.constexpr):
    """float32 sums from those of the parts: of int8 each in int32, the digits' weights are 65536, 256 and 1."""
    result = totals[0]
    if PRECISION == "int8x3":
        lower = fma(totals[1].to(tl.float32), 256.0, totals[2].to(tl.float32))
        each = tl.load(scale + channels, mask=inside, other=0.0)
        result = fma(totals[0].to(tl.float32), 65536.0, lower) * each[None, :]
    return result


@inline
def _multiplied(x, weight, offsets, mask, size, totals, PRECISION: tl.constexpr):
    """totals + x @ each part of the weight; bfloat16 parts into one sum, the smallest first."""
    if PRECISION == "int8x3":
        result = (
            product(x, tl.load(weight + offsets, mask=mask, other=0), totals[0], PRECISION),
            product(x, tl.load(weight + size + offsets, mask=mask, other=0), totals[1], PRECISION),
            product(x, tl.load(weight + 2 * size + offsets, mask=mask, other=0), totals[2], PRECISION),
        )
    else:
        total = totals[0]
        for i in tl.static_range(3 if PRECISION == "bf16x3" else 1):
            part = 2 - i if PRECISION == "bf16x3" else 0
            total = product(x, tl.load(weight + part * size + offsets, mask=mask, other=0.0), total, PRECISION)
        result = (total,)
    return result


def spike_conv_forward(
    packed, weight, scale, bias, out,
    T: tl.int64, B: tl.int64, H: tl.int64, W: tl.int64, c: tl.int64, k: tl.int64, height: tl.int64, width: tl.int64,
    taps: tl.int64, kernel_width: tl.int64, stride: tl.int64, padding: tl.int64,
    PRECISION: tl.constexpr, POOL: tl.constexpr, POINT: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [T, B, height, width, K] from packed [ceil(T / 8), B, H, W, C] and weight [parts, K, taps, C].

    ALIGNED: C and K are passed divided by 16, which makes wide accesses provable.
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
    tile = tl.program_id(0)
    channels = (tile % columns).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = tile // columns
    blocks = tl.cdiv(P, BLOCK_P)
    t0 = tile // blocks * STEPS
    p = tile % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first, row, column = first_pixels(p, t0 // 8, image, window, POOL)

    zero = tl.zeros([BLOCK_P * STEPS, BLOCK_K], tl.int32 if PRECISION == "int8x3" else tl.float32)
    totals = (zero,)
    if PRECISION == "int8x3":
        totals = (zero, zero, zero)
    TYPE: tl.constexpr = weight.dtype.element_ty
    groups = tl.cdiv(C, BLOCK_C).to(tl.int32)
    inputs = tl.arange(0, BLOCK_C)
    # What a step of the walk adds to these is one number, so that no step multiplies in 64 bits for each element.
    of_pixels = first[:, None] * C + inputs[None, :]
    of_weights = channels[None, :] * (taps * C) + inputs[:, None]
    for i in range(0, bound(tl.cast(taps, tl.int32) * groups)):
        tap = i // groups
        c0 = (i % groups) * BLOCK_C
        ahead, inside = tap_pixels(row, column, p < P, tap, image, window, POOL, POINT)
        mask = inside[:, None] & (inputs < C - c0)[None, :]
        x = spikes(packed + (ahead * C + c0), of_pixels, mask, image[2], C, t0 % 8, STEPS, POOL, False, TYPE)
        mask = (inputs < C - c0)[:, None] & (channels < K)[None, :]
        totals = _multiplied(x, weight + (tap * C + c0), of_weights, mask, K * taps * C, totals, PRECISION)

    result = _summed(totals, scale, channels, channels < K, PRECISION)
    result = result * unit(t0 % 8, STEPS, BLOCK_P * STEPS, POOL, PRECISION)
    if bias is not None:
        result = result + widen(tl.load(bias + channels, mask=channels < K, other=0.0))[None, :]
    rows = tl.arange(0, BLOCK_P * STEPS)
    t = t0 + rows % STEPS
    p = tile % blocks * BLOCK_P + rows // STEPS
    offsets = (t.to(tl.int64) * P + p)[:, None] * K + channels[None, :]
    mask = ((t < T) & (p < P))[:, None] & (channels < K)[None, :]
    tl.store(out + offsets, narrow(result, out.dtype.element_ty), mask=mask)
