"""Per-channel vectors: the channel of neuron n is (n // inner) % C, whatever the layout."""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import fma, inline, widen


@inline
def channel(C, inner, base, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The channel of each of the BLOCK lanes at base, of each LANES of them where they share it; 0 if there is one."""
    c = 0
    if CHANNELS == "many" or CHANNELS == "shared":
        EACH: tl.constexpr = LANES if CHANNELS == "shared" else 1
        # One 64-bit division a program, 32-bit ones for the lanes.
        first = base % (C * inner)
        lane = (first % inner // EACH).to(tl.int32) + tl.arange(0, BLOCK // EACH)
        c = ((first // inner).to(tl.int32) + lane // (inner // EACH).to(tl.int32)) % C.to(tl.int32)
    return c


@inline
def vectors(table, c, C, COUNT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The COUNT rows of table [COUNT, C] at channel c; numbers when there is one channel; none if table is None."""
    rows = ()
    if table is not None:
        for i in tl.static_range(COUNT):
            if CHANNELS == "one":
                row = tl.load(table + i)
            else:
                row = tl.load(table + i * C + c)
            if CHANNELS == "shared":
                # The lanes of a thread hold it once.
                row = tl.reshape(tl.broadcast_to(tl.expand_dims(row, 1), [BLOCK // LANES, LANES]), [BLOCK])
            rows = rows + (row,)  # noqa: RUF005 (Triton knows no starred expression)
    return rows


@inline
def input_current(x, residual, a, AFFINE: tl.constexpr):
    """The input current: x, or scale * (x - center) + shift with a = (center, scale, shift), (+ residual)."""
    current = widen(x)
    if AFFINE:
        current = fma(a[1], current - a[0], a[2])
    if residual is not None:
        current = current + widen(residual)
    return current


@inline
def combined(gx, x, a, k):
    """k[0] * gx + k[1] * (x - center) + k[2], the gradient of what was normalised."""
    return fma(k[0], gx, fma(k[1], widen(x) - a[0], k[2]))
