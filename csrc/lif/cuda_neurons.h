// What one thread does for a neuron of the table (trtkern/neurons.py) that is not LIF: one neuron, whose loop over the
// steps stays a loop, in little code, for each neuron has kernels of its own. Element type, reset, surrogate and all
// that a fused LIF can are chosen at run time. The step is that which the build prints (trtkern_neurons.h), and what is
// around it that of the fused LIF kernels. Kernel, in the templates here, is a General. Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// The parameters of a neuron.
template <class N>
struct Params {
  Real at[N::kParams];

  TK_INLINE Params(const LifArgs& a, int64_t channel) {
    TK_UNROLL
    for (int r = 0; r < N::kParams; ++r) {
      if (a.params != 0) {
        at[r] = load_row(a, a.params, r, channel);
      } else {
        at[r] = a.scalars[r];
      }
    }
  }
};

// The numbers of a neuron's state, or zeros: row `row` of [rows, S, N].
template <int S>
TK_INLINE void load_state(const LifArgs& a, uint64_t base, int64_t row, int64_t n, Real (&to)[S]) {
  TK_UNROLL
  for (int i = 0; i < S; ++i) {
    Real one[1];
    load_floats(base, index::offset(row * S + i, n, a.N), one);
    to[i] = one[0];
  }
}
template <int S>
TK_INLINE void store_state(const LifArgs& a, uint64_t base, int64_t row, int64_t n, const Real (&from)[S]) {
  TK_UNROLL
  for (int i = 0; i < S; ++i) {
    const Real one[1] = {from[i]};
    store_floats(base, index::offset(row * S + i, n, a.N), one);
  }
}

// The thread's words of shared memory in the forward pass: what Trains keeps, then the input currents of a chunk.
template <class Kernel>
struct ForwardWords {
  static constexpr int kCurrents = Trains<Kernel>::kKept, kAll = kCurrents + Kernel::K;
};

// `count` steps, at most K, of neuron n from step `step` on. `watch`: as in forward_thread.
template <class Kernel>
TK_INLINE void forward_steps(const LifArgs& a, const Params<typename Kernel::N>& p, const Affine3& affine, int64_t step,
                             int count, int64_t n, Real (&state)[Kernel::kStates], Real& watch, Trains<Kernel>& trains,
                             const Words& words) {
  using N = typename Kernel::N;
  constexpr int K = Kernel::K, kCurrents = ForwardWords<Kernel>::kCurrents;
  const Input<Kernel, K> input(a, step, count, n);
  TK_UNROLL
  for (int k = 0; k < K; ++k) words.set_number(kCurrents + k, input.get(a, affine, k, 0));
  const bool dense = a.s != 0 && a.pool_row == 0;
  int64_t here = index::offset(step, n, a.N);
  TK_ROLLED
  for (int k = 0; k < count; ++k) {
    Real trace[N::kTraces], potential, threshold;
    N::charge(words.number(kCurrents + k), state, p.at, trace);
    N::fire(trace, p.at, potential, threshold);
    const bool fired = potential > threshold;
    N::settle(a.reset, trace, fired, p.at, state);
    trains.take(k, 0, fired);
    TK_UNROLL
    for (int i = 0; i < N::kTraces; ++i) watch = fma_(trace[i], 0.0f, watch);
    if (dense) store_element(a, a.s, here, where_(fired, 1.0f, 0.0f));
    if (a.v != 0) {
      const Real shown = store_element(a, a.v, here, where_(a.before != 0, trace[N::kH], state[N::kV]));
      watch = fma_(shown, 0.0f, watch);
    }
    here += a.N;
  }
}

// Runs all steps of neuron n, or with pooling of the four neurons that make average n; false if any number of a trace,
// or any v as it is written, was not finite. What forward_thread (lif/cuda_body.h) does for LIF.
template <class Kernel>
TK_INLINE bool forward_neuron(const LifArgs& a, int64_t n, const Words& words) {
  constexpr int K = Kernel::K, S = Kernel::kStates;
  const bool pool = a.pool_row != 0;
  const index::Pool pools{a.pool_row, a.pool_side};
  const int64_t base = pool ? pools.first(n) : n;
  int64_t channel[1];
  Channels(a, base).next(a, channel);
  const Params<typename Kernel::N> p(a, channel[0]);
  Affine3 affine[1];
  load_affine(a, a.affine, channel, affine);
  Real state[S], watch = Real(0.0f);
  const int64_t chunks = index::chunks(a.T, K);
  TK_ROLLED
  for (int64_t c = 0; c < chunks; ++c) {
    const int count = steps(a, c * K, K);
    const bool last = c + 1 == chunks, edge = !last && (c + 1) % (Kernel::kSpan / K) == 0;
    Trains<Kernel> trains;
    TK_ROLLED
    for (int q = 0; q < (pool ? 4 : 1); ++q) {
      const int64_t m = pool ? base + pools.apart(q, 1) : n;
      if (c == 0) load_state(a, a.v0, 0, m, state);
      if (pool && c != 0) words.numbers(q * S, state);
      forward_steps<Kernel>(a, p, affine[0], c * K, count, m, state, watch, trains, words);
      if (edge) store_state(a, a.edges, c / (Kernel::kSpan / K), m, state);
      trains.finish(a, c * K, m, q, words);
      if (pool && !last) words.set_numbers(q * S, state);
      if (last && a.v_final != 0) {
        store_state(a, a.v_final, 0, m, state);
        TK_UNROLL
        for (int i = 0; i < S; ++i) watch = fma_(state[i], 0.0f, watch);
      }
    }
    if (pool) trains.store_averages(a, c * K, count, n, words);
  }
  return watch == watch;
}

// The traces of the chunk's `count` steps into the slots.
template <class Kernel>
TK_INLINE void recompute_traces(const LifArgs& a, const Params<typename Kernel::N>& p, const Affine3 (&affine)[1],
                                int count, const Slots<Kernel>& slots) {
  using N = typename Kernel::N;
  Real state[N::kStates], trace[N::kTraces], current[1], potential, threshold;
  slots.numbers(slots.kStart, state);
  TK_ROLLED
  for (int k = 0; k < count; ++k) {
    currents(a, affine, k, 0, slots, current);
    N::charge(current[0], state, p.at, trace);
    slots.set_numbers(slots.trace(k), trace);
    N::fire(trace, p.at, potential, threshold);
    N::settle(a.reset, trace, potential > threshold, p.at, state);
  }
}

// The steps of a chunk backward, last first; `element`: that of its first. g: the gradient of the state after them,
// then of the state before them.
template <bool LEARN, class Kernel>
TK_INLINE void chunk_back(const LifArgs& a, const Params<typename Kernel::N>& p, const Affine3 (&affine)[1],
                          const Affine3 (&coef)[1], int64_t element, int count, const Slots<Kernel>& slots,
                          Real (&g)[Kernel::kStates]) {
  using N = typename Kernel::N;
  static_assert(N::kStates == N::kTraces, "what stands before a chunk is a state in place of a trace");
  const Real share = a.pool_row != 0 ? 0.25f : 1.0f;
  Real sum[N::kParams][1] = {}, norm[kNormSums][1] = {};
  TK_ROLLED
  for (int k = count - 1; k >= 0; --k) {
    const int64_t here = element + k * a.N;
    Real state[N::kStates], trace[N::kTraces], before[N::kTraces], g_trace[N::kTraces] = {}, g_state[N::kStates];
    Real current[1], gx[1], potential, threshold;
    slots.numbers(k == 0 ? slots.kStart : slots.trace(k - 1), before);
    TK_UNROLL
    for (int i = 0; i < N::kStates; ++i) state[i] = before[i];
    if ((LEARN || N::kNeedsState) && k != 0) {
      N::fire(before, p.at, potential, threshold);
      N::settle(a.reset, before, potential > threshold, p.at, state);
    }
    slots.numbers(slots.trace(k), trace);
    N::fire(trace, p.at, potential, threshold);
    const Real slope = surrogate_of(a.surrogate, potential - threshold, lit<Real>(a.alpha));
    if (a.gv != 0 && a.before == 0) g[N::kV] += load_element(a, a.gv, here);
    N::fired_back(a.reset, a.detach != 0, trace, potential > threshold, p.at, g, share * slots.number(slots.g(k)),
                  slope, g_trace, &sum[0][0]);
    if (a.gv != 0 && a.before != 0) g_trace[N::kH] += load_element(a, a.gv, here);
    currents(a, affine, k, 0, slots, current);
    N::charge_back(current[0], state, p.at, g_trace, gx[0], g_state, &sum[0][0]);
    TK_UNROLL
    for (int i = 0; i < N::kStates; ++i) g[i] = g_state[i];
    normalized(a, affine, coef, slots.template pack<typename Kernel::Row>(slots.x(k)), gx, norm);
    if (a.gx != 0) store_element(a, a.gx, here, gx[0]);
  }
  if constexpr (LEARN) slots.add_sums(a, kNormSums, 0, sum, 0);
  if (a.norm_sums != 0) slots.add_sums(a, 0, 0, norm, 0);
}

// All steps of neuron n, last first; LEARN: with the sums of the parameters' gradients. What backward_thread
// (lif/cuda_backward.h) does for LIF.
template <bool LEARN, class Kernel>
TK_INLINE void backward_neuron(const LifArgs& a, int64_t n, const Slots<Kernel>& slots) {
  constexpr int S = Kernel::kStates, kSpan = Kernel::kSpan;
  int64_t channel[1];
  Channels(a, n).next(a, channel);
  const Params<typename Kernel::N> p(a, channel[0]);
  Affine3 affine[1], coef[1];
  load_affine(a, a.affine, channel, affine);
  load_affine(a, a.coef, channel, coef);
  Real g[S], start[S];
  load_state(a, a.gv_final, 0, n, g);
  TK_ROLLED
  for (int64_t c = index::chunks(a.T, kSpan) - 1; c >= 0; --c) {
    const int count = steps(a, c * kSpan, kSpan);
    load_chunk(a, c * kSpan, n, count, slots);
    load_state(a, c > 0 ? a.edges : a.v0, c > 0 ? c - 1 : 0, n, start);
    slots.set_numbers(slots.kStart, start);
    recompute_traces(a, p, affine, count, slots);
    chunk_back<LEARN>(a, p, affine, coef, index::offset(c * kSpan, n, a.N), count, slots, g);
  }
  store_state(a, a.gv0, 0, n, g);
}

}  // namespace cuda
}  // namespace trtkern
