"""The operand of a matrix product out of packed spikes, made in registers: for both directions of a convolution.

An image of spikes lies in memory with its channels last: ``packed`` is [ceil(T / 8), B, H, W, C] bytes. A program loads
a tile of bytes, pixels by channels, and makes STEPS rows of each pixel, one for each of its steps: no spike is ever in
memory as more than a bit. A bit becomes a number where it lies, without a conversion, which takes a GPU several times
as long as a shift: in int8 the bit of step i of a byte is 2^i (-128 for the last), and in a floating type it is shifted
to the place of the highest exponent bit, which alone is 2. ``unit`` has the power of two that undoes this in the sums.

With POOL a row holds how many of a pixel's 2 x 2 neurons fired, 0 to 4, in quarters. All these numbers are exact in
every dtype.

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
    first = (plane * B + p // (height * width)).to(tl.int64) * (H * W) + (row * W + column) * SIDE
    return first, row, column


@inline
def tap_pixels(row, column, inside, tap, image, window, POOL: tl.constexpr, POINT: tl.constexpr):
    """How far behind the first pixels those at one place of the window are, and which of them are within the image.

    POINT: there is one place.
    """
    ahead = tap * 0
    if not POINT:
        SIDE: tl.constexpr = 2 if POOL else 1
        _, H, W = image
        down = tap // window[2]
        right = tap % window[2]
        inside = inside & (row + down >= 0) & (row + down < H // SIDE)
        inside = inside & (column + right >= 0) & (column + right < W // SIDE)
        ahead = (down * W + right) * SIDE
    return ahead.to(tl.int64), inside


@inline
def _placed(byte, steps, DTYPE: tl.constexpr):
    """The bit of each step in DTYPE, times what ``unit`` says."""
    if tl.int8 == DTYPE:
        result = (byte & (1 << steps).to(tl.uint8)).to(tl.int8, bitcast=True)
    elif tl.float32 == DTYPE:
        result = ((byte.to(tl.uint32) << (30 - steps).to(tl.uint32)) & 0x40000000).to(tl.float32, bitcast=True)
    else:
        result = ((byte.to(tl.uint16) << (14 - steps).to(tl.uint16)) & 0x4000).to(DTYPE, bitcast=True)
    return result


@inline
def unit(shift, STEPS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr):
    """What a sum of products with the ROWS rows of the operand has to be multiplied with: a number, or [ROWS, 1]."""
    if POOL:
        result = 0.25
    elif PRECISION == "int8x3":
        step = shift + tl.arange(0, ROWS) % STEPS
        result = ((127 - step) << 23).to(tl.float32, bitcast=True)
        result = tl.where(step == 7, -result, result)[:, None]
    else:
        result = 0.5
    return result


@inline
def spikes(
    packed, offsets, inside, W, C, shift, STEPS: tl.constexpr, POOL: tl.constexpr, PIXELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The spikes of steps ``shift`` on (within a byte) at offsets [pixels, channels], as [pixels * STEPS, channels].

    PIXELS_LAST: offsets are [channels, pixels], and so is the result, [channels, pixels * STEPS].
    """
    AXIS: tl.constexpr = 2 if PIXELS_LAST else 1
    steps = shift + tl.arange(0, STEPS)
    if PIXELS_LAST:
        steps = steps[None, None, :]
    else:
        steps = steps[None, :, None]
    if POOL:
        total = tl.expand_dims(tl.zeros(offsets.shape, tl.int32), AXIS) & steps
        for q in tl.static_range(4):
            byte = tl.load(packed + offsets + ((q // 2) * W + q % 2) * C, mask=inside, other=0).to(tl.int32)
            total += (tl.expand_dims(byte, AXIS) >> steps) & 1
        result = _small(total, DTYPE)
    else:
        byte = tl.load(packed + offsets, mask=inside, other=0)
        result = _placed(tl.expand_dims(byte, AXIS), steps, DTYPE)
    if PIXELS_LAST:
        result = tl.reshape(result, [offsets.shape[0], offsets.shape[1] * STEPS])
    else:
        result = tl.reshape(result, [offsets.shape[0] * STEPS, offsets.shape[1]])
    return result


@inline
def _small(x, DTYPE: tl.constexpr):
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
