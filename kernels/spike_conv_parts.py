"""A float32 number as three numbers that tensor cores multiply: exact products with spikes, which are small integers.

bf16x3: w = high + middle + low, the 24 bits of its significand cut into three bfloat16 of 8 bits each. The sum is w
itself; below 2^-110 the last bits are lost, which are less than 2^-133. Infinity is (infinity, 0, 0), NaN three NaN.

int8x3: fixed point, relative to the largest |w| of a row (an output channel). With e the largest exponent for which
2^e * max|w| <= 127 * 65536 + 127 * 256 + 127, and at most 126,

    q = round(2^e * w) = 65536 * d0 + 256 * d1 + d2,    d0, d1, d2 in [-128, 127]

so q / 2^e is w to within 2^-(e + 1), which is max|w| / 8355711 (2^-22.99) at the most, or 2^-127 if that is more. Sums
of products with the digits are integers and exact. The three of them are made float32 and added up at the end, which
costs 2^-23 of the result and a fiftieth of what the digits cost. So a sum over inputs x is exact to within

    sum(x) * max|w| / 8200000  +  2^-23 of itself

where a sum in float32 has that second error once for each addition. A row with NaN or infinity gives NaN for all inputs
(as 0 * NaN does; an infinite weight would be infinity where its input alone is 1).
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import bound, inline

INFINITE = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(0xFEFEFE)
"""Twice the largest sum of three digits: the largest 24-bit significand that needs no smaller e."""


@inline
def _half(bits):
    """A bfloat16 from the upper half of these bits of a float32."""
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@inline
def _cut(w):
    """The upper 8 bits of w's significand as a float32, and the rest, which is exact."""
    upper = (w.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return upper, tl.where(upper == w, 0.0, w - upper)


@inline
def three_halves(w):
    """w as three bfloat16, the largest first."""
    high, rest = _cut(w)
    middle, low = _cut(rest)
    return (
        _half(high.to(tl.uint32, bitcast=True)), _half(middle.to(tl.uint32, bitcast=True)),
        _half(low.to(tl.uint32, bitcast=True)),
    )  # fmt: skip


@inline
def _exponent(largest):
    """e, from the bits of max|w|."""
    e = 149 - (largest >> 23) - tl.where((largest & 0x7FFFFF | 0x800000) > LARGEST, 1, 0)
    return tl.minimum(e, 126)


@inline
def _power_of_two(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@inline
def three_digits(w, e):
    """w as three int8, the largest first; zeros where w is not finite."""
    finite = tl.abs(w) < float("inf")
    q = tl.floor(tl.where(finite, w, 0.0) * _power_of_two(e) + 0.5).to(tl.int32)
    low = ((q + 128) & 255) - 128
    q = (q - low) >> 8
    middle = ((q + 128) & 255) - 128
    return ((q - middle) >> 8).to(tl.int8), middle.to(tl.int8), low.to(tl.int8)


def split_weight(
    weight, parts, scale,
    K: tl.int64, R: tl.int64, one: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [3, K, R] of weight [K, R] float32; int8 with their scale [K], 2^-e, or bfloat16 if scale is None.

    A program owns a row. one: 1, so that no compiler knows how the loops step.
    """
    row = tl.program_id(0).to(tl.int64)
    R = tl.cast(R, tl.int64)
    K = tl.cast(K, tl.int64)
    columns = tl.arange(0, BLOCK)
    e = 0
    if scale is not None:
        most = tl.zeros([BLOCK], tl.int32)
        for start in range(0, bound(R), BLOCK):
            w = tl.load(weight + row * R + start + columns, mask=start + columns < R, other=0.0)
            most = tl.maximum(most, w.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.max(most, 0)  # of the bits: those of NaN are above those of infinity
        e = _exponent(largest)
        tl.store(scale + row, tl.where(largest < INFINITE, _power_of_two(-e), float("nan")))
    for start in range(0, bound(R), BLOCK):
        inside = start + columns < R
        w = tl.load(weight + row * R + start + columns, mask=inside, other=0.0)
        if scale is None:
            three = three_halves(w)
        else:
            three = three_digits(w, e)
        for i in tl.static_range(3):
            tl.store(parts + (i * K + row) * R + start + columns, three[i], mask=inside)
