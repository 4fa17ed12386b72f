"""The forward pass of neurons that feed each other: a program owns a sample, all its neurons and all its steps.

    current[t, j] = x[t, j] + bias[j] + sum over the neurons k that fired at t - 1 of weight[j, k]

then the step of the neuron (NEURON, ``kernels/neurons.py``). A spike is 0 or 1, so a product with spikes is a sum of
those columns of the weight whose neuron fired. A program writes the numbers of the neurons that fired into a list, and
adds up the columns in the order of the list, ROWS of them in flight: float32, nothing cut, the same order at every run.
Before the first step ``turn_weight`` turns the weight, so that a column is a row, 4 * N bytes side by side.

Where a thread needs what others of its program wrote (the list), a barrier lies in between. The list has two halves
that take turns: who writes a half has passed a barrier since all have read it. No program waits for another.

Bytes of a sample and step with firing rate r, e being the bytes of an element: x read, s written, and for a backward
pass the current written, e * N each (v: e * N more; packed words: N / 8; edges as in ``kernels/lif.py``); 4 * r * N * N
of the weight, which all programs read: from L2, where it fits up to N = 1024 (4 MiB). A block of samples with a matrix
product would read 4 * N * N each step whatever fires. A thread holds BLOCK / threads neurons, four of them from N = 128
on: for a neuron of two states 8 numbers, up to 40 of parameters, 32 of rows in flight, whatever N is.

0 times NaN is NaN, but a neuron that does not fire is not looked at. So ``turn_weight`` looks at every weight: where
one of row j is not finite, it leaves NaN in ``base``, from which the sums of neuron j begin.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.lif import parameters
from trtkern.kernels.neurons import settled
from trtkern.kernels.numerics import bound, fma, inline, narrow, widen


def turn_weight(
    weight, bias, turned, base,
    n: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """turned [N, N] = weight^T, and base [N]: the bias (0 if None), NaN where a weight of the row is not finite.

    A program owns BLOCK rows of the weight.
    """
    N = tl.cast(n, tl.int64)
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    watch = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, bound(N), BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (j < N)[:, None] & (k < N)[None, :]
        tile = tl.load(weight + j[:, None] * N + k[None, :], mask=inside, other=0.0)
        watch = fma(tile, 0.0, watch)
        there = (k < N)[:, None] & (j < N)[None, :]
        tl.store(turned + k[:, None] * N + j[None, :], tl.trans(tile), mask=there)
    total = tl.sum(watch, 1)
    if bias is not None:
        total = total + tl.load(bias + j, mask=j < N, other=0.0)
    tl.store(base + j, total, mask=j < N)


@inline
def handed_over(WAIT: tl.constexpr):
    """Whatever threads of the program have written lies before all of them, where they read it from here on.

    WAIT: Triton's barrier neither waits for stores to global memory nor keeps loads behind it, as on AMD GPUs: the
    stores have to have arrived first, and no load may be moved.
    """
    if WAIT:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.program_id(0)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    if WAIT:
        tl.inline_asm_elementwise(
            "v_mov_b32 $0, $1", "=v,v,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@inline
def state_rows(pointer, at, mask, size, zero, COUNT: tl.constexpr):
    """A state, COUNT numbers [BLOCK] out of [COUNT, B, N]; zero if pointer is None."""
    state = ()
    for k in tl.static_range(COUNT):
        value = zero
        if pointer is not None:
            value = tl.load(pointer + k * size + at, mask=mask, other=0.0)
        state = state + (value,)  # noqa: RUF005 (Triton knows no starred expression)
    return state


@inline
def listed(fired, lane, heard, BLOCK: tl.constexpr):
    """Writes how many fired to heard, and their numbers to heard + 16 on, in ascending order."""
    one = fired.to(tl.int32)
    upto = tl.cumsum(one, 0)
    tl.store(heard + 16 + (upto - one), lane, mask=fired)
    tl.store(heard + lane * 0, upto, mask=lane == BLOCK - 1)


@inline
def _fed(heard, values, turned, base, lane, mask, goes_on, N, ROWS: tl.constexpr):
    """base + the rows of turned that the list names, each times its number of values unless None.

    goes_on: whether anything is to be added.
    """
    total = base
    count = tl.where(goes_on, tl.load(heard), 0)
    for i in range(0, bound(count), ROWS):
        rows, factors = (), ()
        for r in tl.static_range(ROWS):
            there = i + r < count
            k = tl.load(heard + 16 + i + r, mask=there, other=0).to(tl.int64)
            rows = rows + (tl.load(turned + k * N + lane, mask=mask & there, other=0.0),)  # noqa: RUF005
            if values is not None:
                factors = factors + (widen(tl.load(values + k, mask=there, other=0.0)),)  # noqa: RUF005
        for r in tl.static_range(ROWS):
            if values is not None:
                total = fma(factors[r], rows[r], total)
            else:
                total = total + rows[r]
    return total


@inline
def _written(
    outputs, watch, word, shown, fired, state, at, mask, t, T, size,
    NEURON: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes what a step leaves beside its current; returns watch and the word of the steps to come."""
    s, v_all, edges, packed = outputs
    tl.store(s + t * size + at, tl.where(fired, 1.0, 0.0).to(s.dtype.element_ty), mask=mask)
    if v_all is not None:
        rounded = narrow(shown, v_all.dtype.element_ty)
        tl.store(v_all + t * size + at, rounded, mask=mask)
        watch = fma(widen(rounded), 0.0, watch)
    if packed is not None:
        word += tl.where(fired, 1, 0) << (t % 8).to(tl.int32)
        last = (t % 8 == 7) | (t + 1 == T)
        tl.store(packed + (t // 8) * size + at, word.to(tl.uint8), mask=mask & last)
        word = tl.where(last, 0, word)
    if edges is not None:
        ends = ((t + 1) % CHUNK == 0) & (t + 1 < T)
        for k in tl.static_range(NEURON.states):
            row = edges + ((t // CHUNK) * NEURON.states + k) * size
            tl.store(row + at, state[k], mask=mask & ends)
    return watch, word


def recurrent_forward(
    x, s0, v0, turned, base, param_rows, s, current, v_all, v_final, edges, packed, flag, heard,
    T: tl.int64, B: tl.int64, n: tl.int64,
    scalars: tl.tuple,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Writes s, current, v_all [T, B, N], v_final [S, B, N], edges [edges, S, B, N], packed [ceil(T / 8), B, N] bytes
    and flag, unless None; s always. One program a sample.

    x [T, B, N]; s0 [B, N] in x's dtype, any numbers; v0 [S, B, N]; turned and base: ``turn_weight``; heard: int32
    [B, 2, 16 + BLOCK + ROWS], the lists; WAIT: as ``handed_over`` has it; BEFORE, param_rows, scalars: as in
    ``lif_forward``, with a channel a neuron.
    ALIGNED: N is passed divided by 16.
    """
    T = tl.cast(T, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    size = tl.cast(B, tl.int64) * N
    lane = tl.arange(0, BLOCK)
    mask = lane < N
    at = tl.program_id(0).to(tl.int64) * N + lane
    p = parameters(scalars, param_rows, tl.minimum(lane, N - 1), N, NEURON.params, CHANNELS, BLOCK, 1)
    zero = tl.zeros([BLOCK], tl.float32)
    state = state_rows(v0, at, mask, size, zero, NEURON.states)
    first = tl.load(base + lane, mask=mask, other=0.0)
    HALF: tl.constexpr = 16 + BLOCK + ROWS
    heard = heard + tl.program_id(0).to(tl.int64) * (2 * HALF)
    fed = first
    if s0 is not None:
        given = widen(tl.load(s0 + at, mask=mask, other=0.0))
        listed(mask & (given != 0.0), lane, heard + HALF, BLOCK)
        handed_over(WAIT)
        own = s0 + tl.program_id(0).to(tl.int64) * N
        fed = _fed(heard + HALF, own, turned, first, lane, mask, True, N, ROWS)
    watch = zero
    word = tl.zeros([BLOCK], tl.int32)
    x_row = tl.load(x + at, mask=mask, other=0.0)
    for step in range(0, bound(T)):
        t = tl.cast(step, tl.int64)
        rounded = narrow(widen(x_row) + fed, s.dtype.element_ty)
        if current is not None:
            tl.store(current + t * size + at, rounded, mask=mask)
        trace = NEURON.charge(widen(rounded), state, p)
        state, fired = settled(trace, p, NEURON)
        fired = fired & mask
        for k in tl.static_range(NEURON.traces):
            watch = fma(trace[k], 0.0, watch)
        shown = trace[NEURON.h] if BEFORE else state[NEURON.v]
        outputs = (s, v_all, edges, packed)
        watch, word = _written(outputs, watch, word, shown, fired, state, at, mask, t, T, size, NEURON, CHUNK)
        half = heard + (t % 2) * HALF
        listed(fired, lane, half, BLOCK)
        x_row = tl.load(x + (t + 1) * size + at, mask=mask & (t + 1 < T), other=0.0)
        handed_over(WAIT)
        fed = _fed(half, None, turned, first, lane, mask, t + 1 < T, N, ROWS)
    if v_final is not None:
        for k in tl.static_range(NEURON.states):
            tl.store(v_final + k * size + at, state[k], mask=mask)
            watch = fma(state[k], 0.0, watch)
    if flag is not None:
        tl.store(flag + lane * 0, 1, mask=mask & (watch != watch))
