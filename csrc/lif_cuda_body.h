// What one thread of the LIF kernels does, from its first neuron on: all of it but the launch and the sums over a
// block, so that g++ can run it thread by thread too (tests/test_cuda_threads.py). Include after a dialect.
//
// E: element type; V: neighbouring neurons a thread owns (one 16-byte access of E, or 1); K: steps of a chunk, whose
// h lives in registers, so those arrays are indexed by constants only; LOOP: T may exceed K; FUSED: with what a plain
// LIF has not: x normalised or the same at every step, a residual, packed spikes, pooling, sums a channel.
#pragma once

#include "lif_cuda_pack.h"
#include "lif_cuda_sums.h"
#include "lif_cuda_slots.h"
#include "lif_cuda_backward.h"
#include "lif_cuda_trains.h"

namespace trtkern {
namespace cuda {

// `count` steps of the neurons n .. n + V - 1, from step `step` on. A batch of loads is in flight together; that of the
// largest fused kernel is half a chunk, or the residual would not fit the registers.
template <class E, int V, int K, bool FUSED>
TK_INLINE void forward_chunk(const LifArgs& a, const Neuron<Real> (&p)[V], const Affine3 (&affine)[FUSED ? V : 1],
                             int64_t step, int count, int64_t n, Real (&v)[V], Real& watch, Trains<E, V, K>& trains) {
  constexpr int kBatch = FUSED && V > 4 ? 4 : K;
  const bool hard = a.reset == kHard, dense = a.s != 0 && !(FUSED && a.pool_row != 0);
  const int64_t N = again(count, a.N);
  int64_t here = index::offset(step, n, a.N);
  TK_UNROLL
  for (int first = 0; first < K; first += kBatch) {
    const Input<E, V, kBatch, FUSED> input(a, step + first, count - first, n);
    TK_UNROLL
    for (int k = first; k < first + kBatch; ++k) {
      if (k >= count) return;
      Real s[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) {
        const Real h = charge(p[j], v[j], input.get(a, affine[FUSED ? j : 0], k - first, j));
        watch = fma_(h, 0.0f, watch);
        s[j] = fire(p[j], h);
        if constexpr (FUSED) trains.take(k, j, h > p[j].threshold);
        v[j] = reset_after_flat(p[j], h, hard);
      }
      Pack<E, V> out;
      if (dense) {
        out.set(s);
        out.store(address<E>(a.s, here));
      }
      if (a.v != 0) {
        out.set(v);
        out.store(address<E>(a.v, here));
      }
      here += N;
    }
  }
}

// Runs all steps of the neurons n .. n + V - 1; false if any h was not finite. `watch`: h * 0 added up, NaN as soon as
// one h is NaN or infinite. With pooling, of the four packs that make the averages n .. n + V - 1, one after the other;
// `kept` then holds their v from chunk to chunk and the sums of their spikes: Trains::kKept words.
template <class E, int V, int K, bool LOOP, bool FUSED>
TK_INLINE bool forward_thread(const LifArgs& a, int64_t n, const Words& kept) {
  const bool pool = FUSED && a.pool_row != 0;
  const index::Pool pools{a.pool_row, a.pool_inner};
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
    Trains<E, V, K> trains;
    TK_ROLLED
    for (int q = 0; q < (pool ? 4 : 1); ++q) {
      const int64_t m = pool ? base + pools.apart(q, V) : n;
      if (pool && c == 0) load_floats(a.v0, m, v);
      if (pool && c != 0) kept.numbers(q * V, v);
      forward_chunk<E, V, K, FUSED>(a, p, affine, c * K, count, m, v, watch, trains);
      if (edge) store_floats(a.edges, index::offset(c / (kChunk / K), m, a.N), v);
      if constexpr (FUSED) trains.finish(a, c * K, m, q, kept);
      if (pool && c + 1 < chunks) kept.set_numbers(q * V, v);
      if (pool && c + 1 == chunks) store_floats(a.v_final, m, v);
    }
    if (pool) trains.store_averages(a, c * K, count, n, kept);
  }
  if (!pool) store_floats(a.v_final, n, v);
  return watch == watch;
}

// ---- which kernel ----

// Whether a call asks for more than a plain LIF, or, backward, for less: no gx.
inline bool fused(const LifArgs& a) {
  const bool less = a.gx == 0 && (a.gv0 | a.gparams) != 0;
  return (a.affine | a.residual | a.packed | a.coef | a.norm_sums) != 0 || a.x_stride != a.N || a.pool_row != 0 || less;
}

// Neurons a thread: 16 bytes' worth where every row of every tensor starts on a multiple of 16 bytes (packed: of a byte
// a neuron), else 1.
inline int vec(const LifArgs& a) {
  const uint64_t rows = a.x | a.v0 | a.s | a.v | a.v_final | a.edges | a.gs | a.gv | a.gv_final | a.gx | a.gv0;
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  if ((rows | a.residual) % 16 != 0 || a.packed % wide != 0 || a.N % wide != 0) return 1;
  if (a.pool_row == 0) return wide;
  const index::Pool pool{a.pool_row, a.pool_inner};
  return a.N % (4 * wide) == 0 && (pool.over(wide) || pool.beside(wide)) ? wide : 1;
}

// How the blocks of a fused backward pass divide the neurons: by channels where there are sums and packs keep to them.
inline index::Tiles tiles(const LifArgs& a) {
  if (!fused(a) || (a.norm_sums == 0 && a.gparams == 0)) return index::Tiles{};
  return index::Tiles::of(a.N, a.C, a.inner, vec(a), index::kThreads, 1);
}

// The rows of sums of a backward pass, those of a normalised x first; what it leaves to add up is [rows, M].
inline int norm_rows(const LifArgs& a) { return fused(a) ? kNormSums : 0; }
inline int sum_rows(const LifArgs& a) { return norm_rows(a) + (a.gparams != 0 ? kSums : 0); }
inline index::Reduction reduction(const LifArgs& a) {
  const index::Tiles t = tiles(a);
  if (t.groups != 0) return {t.segments() * t.C(), t.C(), 1};
  return fused(a) ? index::Reduction{a.N, a.C, a.inner} : index::reduction(a.N, a.C, a.inner, vec(a));
}

// Calls run(Class<V, K, LOOP>()) for the class that the sizes ask for. Up to 16 steps the loop runs once: a class of
// their own would gain nothing. OCTETS, for the fused kernels: 8 steps at the most, a byte of packed spikes.
template <int V_, int K_, bool LOOP_>
struct Class {
  static constexpr int V = V_, K = K_;
  static constexpr bool LOOP = LOOP_;
};
template <class E, bool OCTETS, class Run>
void choose(const LifArgs& a, const Run& run) {
  constexpr int V = 16 / E::kBytes, K = OCTETS ? 8 : kChunk;
  if (vec(a) == 1) return run(Class<1, K, true>());
  if (a.T <= 4) return run(Class<V, 4, false>());
  if constexpr (!OCTETS) {
    if (a.T <= 8) return run(Class<V, 8, false>());
  }
  return run(Class<V, K, true>());
}

}  // namespace cuda
}  // namespace trtkern
