// What one thread of the LIF kernels does, from its first neuron on: all of it but the launch and the sums over a
// block, so that g++ can run it thread by thread too (tests/test_cuda_threads.py). Include after a dialect.
//
// E: element type; V: neighbouring neurons a thread owns (one 16-byte access of E, or 1); K: steps of a chunk, whose
// h lives in registers, so those arrays are indexed by constants only; LOOP: T may exceed K.
#pragma once

#include "lif_cuda_pack.h"
#include "lif_cuda_sums.h"
#include "lif_cuda_backward.h"

namespace trtkern {
namespace cuda {

// Runs all steps of the neurons n .. n + V - 1; false if any h was not finite.
template <class E, int V, int K, bool LOOP>
TK_INLINE bool forward_thread(const LifArgs& a, int64_t n) {
  Neuron<Real> p[V];
  Real v[V];
  Parameters(a, n).next(a, p);
  load_floats(a.v0, n, v);
  const bool hard = a.reset == kHard;
  Real watch = Real(0.0f);  // h * 0 added up: NaN as soon as one h is NaN or infinite
  const int64_t chunks = LOOP ? index::chunks(a.T, K) : 1;
  for (int64_t c = 0; c < chunks; ++c) {
    const int count = steps(a, c * K, K);
    const int64_t N = again(count, a.N);
    int64_t here = index::offset(c * K, n, a.N);
    Pack<E, V> x[K];
    load_steps<E>(a.x, here, N, count, x);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      Real s[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) {
        const Real h = charge(p[j], v[j], x[k].get(j));
        watch = fma_(h, 0.0f, watch);
        s[j] = fire(p[j], h);
        v[j] = reset_after_flat(p[j], h, hard);
      }
      Pack<E, V> out;
      if (a.s != 0) {
        out.set(s);
        out.store(address<E>(a.s, here));
      }
      if (a.v != 0) {
        out.set(v);
        out.store(address<E>(a.v, here));
      }
      here += N;
    }
    if (LOOP && c + 1 < chunks) store_floats(a.edges, index::offset(c, n, a.N), v);
  }
  store_floats(a.v_final, n, v);
  return watch == watch;
}

// ---- which kernel ----

// Neurons a thread: 16 bytes' worth where every row of every tensor starts on a multiple of 16 bytes, else 1.
inline int vec(const LifArgs& a) {
  const uint64_t rows = a.x | a.v0 | a.s | a.v | a.v_final | a.edges | a.gs | a.gv | a.gv_final | a.gx | a.gv0;
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  return rows % 16 == 0 && a.N % wide == 0 ? wide : 1;
}

inline index::Reduction reduction(const LifArgs& a) { return index::reduction(a.N, a.C, a.inner, vec(a)); }

// Calls run(Class<V, K, LOOP>()) for the class that the sizes ask for. Up to 16 steps the loop runs once: a class of
// their own would gain nothing.
template <int V_, int K_, bool LOOP_>
struct Class {
  static constexpr int V = V_, K = K_;
  static constexpr bool LOOP = LOOP_;
};
template <class E, class Run>
void choose(const LifArgs& a, const Run& run) {
  constexpr int V = 16 / E::kBytes;
  if (vec(a) == 1) return run(Class<1, kChunk, true>());
  if (a.T <= 4) return run(Class<V, 4, false>());
  if (a.T <= 8) return run(Class<V, 8, false>());
  return run(Class<V, kChunk, true>());
}

}  // namespace cuda
}  // namespace trtkern
