"""The forward LIF kernel, and what both directions share: a program owns a block of neurons, state in registers.

Memory is [T, N], time outermost. T and N are run-time numbers. STEPS is 4, 8 or 16 (T <= STEPS: straight-line code) or
16 with LOOP (any T, in chunks of 16 steps). ALIGNED: N is passed divided by 16, which makes 16-byte accesses provable.

Bytes moved per neuron-step, e being the bytes of an element: forward 2e (e more for v), backward 3e; when T > 16 the
forward writes and the backward reads 4/16 more for the edges. ``trtkern/kernels/lif_launch.py`` chooses all of this.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.numerics import bound, fma, inline, narrow, widen


@inline
def parameters(scalars, values, C, inner, base, mask, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """decay, gain, bias, reset_amount, threshold, v_reset: six scalars, or six rows for the block at base."""
    if CHANNELS == "none":
        p = scalars
    elif CHANNELS == "one":
        p = (
            tl.load(values),
            tl.load(values + 1),
            tl.load(values + 2),
            tl.load(values + 3),
            tl.load(values + 4),
            tl.load(values + 5),
        )
    else:
        # One 64-bit division a program, 32-bit ones for the lanes.
        first = base % (C * inner)
        lane = (first % inner).to(tl.int32) + tl.arange(0, BLOCK)
        row = values + ((first // inner).to(tl.int32) + lane // inner.to(tl.int32)) % C.to(tl.int32)
        p = (
            tl.load(row, mask=mask, other=0.0),
            tl.load(row + C, mask=mask, other=0.0),
            tl.load(row + 2 * C, mask=mask, other=0.0),
            tl.load(row + 3 * C, mask=mask, other=0.0),
            tl.load(row + 4 * C, mask=mask, other=0.0),
            tl.load(row + 5 * C, mask=mask, other=0.0),
        )
    return p


@inline
def load_rows(pointer, offsets, mask, t0, T, N, START: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows from step t0 + START on, all in flight at once; zeros after the last step; none if pointer is None."""
    rows = ()
    if pointer is not None:
        pointer = pointer + t0 * N + START * N
        for i in tl.static_range(COUNT):
            row = tl.load(pointer + offsets, mask=mask & (t0 + (START + i) < T), other=0.0)
            rows = rows + (row,)  # noqa: RUF005 (Triton knows no starred expression)
            pointer = pointer + N
    return rows


@inline
def charge(p, v, x):
    """h = decay * v + gain * x + bias"""
    return fma(p[0], v, fma(p[1], widen(x), p[2]))


@inline
def reset_after(p, h, RESET: tl.constexpr):
    """v after the reset that follows h."""
    if RESET == "hard":
        v = tl.where(h > p[4], p[5], h)
    elif RESET == "soft":
        v = tl.where(h > p[4], h - p[3], h)
    else:
        v = h
    return v


@inline
def _chunk(x, s, v_all, p, v, poison, offsets, mask, t0, T, N, RESET: tl.constexpr, STEPS: tl.constexpr):
    """Steps t0 to t0 + STEPS; returns v after them and poison, which is NaN once an h was not finite."""
    rows = load_rows(x, offsets, mask, t0, T, N, 0, STEPS)
    for i in tl.static_range(STEPS):
        live = t0 + i < T
        h = charge(p, v, rows[i])
        v = tl.where(live, reset_after(p, h, RESET), v)
        poison = tl.where(live, fma(h, 0.0, poison), poison)
        if s is not None:
            spike = tl.where(h > p[4], 1.0, 0.0).to(s.dtype.element_ty)
            tl.store(s + (t0 + i) * N + offsets, spike, mask=mask & live)
        if v_all is not None:
            tl.store(v_all + (t0 + i) * N + offsets, narrow(v, v_all.dtype.element_ty), mask=mask & live)
    return v, poison


def lif_forward(
    x, v0, values, s, v_all, v_final, edges, flag,
    T: tl.int64, n: tl.int64, C: tl.int64, inner: tl.int64,
    decay: tl.float32, gain: tl.float32, bias: tl.float32,
    reset_amount: tl.float32, threshold: tl.float32, v_reset: tl.float32,
    RESET: tl.constexpr, STEPS: tl.constexpr, LOOP: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes s, v_all [T, N], v_final [N], edges [edges, N] and flag, each unless it is None, from x [T, N] and v0 [N].

    values: None, or the parameters [6, C] float32, else the six numbers after inner count.
    """
    T = tl.cast(T, tl.int64)
    # The factor 16 is what makes rows provably aligned.
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = base + tl.arange(0, BLOCK)
    mask = offsets < N
    scalars = (decay, gain, bias, reset_amount, threshold, v_reset)
    p = parameters(scalars, values, tl.cast(C, tl.int64), tl.cast(inner, tl.int64), base, mask, CHANNELS, BLOCK)
    v = tl.zeros([BLOCK], tl.float32)
    if v0 is not None:
        v = tl.load(v0 + offsets, mask=mask, other=0.0)
    poison = tl.zeros([BLOCK], tl.float32)
    if LOOP:
        for t0 in range(0, bound(T), STEPS):
            v, poison = _chunk(x, s, v_all, p, v, poison, offsets, mask, t0, T, N, RESET, STEPS)
            if edges is not None:
                tl.store(edges + (t0 // STEPS) * N + offsets, v, mask=mask & (t0 + STEPS < T))
    else:
        v, poison = _chunk(x, s, v_all, p, v, poison, offsets, mask, 0, T, N, RESET, STEPS)
    if v_final is not None:
        tl.store(v_final + offsets, v, mask=mask)
    if flag is not None:
        # A thread sums its own lanes: nothing is exchanged.
        bad = tl.sum(tl.reshape(tl.where(mask, poison, 0.0), [BLOCK // LANES, LANES]), 1)
        tl.store(flag + tl.zeros([BLOCK // LANES], tl.int32), 1, mask=bad != bad)
