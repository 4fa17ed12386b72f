// What is fixed when a kernel is compiled. Everything else is decided at run time, uniformly.
#pragma once
#include "cuda/pack.h"
#include "lif/cuda_sums.h"

namespace trtkern {
namespace cuda {

// Of LIF.
template <class ELEMENT, int NEURONS, int STEPS, bool LOOPS, bool FUSES>
struct Traits {
  using E = ELEMENT;                   // of x, and of all tensors that have its shape
  static constexpr int V = NEURONS;    // neighbouring neurons a thread owns: one 16-byte access of E, or 1
  static constexpr int K = STEPS;      // of a chunk, whose h lives in registers: those arrays are indexed by constants
  static constexpr bool LOOP = LOOPS;  // T may exceed K
  // With what a plain LIF has not: x normalised or the same at every step, a residual, packed spikes, pooling, sums a
  // channel.
  static constexpr bool FUSED = FUSES;
  using Row = Pack<E, V>;  // a thread's part of a step
  // Of a neuron: numbers of its state, numbers of each step that a backward pass keeps, rows of its parameters' sums,
  // steps from edge to edge.
  static constexpr int kStates = 1, kKept = 0, kRows = kSums, kSpan = kChunk;
  static constexpr bool ANY_ELEMENT = false;
};

// Of the other neurons (lif/cuda_neurons.h): one a thread, for any element type. E is that of the numbers in its words
// of shared memory, whatever the tensors hold.
template <class NEURON>
struct General : Traits<Float32, 1, 8, true, true> {
  using N = NEURON;  // of trtkern_neurons.h
  static constexpr int kStates = N::kStates, kKept = N::kTraces, kRows = N::kParams, kSpan = kChunk / N::kTraces;
  static constexpr bool ANY_ELEMENT = true;
};

// f(element type) for a number of Dtype.
template <class F>
TK_INLINE void for_element(int dtype, const F& f) {
  if (dtype == kFloat32) return f(Float32());
  if (dtype == kBFloat16) return f(BFloat16());
  f(Float16());
}

// An element of a tensor of x's type, and what is written of a number.
TK_INLINE Real load_element(const LifArgs& a, uint64_t base, int64_t element) {
  Real value;
  for_element(a.dtype, [&](auto e) {
    Pack<decltype(e), 1> one;
    one.load(address<decltype(e)>(base, element));
    value = one.get(0);
  });
  return value;
}
TK_INLINE Real store_element(const LifArgs& a, uint64_t base, int64_t element, Real value) {
  Real written;
  for_element(a.dtype, [&](auto e) { written = store_as<decltype(e)>(base, element, value); });
  return written;
}

// `count` steps of a thread's part of a tensor (load_steps).
template <class Kernel, int K>
TK_INLINE void load_rows(const LifArgs& a, uint64_t base, int64_t first, int64_t N, int count,
                         typename Kernel::Row (&to)[K]) {
  if constexpr (!Kernel::ANY_ELEMENT) {
    load_steps<typename Kernel::E>(base, first, N, count, to);
  } else {
    for_element(a.dtype, [&](auto e) {
      Pack<decltype(e), 1> some[K];
      load_steps<decltype(e)>(base, first, N, count, some);
      TK_UNROLL
      for (int k = 0; k < K; ++k) {
        const Real one[1] = {some[k].get(0)};
        to[k].set(one);
      }
    });
  }
}

}  // namespace cuda
}  // namespace trtkern
