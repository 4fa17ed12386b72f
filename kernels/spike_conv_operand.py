"""The operand of a matrix product out of packed spikes, made in registers: for both directions of a convolution.

An image of spikes lies in memory with its channels last: ``packed`` is [ceil(T / 8), B, H, W, C] bytes. A program loads
a tile of bytes, pixels by channels, and makes STEPS rows of 0 and 1 of each pixel, one for each of its steps: no spike
is ever in memory as more than a bit. With POOL a row holds how many of a pixel's 2 x 2 neurons fired, 0 to 4, and who
multiplies with it divides by 4 at the end; all these numbers are exact in every dtype, int8 among them.

A convolution looks, for each place of its window (a tap), at one pixel for each pixel of its output; where the window
reaches beyond the image there are no spikes.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import INTERPRETED, inline, widen


@inline
def first_pixels(p, plane, image, window, POOL: tl.constexpr):
    """Where the window of output pixel p begins: its first pixel among those of all images, and its row and column.

    image: B, H, W of the bytes; window: height and width of the output, kernel width, stride, padding. Row and column
    are those of the image that is convolved, which with POOL is half as high and wide as that of the bytes.
    """
    SIDE: tl.constexpr = 2 if POOL else 1
    B, H, W = image
    height, width, _, stride, padding = window
    pixel = p % (height * width)
    row = pixel // width * stride - padding
    column = pixel % width * stride - padding
    first = ((plane * B + p // (height * width)).to(tl.int64) * H + row * SIDE) * W + column * SIDE
    return first, row, column


@inline
def tap_pixels(first, row, column, inside, tap, image, window, POOL: tl.constexpr, POINT: tl.constexpr):
    """The pixels at one place of the window, and which of them are within the image; POINT: there is one place."""
    if not POINT:
        SIDE: tl.constexpr = 2 if POOL else 1
        _, H, W = image
        down = tap // window[2]
        right = tap % window[2]
        inside = inside & (row + down >= 0) & (row + down < H // SIDE)
        inside = inside & (column + right >= 0) & (column + right < W // SIDE)
        first = first + (down * W + right) * SIDE
    return first, inside


@inline
def spikes(
    packed, offsets, inside, W, C, shift, STEPS: tl.constexpr, POOL: tl.constexpr, PIXELS_LAST: tl.constexpr
):  # fmt: skip
    """The spikes of steps ``shift`` on (within a byte) at offsets [pixels, channels], as [pixels * STEPS, channels].

    PIXELS_LAST: offsets are [channels, pixels], and so is the result, [channels, pixels * STEPS].
    """
    steps = shift + tl.arange(0, STEPS)
    total = None
    for q in tl.static_range(4 if POOL else 1):
        byte = tl.load(packed + offsets + ((q // 2) * W + q % 2) * C, mask=inside, other=0).to(tl.int32)
        if PIXELS_LAST:
            bits = (tl.expand_dims(byte, 2) >> steps[None, None, :]) & 1
        else:
            bits = (tl.expand_dims(byte, 1) >> steps[None, :, None]) & 1
        if total is None:
            total = bits
        else:
            total = total + bits
    if PIXELS_LAST:
        total = tl.reshape(total, [offsets.shape[0], offsets.shape[1] * STEPS])
    else:
        total = tl.reshape(total, [offsets.shape[0] * STEPS, offsets.shape[1]])
    return total


@inline
def small(x, DTYPE: tl.constexpr):
    """The integers 0 to 4 in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter multiplies the bits of bfloat16: ``product`` widens, so it need not be narrow here.
        result = x.to(tl.float32)
    else:
        result = x.to(DTYPE)
    return result


@inline
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b: in int32 of int8, else in float32."""
    if PRECISION == "int8x3":
        result = tl.dot(a, b, total, out_dtype=tl.int32)
    elif INTERPRETED:
        result = tl.dot(widen(a), widen(b), total)
    else:
        result = tl.dot(a, b, total, input_precision="ieee")
    return result
