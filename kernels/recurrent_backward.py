"""The backward pass of neurons that feed each other: a program owns SAMPLES samples, all their neurons and steps.

The gradient of s[t, k] is that of the caller plus the sum over j of gx[t+1, j] * weight[j, k]. Unlike spikes, gx is
dense, so a program reads the whole weight at every step: 4 * N * N bytes, from L2, once for its SAMPLES samples. It
adds up row after row of the weight, ROWS of them in flight, each times a number a sample: float32, one rounding an
addend, the same order at every run. Why four samples: a multiprocessor takes some 64 bytes a cycle from L2 and does 128
multiplications, so that up to eight samples cost no more than the weight itself, and more are fewer programs. Tensor
cores want sixteen, and float32 cut in three.

gx[t+1] goes from the threads that made it to all others of the program through ``passed``, float32, not rounded to gx's
dtype: one barrier a step, and two halves that take turns, as in ``kernels/recurrent.py``.

The states before each step of a chunk are computed again from ``current`` into ``states``, float32; what a step needs
besides (the trace) follows from state and current bit for bit. In registers they would be 16 numbers for each of the 16
neurons of a thread, which there is no room for; in memory they are 8 * S bytes a neuron-step, S being the numbers of a
state, beside 4 * N / SAMPLES bytes of weight: 2% of it with one state and N = 512.

Bytes of a sample and step besides, e being the bytes of an element: current read twice, gs read, gx written, e * N
each; 4 * N of ``passed``, and a number of it for each row of the weight; a chunk's share of the edges. Sums of
parameters stay in registers, one for each neuron of a thread and parameter, and leave as a row a program, which
``add_up`` (``kernels/batch_norm_finish.py``) adds up in order. On NVIDIA GPUs all registers may be used, and with two
states, gradients of a parameter a neuron and 1024 neurons they just suffice.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.lif import parameters
from trtkern.kernels.neurons import added, chosen, nothing, settled
from trtkern.kernels.numerics import INTERPRETED, bound, fma, inline, narrow, widen
from trtkern.kernels.recurrent import handed_over, state_rows


@inline
def _states_again(
    current, states, starts, p, at, mask, b, B, t0, count, N, size,
    NEURON: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Writes the states before steps t0 to t0 + count - 1, [count, S, B, N]; starts: those before t0."""
    now = starts
    for i in range(0, bound(count)):
        after = ()
        for r in tl.static_range(SAMPLES):
            here = at + r * N
            inside = mask & (b + r < B)
            for k in tl.static_range(NEURON.states):
                row = tl.cast(i, tl.int64) * NEURON.states + k
                tl.store(states + row * size + here, now[r][k], mask=inside)
            drive = widen(tl.load(current + (t0 + i) * size + here, mask=inside, other=0.0))
            state, _ = settled(NEURON.charge(drive, now[r], p), p, NEURON)
            after = after + (state,)  # noqa: RUF005 (Triton knows no starred expression)
        now = after


@inline
def _multiplied(a, b, c):
    """a * b + c, in the interpreter rounded twice, which takes it a fifth of the time."""
    if INTERPRETED:
        result = a * b + c
    else:
        result = fma(a, b, c)
    return result


@inline
def _fed_back(
    weight, passed, lane, mask, rows, N, zero, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """For each sample the sum over j < rows of passed[sample, j] * weight[j, :]."""
    totals = ()
    for _ in tl.static_range(SAMPLES):
        totals = totals + (zero,)  # noqa: RUF005
    for start in range(0, bound(rows), ROWS):
        found = ()
        for q in tl.static_range(ROWS):
            j = tl.cast(start, tl.int64) + q
            row = tl.load(weight + j * N + lane, mask=mask & (j < rows), other=0.0)
            found = found + (row,)  # noqa: RUF005
        for q in tl.static_range(ROWS):
            j = tl.cast(start, tl.int64) + q
            there = j < rows
            sums = ()
            for r in tl.static_range(SAMPLES):
                g = tl.load(passed + r * BLOCK + j, mask=there, other=0.0)
                sums = sums + (_multiplied(g, found[q], totals[r]),)  # noqa: RUF005
            totals = sums
    return totals


@inline
def _sample(
    streams, p, alpha, carry, spike, sums, states, here, passed, mask, t, size,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Step t of a sample: writes gx, and the same to passed; returns the gradient of the state before it, and sums."""
    current, gs, gv, gx = streams
    before = state_rows(states, here, mask, size, carry[0], NEURON.states)
    at = t * size + here
    drive = widen(tl.load(current + at, mask=mask, other=0.0))
    if gs is not None:
        spike = spike + widen(tl.load(gs + at, mask=mask, other=0.0))
    g = carry
    if gv is not None and not BEFORE:
        g = added(g, NEURON.v, widen(tl.load(gv + at, mask=mask, other=0.0)), NEURON.states)
    trace = NEURON.charge(drive, before, p)
    potential, threshold = NEURON.fire(trace, p)
    slope = SURROGATE(potential - threshold, alpha)
    g, learned = NEURON.fired_back(trace, p, g, spike, slope, sums)
    if gv is not None and BEFORE:
        g = added(g, NEURON.h, widen(tl.load(gv + at, mask=mask, other=0.0)), NEURON.traces)
    gradient, back, summed = NEURON.charge_back(drive, before, p, g, learned)
    tl.store(gx + at, narrow(gradient, gx.dtype.element_ty), mask=mask)
    tl.store(passed, gradient, mask=mask)
    if LEARN:
        sums = summed
    return back, sums


@inline
def _starts(edges, v0, at, mask, b, B, j, N, size, zero, NEURON: tl.constexpr, SAMPLES: tl.constexpr):
    """The states before chunk j: v0, or an edge."""
    found = ()
    for r in tl.static_range(SAMPLES):
        inside = mask & (b + r < B)
        state = state_rows(v0, at + r * N, inside, size, zero, NEURON.states)
        if edges is not None:
            row = edges + (tl.maximum(j, 1) - 1) * NEURON.states * size
            edge = state_rows(row, at + r * N, inside & (j > 0), size, zero, NEURON.states)
            state = chosen(j > 0, edge, state, NEURON.states)
        found = found + (state,)  # noqa: RUF005
    return found


def recurrent_backward(
    current, v0, weight, param_rows, edges, gs, gv, gv_final, gx, gv0, partial, states, passed,
    T: tl.int64, B: tl.int64, n: tl.int64,
    scalars: tl.tuple, alpha: tl.float32,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Writes gx [T, B, N], and unless None gv0 [S, B, N] and partial [P, programs, N], the sums of a program's samples.

    current [T, B, N]: what the forward pass wrote; weight [N, N]; edges: None where T is at most CHUNK; states:
    [CHUNK, S, B, N] float32, written and read; passed: [programs, 2, SAMPLES, BLOCK] float32 likewise; BEFORE,
    param_rows, scalars, WAIT as in the forward pass. ALIGNED: N is passed divided by 16.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(n, tl.int64) * (16 if ALIGNED else 1)
    size = B * N
    alpha = tl.cast(alpha, tl.float32)
    lane = tl.arange(0, BLOCK)
    mask = lane < N
    b = tl.program_id(0).to(tl.int64) * SAMPLES
    at = b * N + lane
    p = parameters(scalars, param_rows, tl.minimum(lane, N - 1), N, NEURON.params, CHANNELS, BLOCK, 1)
    zero = tl.zeros([BLOCK], tl.float32)
    sums = nothing(zero, NEURON.params)
    carries = ()
    for r in tl.static_range(SAMPLES):
        carry = state_rows(gv_final, at + r * N, mask & (b + r < B), size, zero, NEURON.states)
        carries = carries + (carry,)  # noqa: RUF005
    passed = passed + tl.program_id(0).to(tl.int64) * (2 * SAMPLES * BLOCK)
    streams = (current, gs, gv, gx)
    chunks = (T + CHUNK - 1) // CHUNK
    for chunk in range(0, bound(chunks)):
        j = chunks - 1 - chunk
        t0 = j * CHUNK
        count = tl.minimum(CHUNK, T - t0)
        starts = _starts(edges, v0, at, mask, b, B, j, N, size, zero, NEURON, SAMPLES)
        _states_again(current, states, starts, p, at, mask, b, B, t0, count, N, size, NEURON, SAMPLES)
        handed_over(WAIT)
        for k in range(0, bound(count)):
            i = count - 1 - k
            t = t0 + i
            spikes = _fed_back(
                weight, passed + ((t + 1) % 2) * (SAMPLES * BLOCK), lane, mask, tl.where(t + 1 < T, N, 0), N, zero,
                SAMPLES, BLOCK, ROWS,
            )  # fmt: skip
            backs = ()
            for r in tl.static_range(SAMPLES):
                row = states + i * NEURON.states * size
                own = passed + (t % 2) * (SAMPLES * BLOCK) + r * BLOCK + lane
                back = carries[r]
                if b + r < B:  # a branch: or the compiler interleaves the samples, and spills
                    back, sums = _sample(
                        streams, p, alpha, back, spikes[r], sums, row, at + r * N, own, mask, t, size,
                        NEURON, BEFORE, SURROGATE, partial is not None,
                    )  # fmt: skip
                backs = backs + (back,)  # noqa: RUF005
            carries = backs
            handed_over(WAIT)
    if gv0 is not None:
        for r in tl.static_range(SAMPLES):
            for k in tl.static_range(NEURON.states):
                tl.store(gv0 + k * size + at + r * N, carries[r][k], mask=mask & (b + r < B))
    if partial is not None:
        for k in tl.static_range(NEURON.params):
            row = partial + (tl.program_id(0).to(tl.int64) + k * tl.num_programs(0).to(tl.int64)) * N
            tl.store(row + lane, sums[k], mask=mask)
