// What one thread of the LIF kernels does, from its first neuron on: all of it but the launch and the sums over a
// block, so that g++ can run it thread by thread too (tests/test_cuda_threads.py). Include after a dialect. Kernel, in
// its templates and in those that it includes, is a Traits.
#pragma once
#include "cuda/pack.h"
#include "lif/cuda_traits.h"
#include "lif/cuda_slots.h"
#include "lif/cuda_backward.h"
#include "lif/cuda_trains.h"

namespace trtkern {
namespace cuda {

// The input current of the `count` steps from `step` on, at most STEPS, of V neurons, the first number n. FUSED: x is
// normalised, and may be the same at every step; a residual is added to it.
template <class Kernel, int STEPS>
struct Input {
  using E = typename Kernel::E;
  static constexpr bool FUSED = Kernel::FUSED;
  typename Kernel::Row x[STEPS], residual[FUSED ? STEPS : 1];

  TK_INLINE Input(const LifArgs& a, int64_t step, int count, int64_t n) {
    const int64_t first = index::offset(step, n, a.N), N = again(count, a.N);
    if constexpr (FUSED) {
      load_rows<Kernel>(a, a.x, index::offset(step, n, a.x_stride), again(count, a.x_stride), count, x);
      if (a.residual != 0) load_rows<Kernel>(a, a.residual, first, N, count, residual);
    } else {
      load_steps<E>(a.x, first, N, count, x);
    }
  }
  // Of a word a step, from shared memory.
  TK_INLINE Input(const Words& from, int at) {
    TK_UNROLL
    for (int k = 0; k < STEPS; ++k) x[k].words[0] = from.word(at + k);
  }
  TK_INLINE Real get(const LifArgs& a, const Affine3& affine, int k, int j) const {
    const Real plain = x[k].get(j);
    if constexpr (FUSED) {
      const Real current = current_of(plain, affine.row[kCenter], affine.row[kScale], affine.row[kShift]);
      return a.residual != 0 ? current + residual[k].get(j) : current;
    }
    return plain;
  }
};

// `count` steps of the neurons n .. n + V - 1, from step `step` on. load(k): the Input of the BATCH steps from the
// chunk's step k on.
template <class Kernel, int BATCH, int V, class Load>
TK_INLINE void forward_chunk(const LifArgs& a, const Neuron<Real> (&p)[V],
                             const Affine3 (&affine)[Kernel::FUSED ? V : 1], int64_t step, int count, int64_t n,
                             Real (&v)[V], Real& watch, Trains<Kernel>& trains, const Load& load) {
  using E = typename Kernel::E;
  constexpr int K = Kernel::K;
  constexpr bool FUSED = Kernel::FUSED;
  const bool hard = a.reset == kHard, dense = a.s != 0 && !(FUSED && a.pool_row != 0);
  const int64_t N = again(count, a.N);
  int64_t here = index::offset(step, n, a.N);
  TK_UNROLL
  for (int first = 0; first < K; first += BATCH) {
    const auto input = load(first);
    TK_UNROLL
    for (int k = first; k < first + BATCH; ++k) {
      if (k >= count) return;
      Real s[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) {
        v[j] = charge(p[j], v[j], input.get(a, affine[FUSED ? j : 0], k - first, j));  // h, until it is reset below
        watch = fma_(v[j], 0.0f, watch);
        s[j] = fire(p[j], v[j]);
        if constexpr (FUSED) trains.take(k, j, v[j] > p[j].threshold);
      }
      typename Kernel::Row out;
      if (dense) {
        out.set(s);
        out.store(address<E>(a.s, here));
      }
      if (a.v != 0) {
        TK_UNROLL
        for (int j = 0; j < V; ++j) s[j] = where_(a.before != 0, v[j], reset_after_flat(p[j], v[j], hard));
        out.set(s);
        out.store(address<E>(a.v, here));
        TK_UNROLL
        for (int j = 0; j < V; ++j) watch = fma_(out.get(j), 0.0f, watch);
      }
      TK_UNROLL
      for (int j = 0; j < V; ++j) v[j] = reset_after_flat(p[j], v[j], hard);
      here += N;
    }
  }
}

// v after the last step, which `watch` sees too.
template <int V>
TK_INLINE void store_state(const LifArgs& a, int64_t n, const Real (&v)[V], Real& watch) {
  if (a.v_final == 0) return;
  store_floats(a.v_final, n, v);
  TK_UNROLL
  for (int j = 0; j < V; ++j) watch = fma_(v[j], 0.0f, watch);
}

// Runs all steps of the neurons n .. n + V - 1; false if any h, or any v as it is written, was not finite. `watch`: h *
// 0 added up, NaN as soon as one h is NaN or infinite. With pooling, of the four packs that make the averages n .. n +
// V - 1, one after the other; `kept` then holds their v from chunk to chunk and the sums of their spikes: Trains::kKept
// words.
template <class Kernel>
TK_INLINE bool forward_thread(const LifArgs& a, int64_t n, const Words& kept) {
  constexpr int V = Kernel::V, K = Kernel::K;
  constexpr bool LOOP = Kernel::LOOP, FUSED = Kernel::FUSED;
  // A batch of loads is in flight together; that of the largest fused kernel is half a chunk, or the residual would not
  // fit the registers.
  constexpr int kBatch = FUSED && V > 4 ? 4 : K;
  const bool pool = FUSED && a.pool_row != 0;
  const index::Pool pools{a.pool_row, a.pool_side};
  const int64_t base = pool ? pools.first(n) : n;
  Neuron<Real> p[V];
  Real v[V];
  Affine3 affine[FUSED ? V : 1];
  Parameters<FUSED> parameters(a, base);
  if constexpr (FUSED) {
    int64_t channel[V];
    Channels(a, base).next(a, channel);
    parameters.of(a, channel, p);
    load_affine(a, a.affine, channel, affine);
  } else {
    parameters.next(a, p);
  }
  if (!pool) load_floats(a.v0, n, v);
  Real watch = Real(0.0f);
  const int64_t chunks = LOOP ? index::chunks(a.T, K) : 1;
  for (int64_t c = 0; c < chunks; ++c) {
    const int count = steps(a, c * K, K);
    const bool edge = LOOP && c + 1 < chunks && (c + 1) % (kChunk / K) == 0;
    Trains<Kernel> trains;
    TK_ROLLED
    for (int q = 0; q < (pool ? 4 : 1); ++q) {
      const int64_t m = pool ? base + pools.apart(q, V) : n;
      if (pool && c == 0) load_floats(a.v0, m, v);
      if (pool && c != 0) kept.numbers(q * V, v);
      const auto load = [&](int k) { return Input<Kernel, kBatch>(a, c * K + k, count - k, m); };
      forward_chunk<Kernel, kBatch>(a, p, affine, c * K, count, m, v, watch, trains, load);
      if (edge) store_floats(a.edges, index::offset(c / (kChunk / K), m, a.N), v);
      if constexpr (FUSED) trains.finish(a, c * K, m, q, kept);
      if (pool && c + 1 < chunks) kept.set_numbers(q * V, v);
      if (pool && c + 1 == chunks) store_state(a, m, v, watch);
    }
    if (pool) trains.store_averages(a, c * K, count, n, kept);
  }
  if (!pool) store_state(a, n, v, watch);
  return watch == watch;
}

}  // namespace cuda
}  // namespace trtkern

#include "lif/cuda_ahead.h"
#include "lif/cuda_neurons.h"
#include "lif/cuda_choice.h"
