// Neurons that feed each other forward on the CPU: at each step of a group of samples the product, then the neurons.
#pragma once
#include "lif/cpu_forward.h"
#include "recurrent/cpu_rows.h"

namespace trtkern::TK_ISA {

// Scratch memory of a group: rows of floats that are no tensors, and what the neurons keep from step to step.
struct RecurrentForwardMemory {
  float *states, *fed, *bias, *current, *s, *v, *neurons, *end;
  uint8_t* packed;

  RecurrentForwardMemory(const RecurrentArgs& a, int64_t units, float* own) {
    const Samples samples(a, 0, units);  // no group is larger
    const int64_t blocks = samples.count(a.lif, kForwardBlock), row = samples.size() + kPad;
    const bool half = a.lif.dtype != kFloat32;
    Scratch pieces{own};
    states = pieces.take(blocks * kMostStates * kForwardStride);
    fed = pieces.take(units * kSamples * product_pitch(a.width));
    bias = pieces.take(product_pitch(a.width));
    current = pieces.take(half || !a.lif.x ? row : 0);
    s = pieces.take(row);
    v = pieces.take(half && a.lif.v ? row : 0);
    packed = (uint8_t*)pieces.take(a.lif.packed ? blocks * kForwardStride / 4 : 0);
    neurons = pieces.take(kForwardScratch);
    end = pieces.next;
  }
};

// The currents of step t of a group, from the spikes of the step before it.
TK_NOINLINE inline void feed(const RecurrentArgs& a, const Samples& samples, int64_t t, const RecurrentMemory& memory,
                             const RecurrentForwardMemory& m) {
  const LifArgs& lif = a.lif;
  const bool half = lif.dtype != kFloat32, first = t == 0;
  const float* s = half || first ? m.s : (const float*)row_at(lif, lif.s, t - 1, samples.begin);
  if (first && a.s0) {
    to_floats(lif.dtype, row_at(lif, a.s0, 0, samples.begin), samples.size(), m.s);
  } else if (first) {
    __builtin_memset(m.s, 0, sizeof(float) * samples.size());
  }
  const bool fed = !first || a.s0 || !memory.finite;  // 0 times NaN is NaN
  if (fed) multiply_rows(a, memory, false, s, samples.rows, !(first && a.s0), m.fed, (char*)m.end);
  const float* const bias = a.bias ? m.bias : nullptr;
  const bool floats = half || !lif.x;
  for (int64_t r = 0; r < samples.rows; ++r) {
    const int64_t at = samples.begin + r * a.width;
    write_current(lif.dtype, row_at(lif, a.x, t, at), fed ? m.fed + r * product_pitch(a.width) : nullptr, bias, a.width,
                  row_at(lif, lif.x, t, at), floats ? m.current + r * a.width : nullptr);
  }
}

template <class N>
void recurrent_forward_of(const RecurrentArgs& a, int64_t first, int64_t units, const RecurrentMemory& memory) {
  constexpr int kSteps = kChunk / N::kTraces;
  static_assert(N::kStates <= kMostStates);
  const LifArgs& given = a.lif;
  const Samples samples(a, first, units);
  const RecurrentForwardMemory own(a, units, (float*)memory.own);
  ForwardMemory<Float32, N> m(Scratch{own.neurons});
  const bool half = given.dtype != kFloat32;
  float watch[kWatch] = {};
  if (a.bias) __builtin_memcpy(own.bias, (const float*)a.bias, sizeof(float) * a.width);
  LifArgs lif = given;
  if (half || !given.x) lif.x = as_tensor(own.current, 0, 0, samples.begin), lif.x_stride = 0;
  const auto of_block = [&](int64_t number) {
    m.state = own.states + number * kMostStates * kForwardStride;
    m.packed = own.packed + number * kForwardStride;
  };
  samples.each(lif, kForwardBlock, [&](const Block& b, int64_t number, int64_t) {
    of_block(number);
    for (int k = 0; k < N::kStates; ++k) read_row(m.state + k * kForwardStride, lif.v0, k * lif.N, b);
  });
  ForwardRow<Float32, N> row{};
  row.watch = watch, row.reset = lif.reset, row.before = lif.before != 0, row.odd = false;
  for (int64_t t = 0; t < lif.T; ++t) {
    feed(a, samples, t, memory, own);
    if (half) lif.s = as_tensor(own.s, t, lif.N, samples.begin);
    if (half && given.v) lif.v = as_tensor(own.v, t, lif.N, samples.begin);
    row.bit = 1 << t % 8;
    const bool edge = lif.edges && (t + 1) % kSteps == 0 && t + 1 < lif.T, last = lif.v_final && t + 1 == lif.T;
    samples.each(lif, kForwardBlock, [&](const Block& b, int64_t number, int64_t) {
      of_block(number);
      row.params = m.params.parameters(lif, b);
      forward_step<Float32, N>(lif, t, b.at, b, row, m, false);
      const int64_t at = edge ? ((t + 1) / kSteps - 1) * N::kStates : 0;
      for (int k = 0; (edge || last) && k < N::kStates; ++k) {
        const float* const state = m.state + k * kForwardStride;
        write_row(edge ? lif.edges : lif.v_final, (at + k) * lif.N, state, b, false);
        if (last) watch_row(state, b.size(), watch);
      }
    });
    if (half) from_floats(given.dtype, own.s, samples.size(), row_at(given, given.s, t, samples.begin));
    if (half && given.v)
      from_floats(given.dtype, own.v, samples.size(), row_at(given, given.v, t, samples.begin), watch);
  }
  for (int i = 0; i < kWatch; ++i)
    if (lif.flag && watch[i] != 0.0f) __atomic_store_n((int32_t*)lif.flag, 1, __ATOMIC_RELAXED);
}

inline void recurrent_forward(const RecurrentArgs& a, int64_t first, int64_t units, const RecurrentMemory& memory) {
  for_neuron(a.lif.neuron, [&](auto n) { recurrent_forward_of<decltype(n)>(a, first, units, memory); });
}

}  // namespace trtkern::TK_ISA
