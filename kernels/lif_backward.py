"""The backward LIF kernel: recomputes the potentials h of a chunk, then goes back through its steps.

Two things keep a chunk of 16 steps in registers (on sm_90 no spills in what the tests compile; parameter gradients with
some other options spill up to 32 bytes). A branch around every four steps keeps the compiler from interleaving all of
them. And some values are opaque: made again in a way that the compiler cannot see through (``t0 < T`` always holds, but
it does not know). Otherwise it keeps the address of every row and v of every step from the first half of a chunk to the
second, or hoists the addresses out of the loop.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.lif import charge, load_rows, parameters, reset_after
from trtkern.kernels.numerics import bound, fma, inline, narrow, widen


@inline
def _step(p, h, g, spike, alpha, RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr):
    """gh, the part of it that came through the spike, and 1 where it fired; g and spike: gradients of v and s."""
    fired = tl.where(h > p[4], 1.0, 0.0)
    passed = g
    if RESET == "hard":
        if not DETACH:
            spike = fma(g, p[5] - h, spike)
        passed = g * (1.0 - fired)
    elif RESET == "soft" and not DETACH:
        spike = fma(-g, p[3], spike)
    through = SURROGATE(h - p[4], alpha) * spike
    return tl.where(h == h, through + passed, h), through, fired


@inline
def _group(
    streams, p, again, alpha, v, rows, charges, given, state, offsets, mask, t0, T, N,
    RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, START: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Four steps, t0 + START + 3 down to t0 + START, with their gs and gv; returns the new state."""
    _x, gs, gv, gx = streams
    spikes, potentials = given
    carry, g_decay, g_gain, g_bias, g_amount, g_threshold, g_reset = state
    for k in tl.static_range(3, -1, -1):
        live = t0 + (START + k) < T
        h = charges[START + k]
        g = carry
        if gv is not None:
            g = g + widen(potentials[k])
        spike = tl.zeros_like(h)
        if gs is not None:
            spike = widen(spikes[k])
        gh, through, fired = _step(p, h, g, spike, alpha, RESET, DETACH, SURROGATE)
        tl.store(gx + (t0 + (START + k)) * N + offsets, narrow(p[1] * gh, gx.dtype.element_ty), mask=mask & live)
        carry = tl.where(live, p[0] * gh, carry)
        if LEARN:
            before = v
            if START + k > 0:
                before = reset_after(again, charges[START + k - 1], RESET)
            g_decay = tl.where(live, fma(gh, before, g_decay), g_decay)
            g_gain = tl.where(live, fma(gh, widen(rows[START + k]), g_gain), g_gain)
            g_bias = tl.where(live, g_bias + gh, g_bias)
            g_threshold = tl.where(live, g_threshold - through, g_threshold)
            if RESET == "hard":
                g_reset = tl.where(live, fma(g, fired, g_reset), g_reset)
            elif RESET == "soft":
                g_amount = tl.where(live, fma(-g, fired, g_amount), g_amount)
    return carry, g_decay, g_gain, g_bias, g_amount, g_threshold, g_reset


@inline
def _incoming(gs, gv, offsets, mask, t0, T, N, START: tl.constexpr):
    """gs and gv of the four steps from t0 + START on."""
    return load_rows(gs, offsets, mask, t0, T, N, START, 4), load_rows(gv, offsets, mask, t0, T, N, START, 4)


@inline
def _chunk(
    streams, p, alpha, v, state, offsets, mask, t0, T, N,
    RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Steps t0 + STEPS back to t0, from v before t0; state is the gradient of v, then the six parameters' sums."""
    x, gs, gv, _gx = streams
    N_first = tl.where(t0 < T, N, 0)  # opaque
    rows = load_rows(x, offsets, mask, t0, T, N_first, 0, STEPS)
    ahead = _incoming(gs, gv, offsets, mask, t0, T, N_first, STEPS - 4)
    charges = ()
    u = v
    for i in tl.static_range(STEPS):
        h = charge(p, u, rows[i])
        charges = charges + (h,)  # noqa: RUF005
        u = reset_after(p, h, RESET)
    N_again = tl.where(t0 <= T, N_first, 0)  # opaque
    zero = tl.where(t0 < T, 0.0, 1.0)
    again = (p[0], p[1], p[2], p[3] + zero, p[4], p[5] + zero)
    for group in tl.static_range(STEPS // 4 - 1, -1, -1):
        given = ahead
        if LEARN and gv is not None:  # no room to look ahead
            given = _incoming(gs, gv, offsets, mask, t0, T, N_again, group * 4)
        elif group > 0:
            ahead = _incoming(gs, gv, offsets, mask, t0, T, N_again, group * 4 - 4)
        if t0 + group * 4 < T:
            state = _group(
                streams, p, again, alpha, v, rows, charges, given, state, offsets, mask, t0, T, N_again,
                RESET, DETACH, SURROGATE, group * 4, LEARN,
            )  # fmt: skip
    return state


@inline
def _neurons(
    streams, edges, v0, gv_final, gv0, p, alpha, sums, offsets, mask, T, N,
    RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr, LOOP: tl.constexpr,
    LEARN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All T steps of the neurons at offsets, last first; returns the parameters' sums with theirs added."""
    first = tl.zeros([BLOCK], tl.float32)
    if v0 is not None:
        first = tl.load(v0 + offsets, mask=mask, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    if gv_final is not None:
        carry = tl.load(gv_final + offsets, mask=mask, other=0.0)
    state = (carry, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5])
    if LOOP or LEARN:  # LEARN: one chunk, but in a loop t0 is opaque
        chunks = (T + STEPS - 1) // STEPS
        for k in range(0, bound(chunks)):
            j = chunks - 1 - k
            v = first
            if LOOP:
                v = tl.load(edges + (j - 1) * N + offsets, mask=mask & (j > 0), other=0.0)
                v = tl.where(j > 0, v, first)
            state = _chunk(
                streams, p, alpha, v, state, offsets, mask, j * STEPS, T, N, RESET, DETACH, SURROGATE, STEPS, LEARN
            )
    else:
        state = _chunk(streams, p, alpha, first, state, offsets, mask, 0, T, N, RESET, DETACH, SURROGATE, STEPS, LEARN)
    if gv0 is not None:
        tl.store(gv0 + offsets, state[0], mask=mask)
    return state[1:]


def lif_backward(
    x, v0, values, edges, gs, gv, gv_final, gx, gv0, partial,
    T: tl.int64, n: tl.int64, columns: tl.int64, C: tl.int64, inner: tl.int64,
    decay: tl.float32, gain: tl.float32, bias: tl.float32,
    reset_amount: tl.float32, threshold: tl.float32, v_reset: tl.float32, alpha: tl.float32,
    RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr, LOOP: tl.constexpr,
    ALIGNED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes gx [T, N], gv0 [N] and partial from x, v0, edges and the gradients gs, gv [T, N] and gv_final [N].

    partial: None, or the sums of the parameters' gradients: [6, programs] when there is one channel, else [6, columns],
    where one column is the sum over the neurons `columns` apart; columns divides N and is a multiple of C * inner.
    """
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    alpha = tl.cast(alpha, tl.float32)
    C = tl.cast(C, tl.int64)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    column = base + tl.arange(0, BLOCK)
    scalars = (decay, gain, bias, reset_amount, threshold, v_reset)
    p = parameters(scalars, values, C, tl.cast(inner, tl.int64), base, column < N, CHANNELS, BLOCK)
    streams = (x, gs, gv, gx)
    zero = tl.zeros([BLOCK], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    if partial is None:
        _neurons(
            streams, edges, v0, gv_final, gv0, p, alpha, sums, column, column < N, T, N,
            RESET, DETACH, SURROGATE, STEPS, LOOP, False, BLOCK,
        )  # fmt: skip
    else:
        S = tl.cast(columns, tl.int64) * (16 if ALIGNED else 1)
        for k in range(0, bound(N // S)):
            offsets = k * S + column
            if ALIGNED:
                # So it is, but Triton forgets it on the way to the last rows.
                offsets = tl.max_contiguous(tl.multiple_of(offsets, 16), 16)
            sums = _neurons(
                streams, edges, v0, gv_final, gv0, p, alpha, sums, offsets, column < S, T, N,
                RESET, DETACH, SURROGATE, STEPS, LOOP, True, BLOCK,
            )  # fmt: skip
        for row in tl.static_range(6):
            if CHANNELS == "one":
                total = tl.sum(tl.where(column < S, sums[row], 0.0), 0)
                tl.store(partial + row * tl.num_programs(0) + tl.program_id(0), total)
            else:
                tl.store(partial + row * S + column, sums[row], mask=column < S)
