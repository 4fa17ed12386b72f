"""The backward LIF kernel: recomputes the potentials h of a chunk, then goes back through its steps.

Two things keep a chunk of 16 steps in registers (on sm_90 no spills in what the tests compile; parameter gradients with
some other options spill up to 32 bytes, pooling with T > 16 up to 60). A branch around every four steps keeps the
compiler from interleaving all of them. And some values are opaque: made again in a way that the compiler cannot see
through (``t0 < T`` always holds, but it does not know). Otherwise it keeps the address of every row and v of every step
from the first half of a chunk to the second, or hoists the addresses out of the loop.
"""

from __future__ import annotations

import triton.language as tl

from trtkern.kernels.channels import channel, combined, input_current, vectors
from trtkern.kernels.lif import ends, load_rows, load_states, parameters, store_states
from trtkern.kernels.neurons import added, chosen, nothing, settled
from trtkern.kernels.numerics import bound, fma, inline, narrow, widen
from trtkern.kernels.pooling import first_neuron, neurons, place, pooled_lanes, positions, spread


@inline
def _group(
    streams, vectors, again, alpha, start, rows, traces, given, state, offsets, mask, t0, T, end, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, START: tl.constexpr,
    POOL: tl.constexpr, LEARN: tl.constexpr, MOMENTS: tl.constexpr, AFFINE: tl.constexpr, COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Four steps, t0 + START + 3 down to t0 + START, with their gs and gv (BEFORE: of h); returns the new state."""
    _x, residual, gs, gv, gx, lengths, _sample = streams
    p, a, coef = vectors
    x_rows, residual_rows = rows
    spikes, potentials = given
    carry, sums, moments = state
    for k in tl.static_range(3, -1, -1):
        inside = t0 + (START + k) < T
        live = t0 + (START + k) < end
        trace = traces[START + k]
        x = x_rows[START + k]
        g = carry
        if gv is not None and not BEFORE:
            g = added(g, NEURON.v, widen(potentials[k]), NEURON.states)
        spike = tl.zeros_like(trace[0])
        if gs is not None:
            spike = widen(spikes[k])
            if POOL != "none":
                spike = spread(spike * 0.25, POOL, BLOCK)
        potential, threshold = NEURON.fire(trace, p)
        slope = SURROGATE(potential - threshold, alpha)
        g, learned = NEURON.fired_back(trace, p, g, spike, slope, sums)
        if gv is not None and BEFORE:
            g = added(g, NEURON.h, widen(potentials[k]), NEURON.traces)
        before = start
        if START + k > 0:
            before, _ = settled(traces[START + k - 1], again, NEURON)
        current = input_current(x, residual_rows[START + k] if residual is not None else None, a, AFFINE)
        gradient, back, summed = NEURON.charge_back(current, before, p, g, learned)
        if gx is not None:
            written = combined(gradient, x, a, coef) if COEF else gradient
            if lengths is not None:
                written = tl.where(live, written, 0.0)
            tl.store(gx + (t0 + (START + k)) * N + offsets, narrow(written, gx.dtype.element_ty), mask=mask & inside)
        if MOMENTS:
            moments = (
                tl.where(live, moments[0] + gradient, moments[0]),
                tl.where(live, fma(gradient, widen(x) - a[0], moments[1]), moments[1]),
            )
            # The same again, of which one part is used here and one above: the state's gradient is made behind the
            # moments, or pooling with 16 steps spills.
            _, back, summed = NEURON.charge_back(current, before, p, g, learned)
        carry = chosen(live, back, carry, NEURON.states)
        if LEARN:
            sums = chosen(live, summed, sums, NEURON.params)
    return carry, sums, moments


@inline
def _incoming(streams, held, offsets, mask, t0, end, N, START: tl.constexpr, POOL: tl.constexpr):
    """gs and gv of the four steps from t0 + START on; held: gs of all steps with pooling."""
    _x, _residual, gs, gv, _gx, _lengths, _sample = streams
    if POOL == "none" or gs is None:
        spikes = load_rows(gs, offsets, mask, t0, end, N, START, 4)
    else:
        spikes = (held[START], held[START + 1], held[START + 2], held[START + 3])
    return spikes, load_rows(gv, offsets, mask, t0, end, N, START, 4)


@inline
def _chunk(
    streams, edges, vectors, alpha, start, held, state, offsets, mask, j, T, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr,
    LOOP: tl.constexpr, STATIC: tl.constexpr, POOL: tl.constexpr, LEARN: tl.constexpr, MOMENTS: tl.constexpr,
    AFFINE: tl.constexpr, COEF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunk j of one position, last step first; start: the neuron's state before the first chunk.

    state is the gradient of the neuron's state, then the sums of the parameters, then those of gx and of
    gx * (x - center).
    """
    x, residual, _gs, gv, _gx, lengths, sample = streams
    p, a, _coef = vectors
    t0 = j * STEPS
    end = ends(lengths, offsets, sample, mask, T)
    if LOOP:
        edge = ()
        for k in tl.static_range(NEURON.states):
            row = edges + ((j - 1) * NEURON.states + k) * N
            edge = edge + (tl.load(row + offsets, mask=mask & (j > 0), other=0.0),)  # noqa: RUF005
        start = chosen(j > 0, edge, start, NEURON.states)
    N_first = tl.where(t0 < T, N, 0)  # opaque
    rows = load_rows(x, offsets, mask, t0, end, N_first, 0, STEPS, STATIC)
    more = load_rows(residual, offsets, mask, t0, end, N_first, 0, STEPS)
    ahead = _incoming(streams, held, offsets, mask, t0, end, N_first, STEPS - 4, POOL)
    traces = ()
    u = start
    for i in tl.static_range(STEPS):
        trace = NEURON.charge(input_current(rows[i], more[i] if residual is not None else None, a, AFFINE), u, p)
        traces = traces + (trace,)  # noqa: RUF005
        u, _ = settled(trace, p, NEURON)
    N_again = tl.where(t0 <= T, N_first, 0)  # opaque
    zero = tl.where(t0 < T, 0.0, 1.0)
    again = ()
    for k in tl.static_range(NEURON.params):
        again = again + (p[k] + zero if NEURON.alone[k] else p[k],)  # noqa: RUF005
    for group in tl.static_range(STEPS // 4 - 1, -1, -1):
        given = ahead
        if LEARN and gv is not None:  # no room to look ahead
            given = _incoming(streams, held, offsets, mask, t0, end, N_again, group * 4, POOL)
        elif group > 0:
            ahead = _incoming(streams, held, offsets, mask, t0, end, N_again, group * 4 - 4, POOL)
        if t0 + group * 4 < T:
            state = _group(
                streams, vectors, again, alpha, start, (rows, more), traces, given, state, offsets, mask, t0, T,
                end, N_again,
                NEURON, BEFORE, SURROGATE, group * 4, POOL, LEARN, MOMENTS, AFFINE, COEF, BLOCK,
            )  # fmt: skip
    return state


@inline
def _all_positions(
    streams, edges, starts, vectors, alpha, carries, sums, moments, first, shape, lanes, mask, j, T, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr,
    LOOP: tl.constexpr, STATIC: tl.constexpr, POOL: tl.constexpr, LEARN: tl.constexpr, MOMENTS: tl.constexpr,
    AFFINE: tl.constexpr, COEF: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Chunk j of the neurons at each position; returns the gradients of their states before it, and the sums."""
    if POOL == "none":
        carry, sums, moments = _chunk(
            streams, edges, vectors, alpha, starts[0], (), (carries[0], sums, moments), first, mask, j, T, N,
            NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, LEARN, MOMENTS, AFFINE, COEF, BLOCK,
        )  # fmt: skip
        carries = (carry,)
    else:
        held = load_rows(streams[2], lanes, lanes < N // 4, j * STEPS, T, N // 4, 0, STEPS)
        # Not unrolled: the positions must not compete for registers. The first state is the one whose turn it is.
        for q in range(positions(POOL)):
            offsets = place(first, shape[0], shape[1], q, POOL, ALIGNED, LANES)
            N_here = tl.where(q < T + 4, N, 0)  # opaque: or the address of every row is kept from one to the next
            carry, sums, moments = _chunk(
                streams, edges, vectors, alpha, starts[0], held, (carries[0], sums, moments), offsets, mask, j, T,
                N_here,
                NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, LEARN, MOMENTS, AFFINE, COEF, BLOCK,
            )  # fmt: skip
            starts = starts[1:] + starts[:1]
            carries = carries[1:] + (carry,)  # noqa: RUF005
    return carries, sums, moments


@inline
def _neurons(
    streams, edges, v0, gv_final, gv0, vectors, alpha, sums, moments, first, shape, lanes, mask, T, N,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, STEPS: tl.constexpr,
    LOOP: tl.constexpr, STATIC: tl.constexpr, POOL: tl.constexpr, LEARN: tl.constexpr, MOMENTS: tl.constexpr,
    AFFINE: tl.constexpr, COEF: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """All T steps of the neurons of the lanes, last first; returns the sums with theirs added."""
    starts = load_states(v0, first, shape, mask, N, NEURON, POOL, ALIGNED, BLOCK, LANES)
    carries = load_states(gv_final, first, shape, mask, N, NEURON, POOL, ALIGNED, BLOCK, LANES)
    if LOOP or LEARN or MOMENTS:  # sums: one chunk, but in a loop t0 is opaque
        chunks = (T + STEPS - 1) // STEPS
        for k in range(0, bound(chunks)):
            carries, sums, moments = _all_positions(
                streams, edges, starts, vectors, alpha, carries, sums, moments, first, shape, lanes, mask,
                chunks - 1 - k, T, N,
                NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, LEARN, MOMENTS, AFFINE, COEF, ALIGNED,
                BLOCK, LANES,
            )  # fmt: skip
    else:
        carries, sums, moments = _all_positions(
            streams, edges, starts, vectors, alpha, carries, sums, moments, first, shape, lanes, mask, 0, T, N,
            NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, LEARN, MOMENTS, AFFINE, COEF, ALIGNED, BLOCK,
            LANES,
        )  # fmt: skip
    if gv0 is not None:
        store_states(gv0, carries, first, shape, mask, N, NEURON, POOL, ALIGNED, LANES)
    return sums, moments


@inline
def _store_sums(
    partial, sums, base, columns, COUNT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """COUNT rows of partial sums: one a program when there is one channel, one a column, or one for LANES columns."""
    column = base + tl.arange(0, BLOCK)
    for row in tl.static_range(COUNT):
        if CHANNELS == "one":
            total = tl.sum(tl.where(column < columns, sums[row], 0.0), 0)
            tl.store(partial + row * tl.num_programs(0) + tl.program_id(0), total)
        elif CHANNELS == "shared":
            total = tl.sum(tl.reshape(sums[row], [BLOCK // LANES, LANES]), 1)  # a thread adds its own lanes
            group = base // LANES + tl.arange(0, BLOCK // LANES)
            tl.store(partial + row * (columns // LANES) + group, total, mask=group < columns // LANES)
        else:
            tl.store(partial + row * columns + column, sums[row], mask=column < columns)


def lif_backward(
    x, v0, param_rows, affine, residual, lengths, edges, gs, gv, gv_final, coef, gx, gv0, partial, partial_moments,
    T: tl.int64, n: tl.int64, C: tl.int64, inner: tl.int64, half: tl.int64, side: tl.int64, sample: tl.int64,
    columns: tl.int64,
    scalars: tl.tuple, alpha: tl.float32,
    NEURON: tl.constexpr, BEFORE: tl.constexpr, SURROGATE: tl.constexpr, STATIC: tl.constexpr,
    STEPS: tl.constexpr, LOOP: tl.constexpr, POOL: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes gx [T, N], gv0 [S, N] and partial sums, unless None, from x, v0, edges and the gradients gs, gv, gv_final.

    affine, residual, lengths, half, side and sample as in the forward pass; BEFORE: gv is the gradient of h, before the
    reset; with POOL gs is [T, N / 4]; coef: None, or [3, C] float32, and gx is then coef[0] * gx +
    coef[1] * (x - center) + coef[2].
    partial, partial_moments: None, or the sums of the parameters' gradients, and of gx and gx * (x - center):
    [P, programs], [2, programs] when there is one channel, else [P, columns], [2, columns], where one column is the sum
    over the lanes `columns` apart (LANES columns together where they share the channel); columns divides the number of
    lanes and is a multiple of C * inner.
    """
    T = tl.cast(T, tl.int64)
    N = neurons(n, POOL, ALIGNED)
    alpha = tl.cast(alpha, tl.float32)
    C = tl.cast(C, tl.int64)
    shape = (tl.cast(half, tl.int64), tl.cast(side, tl.int64))
    base = tl.program_id(0).to(tl.int64) * BLOCK
    column = base + tl.arange(0, BLOCK)
    count = N // positions(POOL)
    c = channel(C, tl.cast(inner, tl.int64), base, CHANNELS, BLOCK, LANES)
    p = parameters(scalars, param_rows, c, C, NEURON.params, CHANNELS, BLOCK, LANES)
    a = vectors(affine, c, C, 3, CHANNELS, BLOCK, LANES)
    k_rows = vectors(coef, c, C, 3, CHANNELS, BLOCK, LANES)
    streams = (x, residual, gs, gv, gx, lengths, tl.cast(sample, tl.int64))
    zero = tl.zeros([BLOCK], tl.float32)
    sums = nothing(zero, NEURON.params)
    moments = (zero, zero)
    if partial is None and partial_moments is None:
        first = first_neuron(base, shape[0], shape[1], POOL, ALIGNED, BLOCK, LANES)
        _neurons(
            streams, edges, v0, gv_final, gv0, (p, a, k_rows), alpha, sums, moments,
            first, shape, pooled_lanes(base, POOL, BLOCK), column < count, T, N,
            NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, False, False, affine is not None,
            coef is not None, ALIGNED, BLOCK, LANES,
        )  # fmt: skip
    else:
        S = tl.cast(columns, tl.int64) * (16 if ALIGNED else 1)
        for k in range(0, bound(count // S)):
            start = k * S + base
            first = first_neuron(start, shape[0], shape[1], POOL, ALIGNED, BLOCK, LANES)
            sums, moments = _neurons(
                streams, edges, v0, gv_final, gv0, (p, a, k_rows), alpha, sums, moments,
                first, shape, pooled_lanes(start, POOL, BLOCK), column < S, T, N,
                NEURON, BEFORE, SURROGATE, STEPS, LOOP, STATIC, POOL, partial is not None,
                partial_moments is not None, affine is not None, coef is not None, ALIGNED, BLOCK, LANES,
            )  # fmt: skip
        if partial is not None:
            _store_sums(partial, sums, base, S, NEURON.params, CHANNELS, BLOCK, LANES)
        if partial_moments is not None:
            _store_sums(partial_moments, moments, base, S, 2, CHANNELS, BLOCK, LANES)
