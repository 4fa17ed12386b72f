"""Spikes as bits: bit t % 8 of byte plane t // 8 is the spike of step t; and back, averaged 2 x 2 if asked.

Bytes moved per neuron-step, e being the bytes of an element: pack e + 1/8, unpack 1/8 + e, with pooling 1/8 + e/4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.language as tl
from torch import Tensor

from trtkern.kernels.launch import Launch, aligned, classes, options, warp_size
from trtkern.kernels.lif import load_rows
from trtkern.kernels.numerics import widen
from trtkern.kernels.pooling import (
    POSITIONS,
    first_neuron,
    geometry,
    neurons,
    place,
    pooled,
    pooled_lanes,
    positions,
)

if TYPE_CHECKING:
    from trtkern.backends.base import Pool


def pack_spikes(
    s, packed,
    T: tl.int64, n: tl.int64,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """packed [ceil(T / 8), N] from s [T, N]: a bit is set where s is not 0; a program owns eight steps of its block."""
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    plane = tl.program_id(1).to(tl.int64)
    rows = load_rows(s, offsets, mask, plane * 8, T, N, 0, 8)
    word = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(8):
        word += tl.where(widen(rows[i]) != 0.0, 1 << i, 0)
    tl.store(packed + plane * N + offsets, word.to(tl.uint8), mask=mask)


def unpack_spikes(
    packed, out,
    start: tl.int64, steps: tl.int64, n: tl.int64, half: tl.int64, side: tl.int64,
    POOL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [steps, N], or [steps, N / 4] averages, from the packed [planes, N]; a program owns one byte of its block."""
    start = tl.cast(start, tl.int64)
    steps = tl.cast(steps, tl.int64)
    N = neurons(n, POOL, ALIGNED)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    mask = base + tl.arange(0, BLOCK) < N // positions(POOL)
    shape = (tl.cast(half, tl.int64), tl.cast(side, tl.int64))
    first = first_neuron(base, shape[0], shape[1], POOL, ALIGNED, BLOCK, LANES)
    plane = start // 8 + tl.program_id(1)
    digits = tl.zeros([BLOCK], tl.int32)
    for q in tl.static_range(positions(POOL)):
        word = tl.load(
            packed + plane * N + place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES), mask=mask, other=0
        ).to(tl.int32)
        for i in tl.static_range(8):
            digits += ((word >> i) & 1) << (4 * i)
    digits = pooled(digits, POOL, BLOCK)
    lanes = pooled_lanes(base, POOL, BLOCK)
    width = N
    scale = 1.0
    if POOL != "none":
        width = N // 4
        scale = 0.25
    inside = lanes < width
    for i in tl.static_range(8):
        t = plane * 8 + i - start
        value = (((digits >> (4 * i)) & 15).to(tl.float32) * scale).to(out.dtype.element_ty)
        tl.store(out + t * width + lanes, value, mask=inside & (t >= 0) & (t < steps))


_PACK = classes(pack_spikes)
_UNPACK = classes(unpack_spikes)


def pack_launch(s: Tensor, packed: Tensor) -> Launch:
    """packed [ceil(T / 8), N] uint8 from s [T, N]."""
    T = s.shape[0]
    N = s.numel() // T
    wide = aligned(N, (s, packed))
    chosen = options(4)
    block = chosen["num_warps"] * warp_size() * (16 // s.element_size() if wide else 4)
    args = (s, packed, T, N // 16 if wide else N, wide, block)
    return Launch(_PACK[wide], (-(-N // block), -(-T // 8)), args, chosen)


def unpack_launch(packed: Tensor, start: int, pool: Pool | None, out: Tensor) -> Launch:
    """out [steps, N], or [steps, N / 4] averages, of the steps from ``start`` on."""
    steps = out.shape[0]
    N = packed.numel() // packed.shape[0]
    image = geometry("spikes_unpack", pool)
    each = 16 // out.element_size()
    wide = aligned(N, (packed, out)) and image.suits(N, each)
    chosen = options(4)
    lanes = each if wide else 4
    block = chosen["num_warps"] * warp_size() * lanes
    args = (packed, out, start, steps, *image.numbers(N, lanes, wide), image.kind, wide, block, lanes)
    planes = (start + steps - 1) // 8 - start // 8 + 1
    return Launch(_UNPACK[wide], (-(-N // POSITIONS[image.kind] // block), planes), args, chosen)
