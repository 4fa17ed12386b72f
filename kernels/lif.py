"""The forward LIF kernel, and what both directions share: a program owns a block of neurons, state in registers.

Memory is [T, N], time outermost. T and N are run-time numbers. STEPS is 4, 8 or 16 (T <= STEPS: straight-line code) or
16 with LOOP (any T, in chunks of 16 steps; of a neuron with two states in chunks of 8). ALIGNED: N is passed divided by
16 (with pooling by 64), which makes 16-byte accesses provable. What is None (affine, residual, packed, ...) leaves no
code behind. NEURON says what a step computes (``kernels/neurons.py``).

Bytes moved per neuron-step, e being the bytes of an element: forward 2e (e more for v, e for a residual, 1/8 for packed
spikes), backward 3e; when T > 16 the forward writes and the backward reads 4/16 more for the edges (of a neuron with
two states 4 * 2/8 when T > 8). ``trtkern/kernels/lif_launch.py`` chooses all of this.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.channels import channel, input_current, vectors
from trtkern.kernels.neurons import chosen, settled
from trtkern.kernels.numerics import bound, fma, inline, narrow, widen
from trtkern.kernels.pooling import first_neuron, neurons, place, pooled, pooled_lanes, positions


@inline
def parameters(
    scalars, param_rows, c, C, COUNT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The neuron's parameters: numbers, or the rows of param_rows."""
    p = scalars
    if param_rows is not None:
        p = vectors(param_rows, c, C, COUNT, CHANNELS, BLOCK, LANES)
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
def ends(lengths, offsets, sample, mask, T):
    """The steps of each neuron: T, or those of its sample."""
    steps = T
    if lengths is not None:
        own = tl.load(lengths + offsets // sample, mask=mask, other=0)
        steps = tl.minimum(tl.cast(own, tl.int64), T)
    return steps


@inline
def load_states(
    pointer, first, shape, mask, N, NEURON: tl.constexpr, POOL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A state of [S, N] at each position; zeros if pointer is None."""
    found = ()
    for q in tl.static_range(positions(POOL)):
        offsets = place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES)
        state = ()
        for k in tl.static_range(NEURON.states):
            value = tl.zeros([BLOCK], tl.float32)
            if pointer is not None:
                value = tl.load(pointer + k * N + offsets, mask=mask, other=0.0)
            state = state + (value,)  # noqa: RUF005
        found = found + (state,)  # noqa: RUF005
    return found


@inline
def store_states(
    pointer, states, first, shape, mask, N, NEURON: tl.constexpr, POOL: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The state at each position as [S, N]."""
    for q in tl.static_range(positions(POOL)):
        offsets = place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES)
        for k in tl.static_range(NEURON.states):
            tl.store(pointer + k * N + offsets, states[q][k], mask=mask)


@inline
def _chunk(
    inputs, outputs, edges, p, a, state, watch, counts, offsets, mask, t0, T, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr, STATIC: tl.constexpr, AFFINE: tl.constexpr,
    POOLED: tl.constexpr,
):  # fmt: skip
    """Steps t0 to t0 + STEPS of one position; returns the state after them, watch and counts.

    watch is NaN once a number of a trace, or a v as it is written, was not finite; counts holds a digit of four bits a
    step, one number for eight steps.
    """
    x, residual, lengths, sample = inputs
    s, v_all, packed = outputs
    end = ends(lengths, offsets, sample, mask, T)
    rows = load_rows(x, offsets, mask, t0, end, N, 0, STEPS, STATIC)
    added = load_rows(residual, offsets, mask, t0, end, N, 0, STEPS)
    after = ()
    for byte in tl.static_range((STEPS + 7) // 8):
        word = tl.zeros(watch.shape, tl.int32)
        digits = tl.zeros(watch.shape, tl.int32)
        if POOLED:
            digits = counts[byte]
        for i in tl.static_range(byte * 8, min(STEPS, byte * 8 + 8)):
            inside = t0 + i < T
            live = t0 + i < end
            current = input_current(rows[i], added[i] if residual is not None else None, a, AFFINE)
            trace = NEURON.charge(current, state, p)
            new, fired = settled(trace, p, NEURON)
            state = chosen(live, new, state, NEURON.states)
            if lengths is not None:
                fired = fired & live
            for k in tl.static_range(NEURON.traces):
                watch = tl.where(live, fma(trace[k], 0.0, watch), watch)
            if POOLED:
                digits += tl.where(fired, 1 << (4 * (i % 8)), 0)
            elif s is not None:
                spike = tl.where(fired, 1.0, 0.0).to(s.dtype.element_ty)
                tl.store(s + (t0 + i) * N + offsets, spike, mask=mask & inside)
            if packed is not None:
                word += tl.where(fired & live, 1 << (i % 8), 0)
            if v_all is not None:
                potential = trace[NEURON.h] if BEFORE else state[NEURON.v]
                if lengths is not None:
                    potential = tl.where(live, potential, 0.0)
                shown = narrow(potential, v_all.dtype.element_ty)
                tl.store(v_all + (t0 + i) * N + offsets, shown, mask=mask & inside)
                watch = tl.where(live, fma(widen(shown), 0.0, watch), watch)
        if packed is not None:
            plane = packed + (t0 // 8 + byte) * N
            tl.store(plane + offsets, word.to(tl.uint8), mask=mask & (t0 + byte * 8 < T))
        after = after + (digits,)  # noqa: RUF005
    if edges is not None:
        for k in tl.static_range(NEURON.states):
            row = edges + ((t0 // STEPS) * NEURON.states + k) * N
            tl.store(row + offsets, state[k], mask=mask & (t0 + STEPS < T))
    return state, watch, after


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
    inputs, outputs, edges, p, a, states, watch, first, shape, base, mask, t0, T, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr, STATIC: tl.constexpr, AFFINE: tl.constexpr,
    POOL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Steps t0 to t0 + STEPS of the neurons at each position; returns the state of each after them, and watch."""
    if POOL == "none":
        state, watch, _ = _chunk(
            inputs, outputs, edges, p, a, states[0], watch, None, first, mask, t0, T, N,
            NEURON, BEFORE, STEPS, STATIC, AFFINE, False,
        )  # fmt: skip
        states = (state,)
    else:
        zero = tl.zeros([BLOCK], tl.int32)
        counts = (zero, zero) if STEPS > 8 else (zero,)
        # Not unrolled: the positions must not compete for registers. The first state is the one whose turn it is.
        for q in range(positions(POOL)):
            offsets = place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES)
            N_here = tl.where(q < T + 4, N, 0)  # opaque: or the address of every row is kept from one to the next
            state, watch, counts = _chunk(
                inputs, outputs, edges, p, a, states[0], watch, counts, offsets, mask, t0, T, N_here,
                NEURON, BEFORE, STEPS, STATIC, AFFINE, True,
            )  # fmt: skip
            states = states[1:] + (state,)  # noqa: RUF005
        if outputs[0] is not None:
            _store_averages(outputs[0], counts, base, t0, T, N, STEPS, POOL, BLOCK)
    return states, watch


def lif_forward(
    x, v0, param_rows, affine, residual, lengths, s, v_all, v_final, edges, packed, flag,
    T: tl.int64, n: tl.int64, C: tl.int64, inner: tl.int64, half: tl.int64, side: tl.int64, sample: tl.int64,
    scalars: tl.tuple,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, STATIC: tl.constexpr, STEPS: tl.constexpr, LOOP: tl.constexpr,
    POOL: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes s, v_all [T, N], v_final [S, N], edges [edges, S, N], packed [ceil(T / 8), N] bytes and flag, unless None.

    BEFORE: v_all is h, before the reset. NEURON: ``kernels/neurons.py``; S is its states.

    x [T, N], with STATIC [N]; v0 [S, N]; param_rows: the parameters [P, C] float32, or None for the scalars;
    affine: None, or [3, C] float32; residual: None or [T, N]; lengths: None, or the steps of each sample, of which one
    has `sample` neurons side by side. With POOL s is [T, N / 4], and half, side and inner are
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
    p = parameters(scalars, param_rows, c, C, NEURON.params, CHANNELS, BLOCK, LANES)
    a = vectors(affine, c, C, 3, CHANNELS, BLOCK, LANES)
    states = load_states(v0, first, shape, mask, N, NEURON, POOL, ALIGNED, BLOCK, LANES)
    watch = tl.zeros([BLOCK], tl.float32)
    inputs = (x, residual, lengths, tl.cast(sample, tl.int64))
    outputs = (s, v_all, packed)
    if LOOP:
        for t0 in range(0, bound(T), STEPS):
            states, watch = _all_positions(
                inputs, outputs, edges, p, a, states, watch, first, shape, base, mask, t0, T, N,
                NEURON, BEFORE, STEPS, STATIC, affine is not None, POOL, ALIGNED, BLOCK, LANES,
            )  # fmt: skip
    else:
        states, watch = _all_positions(
            inputs, outputs, None, p, a, states, watch, first, shape, base, mask, 0, T, N,
            NEURON, BEFORE, STEPS, STATIC, affine is not None, POOL, ALIGNED, BLOCK, LANES,
        )  # fmt: skip
    if v_final is not None:
        store_states(v_final, states, first, shape, mask, N, NEURON, POOL, ALIGNED, LANES)
        for q in tl.static_range(positions(POOL)):
            for k in tl.static_range(NEURON.states):
                watch = fma(states[q][k], 0.0, watch)
    if flag is not None:
        # A thread sums its own lanes: nothing is exchanged.
        total = tl.sum(tl.reshape(tl.where(mask, watch, 0.0), [BLOCK // LANES, LANES]), 1)
        tl.store(flag + tl.zeros([BLOCK // LANES], tl.int32), 1, mask=total != total)
