// Neurons that feed each other backward on the CPU: the traces of a chunk of a group of samples are computed again from
// the currents; then, step by step from the last, the product with the gradients of the step behind it, and the
// neurons.
#pragma once
#include "lif/cpu_backward.h"
#include "recurrent/cpu_rows.h"

namespace trtkern::TK_ISA {

// Scratch memory of a group, as forward; what a block of neurons has is kNeuronRows rows of kStride floats.
struct RecurrentBackwardMemory {
  static constexpr int64_t kNeuronRows = kChunk + 2 * kMostStates + kMostParams;
  float *rows, *fed, *current, *gs, *gv, *gx, *neurons, *end;

  RecurrentBackwardMemory(const RecurrentArgs& a, int64_t units, float* own) {
    const Samples samples(a, 0, units);
    const int64_t row = samples.size() + kPad;
    const bool half = a.lif.dtype != kFloat32;
    Scratch pieces{own};
    rows = pieces.take(samples.count(a.lif, kBackwardBlock) * kNeuronRows * kStride);
    fed = pieces.take(units * kSamples * product_pitch(a.width));
    current = pieces.take(half ? kChunk * samples.size() + kPad : 0);
    gs = pieces.take(row);
    gv = pieces.take(half ? row : 0);
    gx = pieces.take(half ? row : 0);
    neurons = pieces.take(kBackwardScratch);
    end = pieces.next;
  }
};

// The gradient of the spikes of step t of a group: what comes from outside, and what they fed to the step behind it.
TK_NOINLINE inline void feed_back(const RecurrentArgs& a, const Samples& samples, int64_t t,
                                  const RecurrentMemory& memory, const RecurrentBackwardMemory& m) {
  const LifArgs& lif = a.lif;
  const bool last = t + 1 == lif.T;
  const float* gx = lif.dtype == kFloat32 && !last ? (const float*)row_at(lif, lif.gx, t + 1, samples.begin) : m.gx;
  if (!last) multiply_rows(a, memory, true, gx, samples.rows, false, m.fed, (char*)m.end);
  for (int64_t r = 0; r < samples.rows; ++r)
    write_gradient(lif.dtype, row_at(lif, lif.gs, t, samples.begin + r * a.width),
                   last ? nullptr : m.fed + r * product_pitch(a.width), a.width, m.gs + r * a.width);
}

template <class N>
void recurrent_backward_of(const RecurrentArgs& a, int64_t first, int64_t units, const RecurrentMemory& memory,
                           double* sums) {
  constexpr int kSteps = kChunk / N::kTraces;
  static_assert(N::kStates <= kMostStates && N::kParams <= kMostParams);
  const LifArgs& given = a.lif;
  const Samples samples(a, first, units);
  const RecurrentBackwardMemory own(a, units, (float*)memory.own);
  BackwardMemory<Float32, N> m(Scratch{own.neurons});
  const bool half = given.dtype != kFloat32;
  LifArgs lif = given;
  lif.dtype = kFloat32;
  ParamSums<N> param_sums{nullptr, nullptr};
  const auto of_block = [&](int64_t number, int64_t unit) {
    float* const rows = own.rows + number * own.kNeuronRows * kStride;
    m.traces = rows, m.start = rows + kChunk * kStride, m.carry = m.start + kMostStates * kStride;
    m.param_sums = param_sums.rows = m.carry + kMostStates * kStride;
    if (lif.gparams) param_sums.totals = sums + unit * lif.P * lif.C;
  };
  BackwardRow<Float32, N> row{};
  row.run = row.run_streaming = backward_run_of<Float32, N, 0, false>(lif, kAnything);
  row.alpha = lif.alpha, row.share = 1.0f;
  row.reset = lif.reset, row.surrogate = lif.surrogate, row.detach = lif.detach != 0, row.of_h = lif.before != 0;
  for (int64_t t0 = (lif.T - 1) / kSteps * kSteps; t0 >= 0; t0 -= kSteps) {
    const int steps = (int)(lif.T - t0 < kSteps ? lif.T - t0 : kSteps);
    const int64_t edge = t0 ? (t0 / kSteps - 1) * N::kStates : 0;
    for (int j = 0; half && j < steps; ++j)
      to_floats(given.dtype, row_at(given, given.x, t0 + j, samples.begin), samples.size(),
                own.current + j * samples.size());
    if (half) lif.x = as_tensor(own.current, t0, samples.size(), samples.begin), lif.x_stride = samples.size();
    samples.each(lif, kBackwardBlock, [&](const Block& b, int64_t number, int64_t unit) {
      of_block(number, unit);
      for (int k = 0; k < N::kStates; ++k) {
        if (t0 + steps == lif.T) read_row(m.carry + k * kStride, lif.gv_final, k * lif.N, b);
        read_row(m.start + k * kStride, t0 ? lif.edges : lif.v0, (edge + k) * lif.N, b);
      }
      recompute_chunk<Float32, N>(lif, m.params.parameters(lif, b), Rows{}, t0, steps, b, m);
      param_sums.clear(lif);
    });
    for (int j = steps - 1; j >= 0; --j) {
      const int64_t t = t0 + j;
      feed_back(a, samples, t, memory, own);
      lif.gs = as_tensor(own.gs, t, lif.N, samples.begin);
      if (half) lif.gx = as_tensor(own.gx, t, lif.N, samples.begin);
      if (half && given.gv) {
        to_floats(given.dtype, row_at(given, given.gv, t, samples.begin), samples.size(), own.gv);
        lif.gv = as_tensor(own.gv, t, lif.N, samples.begin);
      }
      samples.each(lif, kBackwardBlock, [&](const Block& b, int64_t number, int64_t unit) {
        of_block(number, unit);
        row.params = m.params.parameters(lif, b);
        backward_step<Float32, N>(lif, t, j, b, row, m, false);
        if (j) return;
        param_sums.add(lif, b);
        for (int k = 0; lif.gv0 && t == 0 && k < N::kStates; ++k)
          write_row(lif.gv0, k * lif.N, m.carry + k * kStride, b, false);
      });
      if (half) from_floats(given.dtype, own.gx, samples.size(), row_at(given, given.gx, t, samples.begin));
    }
  }
}

inline void recurrent_backward(const RecurrentArgs& a, int64_t first, int64_t units, const RecurrentMemory& memory,
                               double* sums) {
  for_neuron(a.lif.neuron, [&](auto n) { recurrent_backward_of<decltype(n)>(a, first, units, memory, sums); });
}

}  // namespace trtkern::TK_ISA
