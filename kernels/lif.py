"""The forward LIF kernel, and what both directions share: a program owns a block of neurons, state in registers.

Memory is [T, N], time outermost. T and N are run-time numbers. STEPS is 4, 8 or 16 (T <= STEPS: straight-line code) or
16 with LOOP (any T, in chunks of 16 steps). ALIGNED: N is passed divided by 16 (with pooling by 64), which makes
16-byte accesses provable. What is None (affine, residual, packed, ...) leaves no code behind.

Bytes moved per neuron-step, e being the bytes of an element: forward 2e (e more for v, e for a residual, 1/8 for packed
spikes), backward 3e; when T > 16 the forward writes and the backward reads 4/16 more for the edges.
``trtkern/kernels/lif_launch.py`` chooses all of this.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.channels import channel, current, vectors
from trtkern.kernels.numerics import bound, fma, inline, narrow, widen
from trtkern.kernels.pooling import first_neuron, neurons, place, pooled, pooled_lanes, positions


@inline
def parameters(
    scalars, values, c, C, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """decay, gain, bias, reset_amount, threshold, v_reset: six numbers, or the six rows of values."""
    p = scalars
    if values is not None:
        p = vectors(values, c, C, 6, CHANNELS, BLOCK, LANES)
    return p


@inline
def load_rows(
    pointer, offsets, mask, t0, T, N, START: tl.constexpr, COUNT: tl.constexpr, STATIC: tl.constexpr = False
):  # fmt: skip
    """COUNT rows from step t0 + START on, all in flight at once; zeros after the last step; none if pointer is None.

    STATIC: there is one row, the same at every step.
    """
    rows = ()
    if pointer is not None:
        if STATIC:
            row = tl.load(pointer + offsets, mask=mask, other=0.0)
            for _ in tl.static_range(COUNT):
                rows = rows + (row,)  # noqa: RUF005 (Triton knows no starred expression)
        else:
            pointer = pointer + t0 * N + START * N
            for i in tl.static_range(COUNT):
                row = tl.load(pointer + offsets, mask=mask & (t0 + (START + i) < T), other=0.0)
                rows = rows + (row,)  # noqa: RUF005
                pointer = pointer + N
    return rows


@inline
def charge(p, v, y):
    """h = decay * v + gain * y + bias, y being the input current."""
    return fma(p[0], v, fma(p[1], y, p[2]))


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
def _chunk(
    inputs, outputs, edges, p, a, v, poison, counts, offsets, mask, t0, T, N,
    RESET: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr, STATIC: tl.constexpr, AFFINE: tl.constexpr,
    POOLED: tl.constexpr,
):  # fmt: skip
    """Steps t0 to t0 + STEPS of one position; returns v after them, poison and counts.

    poison is NaN once an h, or a v as it is written, was not finite; counts holds a digit of four bits a step, one
    number for eight steps.
    """
    x, residual = inputs
    s, v_all, packed = outputs
    rows = load_rows(x, offsets, mask, t0, T, N, 0, STEPS, STATIC)
    added = load_rows(residual, offsets, mask, t0, T, N, 0, STEPS)
    after = ()
    for byte in tl.static_range((STEPS + 7) // 8):
        word = tl.zeros(v.shape, tl.int32)
        digits = tl.zeros(v.shape, tl.int32)
        if POOLED:
            digits = counts[byte]
        for i in tl.static_range(byte * 8, min(STEPS, byte * 8 + 8)):
            live = t0 + i < T
            h = charge(p, v, current(rows[i], added[i] if residual is not None else None, a, AFFINE))
            v = tl.where(live, reset_after(p, h, RESET), v)
            poison = tl.where(live, fma(h, 0.0, poison), poison)
            if POOLED:
                digits += tl.where(h > p[4], 1 << (4 * (i % 8)), 0)
            elif s is not None:
                spike = tl.where(h > p[4], 1.0, 0.0).to(s.dtype.element_ty)
                tl.store(s + (t0 + i) * N + offsets, spike, mask=mask & live)
            if packed is not None:
                word += tl.where((h > p[4]) & live, 1 << (i % 8), 0)
            if v_all is not None:
                shown = narrow(h if BEFORE else v, v_all.dtype.element_ty)
                tl.store(v_all + (t0 + i) * N + offsets, shown, mask=mask & live)
                poison = tl.where(live, fma(widen(shown), 0.0, poison), poison)
        if packed is not None:
            plane = packed + (t0 // 8 + byte) * N
            tl.store(plane + offsets, word.to(tl.uint8), mask=mask & (t0 + byte * 8 < T))
        after = after + (digits,)  # noqa: RUF005
    if edges is not None:
        tl.store(edges + (t0 // STEPS) * N + offsets, v, mask=mask & (t0 + STEPS < T))
    return v, poison, after


@inline
def _store_averages(s, counts, base, t0, T, N, STEPS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """s [T, N / 4] of STEPS steps from their counts of spikes."""
    lanes = pooled_lanes(base, POOL, BLOCK)
    inside = lanes < N // 4
    for byte in tl.static_range((STEPS + 7) // 8):
        digits = pooled(counts[byte], POOL, BLOCK)
        for i in tl.static_range(min(STEPS, 8)):
            t = t0 + (byte * 8 + i)
            average = ((digits >> (4 * i)) & 15).to(tl.float32) * 0.25
            tl.store(s + t * (N // 4) + lanes, average.to(s.dtype.element_ty), mask=inside & (t < T))


@inline
def _all_positions(
    inputs, outputs, edges, p, a, vs, poison, first, shape, base, mask, t0, T, N,
    RESET: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr, STATIC: tl.constexpr, AFFINE: tl.constexpr,
    POOL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Steps t0 to t0 + STEPS of the neurons at each position; returns v of each after them, and poison."""
    if POOL == "none":
        v, poison, _ = _chunk(
            inputs, outputs, edges, p, a, vs[0], poison, None, first, mask, t0, T, N,
            RESET, BEFORE, STEPS, STATIC, AFFINE, False,
        )  # fmt: skip
        vs = (v,)
    else:
        zero = tl.zeros([BLOCK], tl.int32)
        counts = (zero, zero) if STEPS > 8 else (zero,)
        # Not unrolled: the positions must not compete for registers. The first v is always the one whose turn it is.
        for q in range(positions(POOL)):
            offsets = place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES)
            N_here = tl.where(q < T + 4, N, 0)  # opaque: or the address of every row is kept from one to the next
            v, poison, counts = _chunk(
                inputs, outputs, edges, p, a, vs[0], poison, counts, offsets, mask, t0, T, N_here,
                RESET, BEFORE, STEPS, STATIC, AFFINE, True,
            )  # fmt: skip
            vs = vs[1:] + (v,)  # noqa: RUF005
        if outputs[0] is not None:
            _store_averages(outputs[0], counts, base, t0, T, N, STEPS, POOL, BLOCK)
    return vs, poison


def lif_forward(
    x, v0, values, affine, residual, s, v_all, v_final, edges, packed, flag,
    T: tl.int64, n: tl.int64, C: tl.int64, inner: tl.int64, half: tl.int64, side: tl.int64,
    decay: tl.float32, gain: tl.float32, bias: tl.float32,
    reset_amount: tl.float32, threshold: tl.float32, v_reset: tl.float32,
    RESET: tl.constexpr, BEFORE: tl.constexpr, STATIC: tl.constexpr, STEPS: tl.constexpr, LOOP: tl.constexpr,
    POOL: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes s, v_all [T, N], v_final [N], edges [edges, N], packed [ceil(T / 8), N] bytes and flag, unless None.

    BEFORE: v_all is h, before the reset.

    x [T, N], with STATIC [N]; v0 [N]; values: None, or the parameters [6, C] float32, else the six numbers after side;
    affine: None, or [3, C] float32; residual: None or [T, N]. With POOL s is [T, N / 4], and half, side and inner are
    those of ``pooling.py``.
    """
    T = tl.cast(T, tl.int64)
    N = neurons(n, POOL, ALIGNED)
    C = tl.cast(C, tl.int64)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    mask = base + tl.arange(0, BLOCK) < N // positions(POOL)
    shape = (tl.cast(half, tl.int64), tl.cast(side, tl.int64))
    first = first_neuron(base, shape[0], shape[1], POOL, ALIGNED, BLOCK, LANES)
    c = channel(C, tl.cast(inner, tl.int64), base, CHANNELS, BLOCK, LANES)
    p = parameters((decay, gain, bias, reset_amount, threshold, v_reset), values, c, C, CHANNELS, BLOCK, LANES)
    a = vectors(affine, c, C, 3, CHANNELS, BLOCK, LANES)
    vs = ()
    for q in tl.static_range(positions(POOL)):
        v = tl.zeros([BLOCK], tl.float32)
        if v0 is not None:
            v = tl.load(v0 + place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES), mask=mask, other=0.0)
        vs = vs + (v,)  # noqa: RUF005
    poison = tl.zeros([BLOCK], tl.float32)
    inputs = (x, residual)
    outputs = (s, v_all, packed)
    if LOOP:
        for t0 in range(0, bound(T), STEPS):
            vs, poison = _all_positions(
                inputs, outputs, edges, p, a, vs, poison, first, shape, base, mask, t0, T, N,
                RESET, BEFORE, STEPS, STATIC, affine is not None, POOL, ALIGNED, BLOCK, LANES,
            )  # fmt: skip
    else:
        vs, poison = _all_positions(
            inputs, outputs, None, p, a, vs, poison, first, shape, base, mask, 0, T, N,
            RESET, BEFORE, STEPS, STATIC, affine is not None, POOL, ALIGNED, BLOCK, LANES,
        )  # fmt: skip
    if v_final is not None:
        for q in tl.static_range(positions(POOL)):
            tl.store(v_final + place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES), vs[q], mask=mask)
            poison = fma(vs[q], 0.0, poison)
    if flag is not None:
        # A thread sums its own lanes: nothing is exchanged.
        bad = tl.sum(tl.reshape(tl.where(mask, poison, 0.0), [BLOCK // LANES, LANES]), 1)
        tl.store(flag + tl.zeros([BLOCK // LANES], tl.int32), 1, mask=bad != bad)
