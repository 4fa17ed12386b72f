"""Delays: out[t] = a x[t - k] + b x[t - k - 1], where the delay of a channel is k + b steps and a = 1 - b.

A program owns a block of neurons and walks along the steps. Each neuron reads a row of its own, and at the next step
that row is the other one that it needs, so each element is read once. Neighbours with other delays read other rows: an
access is an element wide, and the rows between meet in the caches. Backward the same in the other direction, with

    gx[s] = a g[s + k] + b g[s + k + 1]        and for the delay's gradient        x[s] * (g[s + k + 1] - g[s + k])

summed over the steps in float32 within a chunk and in float64 beyond. Bytes moved per neuron-step, e being the bytes of
an element: forward 2e, backward 2e, and e more where the delay is learned. A weight of 0 reads nothing, for 0 * NaN is
NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from trtkern.kernels.channels import channel, vectors
from trtkern.kernels.launch import Launch, aligned, channel_class, classes, options, warp_size
from trtkern.kernels.numerics import bound, inline, narrow, widen

if TYPE_CHECKING:
    from trtkern.backends.base import DelayGrads, Delays

STEPS = 8
"""Of a chunk, whose reads are in flight at once."""


@inline
def _weights(
    delays, c, C, most, ROUNDED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The whole steps of each neuron, and the weights of the row that is so far away and of the one beyond."""
    delay = vectors(delays, c, C, 1, CHANNELS, BLOCK, LANES)[0]
    last = tl.cast(most, tl.float32)
    held = tl.where(delay > 0.0, tl.where(delay < last, delay, last), 0.0)
    whole = tl.minimum(tl.floor(held), tl.maximum(last - 1.0, 0.0))
    far = tl.where(delay == delay, held - whole, delay)
    if ROUNDED:
        far = tl.where(far >= 0.5, 1.0, tl.where(far < 0.5, 0.0, far))
    return whole.to(tl.int64), 1.0 - far, far


@inline
def _mixed(near, far, a, b):
    """a * near + b * far."""
    return tl.where(b == 0.0, near, tl.where(a == 0.0, far, a * near + b * far))


@inline
def _row(x, v0, offsets, step, T, N, most, mask):
    """x at a step of each neuron; v0 before the first one, zeros where that is None; zeros behind the last."""
    row = tl.load(x + step * N + offsets, mask=mask & (step >= 0) & (step < T), other=0.0)
    if v0 is not None:
        before = tl.load(v0 + (step + most) * N + offsets, mask=mask & (step < 0), other=0.0)
        row = tl.where(step < 0, before, row)
    return widen(row)


def delay_forward(
    x, v0, delays, out,
    T: tl.int64, n: tl.int64, most: tl.int64, C: tl.int64, inner: tl.int64,
    ROUNDED: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """out [T, N] from x [T, N] and what came before it, v0 [most, N]."""
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    most = tl.cast(most, tl.int64)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = base + tl.arange(0, BLOCK)
    mask = offsets < N
    c = channel(tl.cast(C, tl.int64), tl.cast(inner, tl.int64), base, CHANNELS, BLOCK, LANES)
    k, a, b = _weights(delays, c, tl.cast(C, tl.int64), most, ROUNDED, CHANNELS, BLOCK, LANES)
    # What is one step further back than most is never looked at: a delay of most is its row before and this one.
    far = _row(x, v0, offsets, -1 - k, T, N, most, mask & (k < most))
    for t0 in range(0, bound(T), STEPS):
        for i in tl.static_range(STEPS):
            t = t0 + i
            near = _row(x, v0, offsets, t - k, T, N, most, mask & (t < T))
            made = narrow(_mixed(near, far, a, b), out.dtype.element_ty)
            tl.store(out + t * N + offsets, made, mask=mask & (t < T))
            far = near


@inline
def _back(g, x, gx, far, sums, offsets, k, a, b, last, count, T, N, mask, STEPS: tl.constexpr):
    """Steps last, last - 1, ..., ``count`` of them: g at the last of their rows, and the sums so far."""
    for j0 in range(0, bound(count), STEPS):
        some = tl.zeros(far.shape, tl.float32)
        for i in tl.static_range(STEPS):
            j = j0 + i
            inside = mask & (j < count)
            s = last - j
            near = widen(tl.load(g + (s + k) * N + offsets, mask=inside & (s + k >= 0) & (s + k < T), other=0.0))
            if gx is not None:
                made = narrow(_mixed(near, far, a, b), gx.dtype.element_ty)
                tl.store(gx + s * N + offsets, made, mask=inside)
            if x is not None:
                some += widen(tl.load(x + s * N + offsets, mask=inside, other=0.0)) * (far - near)
            far = tl.where(j < count, near, far)
        if x is not None:
            sums += some.to(tl.float64)
    return far, sums


def delay_backward(
    g, x, v0, delays, gx, gv0, partial,
    T: tl.int64, n: tl.int64, most: tl.int64, C: tl.int64, inner: tl.int64,
    ROUNDED: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """gx [T, N] and gv0 [most, N] from g [T, N]; partial [N] float64: what each neuron adds to its delay's gradient."""
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    most = tl.cast(most, tl.int64)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = base + tl.arange(0, BLOCK)
    mask = offsets < N
    c = channel(tl.cast(C, tl.int64), tl.cast(inner, tl.int64), base, CHANNELS, BLOCK, LANES)
    k, a, b = _weights(delays, c, tl.cast(C, tl.int64), most, ROUNDED, CHANNELS, BLOCK, LANES)
    sums = tl.zeros([BLOCK], tl.float64)
    far = tl.zeros([BLOCK], tl.float32)
    far, sums = _back(g, x, gx, far, sums, offsets, k, a, b, T - 1, T, T, N, mask, STEPS)
    if gv0 is not None or v0 is not None:
        # The steps from -most to -1, counted from the beginning of v0.
        far, sums = _back(g, v0, gv0, far, sums, offsets, k - most, a, b, most - 1, most, T, N, mask, STEPS)
    if partial is not None:
        tl.store(partial + offsets, sums, mask=mask)


_FORWARD = classes(delay_forward)
_BACKWARD = classes(delay_backward)


def _numbers(x: Tensor, delay: Delays, wide: bool) -> tuple[tuple, int, dict]:
    """What both kernels take behind their pointers, the programs, and the options."""
    T = x.shape[0]
    N, C, chosen = x.numel() // T, delay.steps.numel(), options(4)
    lanes = 16 // x.element_size() if wide else 4
    block = chosen["num_warps"] * warp_size() * lanes
    kind = channel_class("delay", C, delay.inner, lanes, wide)
    numbers = (T, N // 16 if wide else N, delay.most, C, delay.inner, delay.rounded, kind, wide, block, lanes, STEPS)
    return numbers, -(-N // block), chosen


def forward_launch(x: Tensor, v0: Tensor | None, delay: Delays, out: Tensor) -> Launch:
    """out [T, N]: x delayed."""
    wide = aligned(x.numel() // x.shape[0], (x, v0, out))
    numbers, programs, chosen = _numbers(x, delay, wide)
    return Launch(_FORWARD[wide], (programs,), (x, v0, delay.steps, out, *numbers), chosen)


def backward_launch(
    g: Tensor, x: Tensor | None, v0: Tensor | None, delay: Delays, out: DelayGrads
) -> tuple[Launch, Tensor | None]:
    """The launch that fills ``out`` but for the delays' gradient, and the sums [N] float64 that it leaves for that."""
    N = g.numel() // g.shape[0]
    partial = None if out.delays is None else g.new_empty(N, dtype=torch.float64)
    read = (x, v0) if out.delays is not None else (None, None)
    wide = aligned(N, (g, *read, out.x, out.v0))
    numbers, programs, chosen = _numbers(g, delay, wide)
    args = (g, *read, delay.steps, out.x, out.v0, partial, *numbers)
    return Launch(_BACKWARD[wide], (programs,), args, chosen), partial
