// What is fixed when a LIF kernel is compiled. Everything else is decided at run time, uniformly.
#pragma once
#include "cuda/pack.h"

namespace trtkern {
namespace cuda {

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
};

}  // namespace cuda
}  // namespace trtkern
