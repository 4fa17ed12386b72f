// Which LIF kernel a call takes, and what it leaves to add up: host code, the same for nvcc and for g++
// (tests/test_cuda_threads.py). Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// Whether it is a neuron of lif/cuda_neurons.h.
inline bool general(const LifArgs& a) { return a.neuron != LIF::kId; }

// Calls run(General<N>()) for such a neuron.
template <class Run>
void choose_neuron(const LifArgs& a, const Run& run) {
  for_neuron(a.neuron, [&run](auto n) {
    if constexpr (decltype(n)::kId != LIF::kId) run(General<decltype(n)>());
  });
}

// Steps from edge to edge; 0: there is no such neuron, or not with so many parameters.
inline int span(const LifArgs& a) {
  int steps = 0;
  for_neuron(a.neuron, [&](auto n) { steps = a.P == n.kParams ? kChunk / n.kTraces : 0; });
  return steps;
}

// Whether a call asks for more than a plain LIF, or, backward, for less: no gx.
inline bool fused(const LifArgs& a) {
  const bool less = a.gx == 0 && (a.gv0 | a.gparams) != 0;
  return (a.affine | a.residual | a.packed | a.coef | a.norm_sums) != 0 || a.x_stride != a.N || a.pool_row != 0 ||
         less || general(a);
}

inline uint64_t rows(const LifArgs& a) {
  return a.x | a.v0 | a.s | a.v | a.v_final | a.edges | a.gs | a.gv | a.gv_final | a.gx | a.gv0;
}

// Whether the launch takes the kernels of lif/cuda_ahead.h: more than a chunk of steps, and packs of 16 bytes would
// make fewer blocks than there are multiprocessors.
inline bool ahead(const LifArgs& a) {
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  const bool words = rows(a) % 8 == 0 && a.N % (wide / 4) == 0;
  return words && !fused(a) && a.T > kChunk && index::blocks(a.N, wide) < a.processors;
}

// Neurons a thread: 16 bytes' worth where every row of every tensor starts on a multiple of 16 bytes (packed: of a byte
// a neuron), else 1; 4 bytes' worth where it reads ahead; always 1 of a neuron that is not LIF.
inline int vec(const LifArgs& a) {
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  if (general(a)) return 1;
  if (ahead(a)) return wide / 4;
  if ((rows(a) | a.residual) % 16 != 0 || a.packed % wide != 0 || a.N % wide != 0) return 1;
  if (a.pool_row == 0) return wide;
  const index::Pool pool{a.pool_row, a.pool_side};
  return a.N % (4 * wide) == 0 && (pool.over(wide) || pool.beside(wide)) ? wide : 1;
}

// How the blocks of a fused backward pass divide the neurons: by channels where there are sums and packs keep to them.
inline index::Tiles tiles(const LifArgs& a) {
  if (!fused(a) || (a.norm_sums == 0 && a.gparams == 0)) return index::Tiles{};
  return index::Tiles::of(a.N, a.C, a.inner, vec(a), index::kThreads, 1);
}

// The rows of sums of a backward pass, those of a normalised x first; what it leaves to add up is [rows, M].
inline int norm_rows(const LifArgs& a) { return fused(a) ? kNormSums : 0; }
inline int sum_rows(const LifArgs& a) { return norm_rows(a) + (a.gparams == 0 ? 0 : general(a) ? a.P : kSums); }
inline index::Reduction reduction(const LifArgs& a) {
  const index::Tiles t = tiles(a);
  if (t.groups != 0) return {t.segments() * t.C(), t.C(), 1};
  return fused(a) ? index::Reduction{a.N, a.C, a.inner} : index::reduction(a.N, a.C, a.inner, vec(a));
}

// Calls run(Traits()) for what the sizes ask for. Up to 16 steps the loop runs once: kernels of their own would gain
// nothing. FUSED: 8 steps at the most, a byte of packed spikes.
template <class E, bool FUSED, class Run>
void choose(const LifArgs& a, const Run& run) {
  constexpr int V = 16 / E::kBytes, K = FUSED ? 8 : kChunk;
  if (vec(a) == 1) return run(Traits<E, 1, K, true, FUSED>());
  if (a.T <= 4) return run(Traits<E, V, 4, false, FUSED>());
  if constexpr (!FUSED) {
    if (a.T <= 8) return run(Traits<E, V, 8, false, FUSED>());
  }
  return run(Traits<E, V, K, true, FUSED>());
}

// Bytes of shared memory that a block is launched with.
template <class E>
int shared_bytes(const LifArgs& a, bool backward) {
  int words = 0;
  if (general(a)) {
    choose_neuron(
        a, [&](auto c) { words = backward ? Slots<decltype(c)>::words_of(a) : ForwardWords<decltype(c)>::kAll; });
  } else if (ahead(a)) {
    words = backward ? RingOfSlots<Ahead<E>>::words_of(a) : kForwardRing * kChunk;
  } else if (backward && !fused(a)) {
    choose<E, false>(a, [&](auto c) { words = Slots<decltype(c)>::words_of(a); });
  } else if (backward) {
    choose<E, true>(a, [&](auto c) { words = Slots<decltype(c)>::words_of(a); });
  } else if (a.pool_row != 0) {
    choose<E, true>(a, [&](auto c) { words = Trains<decltype(c)>::kKept; });
  }
  return words * static_cast<int>(sizeof(uint32_t)) * index::kThreads;
}

}  // namespace cuda
}  // namespace trtkern
