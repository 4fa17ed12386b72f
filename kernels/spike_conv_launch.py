"""From the tensors of a spike convolution to its launches: geometry, tiles, and the arguments in order.

A linear layer is a convolution of images of one pixel: its tensors have no axes for them. Everything lies in memory as
torch's ``channels_last`` has it: the bytes as [ceil(T / 8), B, H, W, C], weights as [K, kh, kw, C], outputs and their
gradient as [T, B, height, width, K]. Where C or K is no multiple of 16, accesses are an element wide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.kernels.launch import Launch, aligned, classes, options
from trtkern.kernels.spike_conv import spike_conv_forward
from trtkern.kernels.spike_conv_backward import add_ranges, spike_conv_weight_gradient
from trtkern.kernels.spike_conv_parts import split_weight

_FORWARD = classes(spike_conv_forward)
_GRADIENT = classes(spike_conv_weight_gradient)
_SPLIT = classes(split_weight)
_ADD = classes(add_ranges)

PRECISIONS = ("ieee", "bf16x3", "int8x3")
"""How float32 weights are multiplied; weights of half precision know one way, and take no notice of this."""
PROGRAMS = 512
"""As many programs as a GPU is given by splitting a sum: the gradient's tiles alone may be few."""
FEWEST_PIECES = 8
"""Pieces of a range at the least."""


class Tile(NamedTuple):
    """What a program owns, and how it is compiled."""

    rows: int
    """Pixels times steps."""
    K: int
    C: int
    warps: int
    stages: int
    """Of the pipeline that loads ahead."""


FORWARD_TILES = {
    "ieee": Tile(64, 64, 16, 4, 2),
    "half": Tile(128, 128, 64, 8, 3),
    "bf16x3": Tile(128, 64, 32, 8, 3),
    "int8x3": Tile(128, 64, 64, 8, 3),
}
GRADIENT_TILES = {
    "ieee": Tile(16, 64, 64, 4, 2),
    "half": Tile(64, 128, 64, 8, 3),
    "bf16x3": Tile(32, 64, 64, 8, 2),
}


class _Sizes(NamedTuple):
    """Of a spike convolution."""

    T: int
    B: int
    H: int
    """Of the image of the bytes, as W."""
    W: int
    C: int
    K: int
    height: int
    """Of the output, as width."""
    width: int
    kernel_height: int
    kernel_width: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        return self.kernel_height * self.kernel_width

    @property
    def point(self) -> bool:
        """Whether the window is one pixel, which is always within the image."""
        return self.taps == 1 and self.padding == 0

    @property
    def pixels(self) -> int:
        """Of all outputs of a step."""
        return self.B * self.height * self.width

    def numbers(self, wide: bool) -> tuple[int, ...]:
        """As the kernels take them."""
        unit = 16 if wide else 1
        return (
            *(self.T, self.B, self.H, self.W, self.C // unit, self.K // unit, self.height, self.width),
            *(self.taps, self.kernel_width, self.stride, self.padding),
        )


def steps_of(T: int) -> int:
    """Steps of a byte that a program makes rows of, 8, 4, 2 or 1: the most of which the last program does not leave
    more than a quarter of the rows to no step. (T = 4, 7, 8, 16: all of a byte's; T = 6: 2; T = 10: 4.)"""
    return next(steps for steps in (8, 4, 2, 1) if -(-T // steps) * steps <= 1.25 * T)


def _images(tensor: Tensor) -> Tensor:
    """With two axes for the pixels behind the channels, of which a linear layer has none."""
    return tensor if tensor.dim() >= 4 else tensor[..., None, None]


def _sizes(packed: Tensor, weight: Tensor, out: Tensor, stride: int, padding: int, pooled: bool) -> _Sizes:
    """The sizes of a call whose tensors fit each other and lie in memory with their channels last."""
    packed, weight, out = (_images(each) for each in (packed, weight, out))
    for name, each in (("packed spikes", packed), ("weight", weight), ("output or its gradient", out)):
        if not each.movedim(-3, -1).is_contiguous():
            got = f"shape {tuple(each.shape)} and strides {each.stride()}"
            raise ValueError(f"spike_conv: expected the {name} with channels last in memory, got {got}; convert it")
    planes, B, C, H, W = packed.shape
    K, _, kernel_height, kernel_width = weight.shape
    T = out.shape[0] // B if B else 8 * planes  # of no images any T is right
    side = 2 if pooled else 1
    height, width = (
        (size // side + 2 * padding - window) // stride + 1 for size, window in ((H, kernel_height), (W, kernel_width))
    )
    if (T * B, K, height, width) != out.shape or weight.shape[1] != C or planes != -(-T // 8):
        shapes = f"{tuple(packed.shape)}, {tuple(weight.shape)} and {tuple(out.shape)}"
        raise ValueError(
            f"spike_conv: expected packed spikes [ceil(T / 8), B, C, H, W], a weight [K, C, kh, kw] and an output "
            f"[T * B, K, {height}, {width}], got {shapes}"
        )
    found = _Sizes(T, B, H, W, C, K, height, width, kernel_height, kernel_width, stride, padding)
    if max(found.pixels, B * H * W) >= 1 << 30:
        raise ValueError(
            f"spike_conv: expected fewer than 2**30 pixels a step, got {found.pixels}; use a smaller batch"
        )
    return found


def _plan(tile: Tile, T: int) -> tuple[int, int, dict]:
    """STEPS, BLOCK_P and the options of a launch."""
    steps = steps_of(T)
    return steps, tile.rows // steps, {**options(tile.warps), "num_stages": tile.stages}


def _precision(dtype: torch.dtype, asked: str, known: dict[str, Tile]) -> str:
    if dtype != torch.float32:
        return "half"
    if asked not in PRECISIONS or asked not in known:
        raise ValueError(
            f"spike_conv: expected a precision of {', '.join(set(PRECISIONS) & set(known))}, got {asked!r}"
        )
    return asked


def split_launch(weight: Tensor, precision: str) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch that cuts a weight, channels last in memory, into parts [3, K, taps * C]; these; their scale [K]."""
    K = weight.shape[0]
    R = weight.numel() // max(K, 1)
    whole = precision == "int8x3"
    parts = weight.new_empty(3, K, R, dtype=torch.int8 if whole else torch.bfloat16)
    scale = weight.new_empty(K) if whole else None
    return Launch(_SPLIT[0], (K,), (weight, parts, scale, K, R, 1, 1024), options(4)), parts, scale


def forward_launches(
    packed: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, stride: int = 1, padding: int = 0,
    pooled: bool = False, precision: str = "ieee",
) -> list[Launch]:  # fmt: skip
    """out = conv2d(spikes, weight, bias): one launch, or two where the weight is cut into three first.

    Args:
        packed: [ceil(T / 8), B, C, H, W] uint8, or [ceil(T / 8), B, C] of a linear layer.
        weight: [K, C, kh, kw] or [K, C], float32, bfloat16 or float16.
        bias: [K] or None.
        out: [T * B, K, height, width] or [T * B, K]; it is written whole, and says what T is.
        pooled: the convolution is over 2 x 2 averages of the spikes, H // 2 by W // 2 of them.
        precision: of float32 weights, one of ``PRECISIONS``.

    Raises:
        ValueError: shapes that do not fit, channels that are not last in memory, too large sizes, another precision.
    """
    sizes = _sizes(packed, weight, out, stride, padding, pooled)
    if not out.numel():
        return []
    precision = _precision(weight.dtype, precision, FORWARD_TILES)
    if precision == "int8x3" and sizes.taps * sizes.C * (4 if pooled else 128) >= 1 << 24:
        got = f"{sizes.taps * sizes.C}{' pooled' if pooled else ''}"
        raise ValueError(f"spike_conv: expected sums of fewer inputs than int32 holds with int8x3, got {got}")
    before, scale = [], None
    if precision in ("int8x3", "bf16x3"):
        launch, weight, scale = split_launch(weight, precision)
        before.append(launch)
    wide = aligned(math.gcd(sizes.C, sizes.K), (packed, weight, scale, bias, out))
    tile = FORWARD_TILES[precision]
    if not wide:  # an address for each element: those of a larger tile do not fit into the registers
        tile = tile._replace(C=min(tile.C, 32))
    steps, block, chosen = _plan(tile, sizes.T)
    programs = -(-sizes.T // steps) * -(-sizes.pixels // block) * -(-sizes.K // tile.K)
    args = (
        packed, weight, scale, bias, out, *sizes.numbers(wide), precision, pooled, sizes.point, wide, steps, block,
        tile.K, tile.C,
    )  # fmt: skip
    return [*before, Launch(_FORWARD[wide], (programs,), args, chosen)]


def _ranges(pieces: int, tiles: int) -> int:
    """Into how many ranges a sum of so many pieces is split; none of them is empty."""
    wanted = max(1, min(-(-PROGRAMS // tiles), pieces // FEWEST_PIECES))
    return max(1, -(-pieces // max(1, -(-pieces // wanted))))


def weight_gradient_launches(
    packed: Tensor, g: Tensor, out: Tensor, *, stride: int = 1, padding: int = 0, pooled: bool = False,
    precision: str = "ieee",
) -> list[Launch]:  # fmt: skip
    """out = the gradient of ``forward_launches``' weight, in its shape and dtype: one launch, or two where its sums are
    split.

    Args:
        g: [T * B, K, height, width] or [T * B, K], the gradient of what it wrote, in its dtype.
        precision: of a float32 g, one of ``PRECISIONS`` but int8x3, which wants a scale a row.

    Raises:
        ValueError: as there.
    """
    sizes = _sizes(packed, out, g, stride, padding, pooled)
    if not out.numel():
        return []
    precision = _precision(g.dtype, precision, GRADIENT_TILES)
    tile = GRADIENT_TILES[precision]
    steps, block, chosen = _plan(tile, sizes.T)
    tiles = sizes.taps * -(-sizes.C // tile.C) * -(-sizes.K // tile.K)
    ranges = _ranges(-(-sizes.T // steps) * -(-sizes.pixels // block), tiles)
    total = out if ranges == 1 else g.new_empty(ranges, out.numel(), dtype=torch.float32)
    wide = aligned(math.gcd(sizes.C, sizes.K), (packed, g, out, total))
    args = (
        packed, g, total, *sizes.numbers(wide), ranges, precision, pooled, sizes.point, wide, steps, block, tile.K,
        tile.C,
    )  # fmt: skip
    launches = [Launch(_GRADIENT[wide], (tiles * ranges,), args, chosen)]
    if ranges > 1:
        N = out.numel()
        even = aligned(N, (total, out))
        args = (total, out, N // 16 if even else N, ranges, even, 1024)
        launches.append(Launch(_ADD[even], (-(-N // 1024),), args, options(4)))
    return launches
