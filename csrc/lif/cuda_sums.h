// The gradients of the parameters, and the sums that a normalised x wants: a thread's sums over its steps, and the two
// stages that add them up over neurons, in a fixed order: equal inputs give equal bits. Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// Rows of the sums of LIF's parameter gradients: `reset` serves whichever of reset_amount and v_reset is in use. Those
// of another neuron are its parameters.
enum Sum : int { kSumDecay, kSumGain, kSumBias, kSumReset, kSumThreshold, kSums };

// Rows of a fused kernel's sums that stand before those: of gx and of gx * (x - center).
enum NormSum : int { kNormGradient, kNormProduct, kNormSums };

// What one thread of the reduction adds up of its segment of a row of the workspace.
TK_INLINE Real segment_sum(const index::Reduction& r, int rows, uint64_t workspace, int64_t block, int thread) {
  const index::Reduction::Place place = r.place(block, rows);
  const int64_t channel = r.channel(place.tile, thread);
  Real sum = 0.0f;
  if (channel >= r.C) return sum;
  int64_t end = (place.segment + 1) * r.span();
  if (end > r.members()) end = r.members();
  for (int64_t k = place.segment * r.span() + r.start(thread); k < end; k += r.stride()) {
    const int64_t m = r.member(k, channel);
    if (m >= r.M) break;
    Pack<Float32, 1> value;
    value.load(address<Float32>(workspace, index::offset(place.row, m, r.M)));
    sum += value.get(0);
  }
  return sum;
}

// The number as it is written.
template <class E>
TK_INLINE Real store_as(uint64_t base, int64_t element, Real value) {
  Pack<E, 1> out;
  const Real one[1] = {value};
  out.set(one);
  out.store(address<E>(base, element));
  return out.get(0);
}
TK_INLINE void store_one(uint64_t base, int64_t element, Real value) { store_as<Float32>(base, element, value); }

// Adds up the segments [segments, rows, C] of row `at` of a channel, and writes the gradient [P, C], or that row of
// norm_sums. `norm`: rows before those of the parameters.
TK_INLINE void finish_sum(const LifArgs& a, const index::Reduction& r, int rows, int norm, int at, int64_t channel) {
  const uint64_t segments = address<Float32>(a.workspace, rows * r.M);
  double exact = 0.0;
  for (int64_t segment = 0; segment < r.segments(); ++segment) {
    exact += static_cast<double>(load_float(segments, index::offset(segment * rows + at, channel, r.C)));
  }
  const int row = at - norm;
  if (row < 0) {
    if (a.norm_sums != 0) store_double(a.norm_sums, index::offset(at, channel, r.C), exact);
    return;
  }
  const Real sum = static_cast<float>(exact);
  if (a.neuron != LIF::kId || row != kSumReset) return store_one(a.gparams, index::offset(row, channel, r.C), sum);
  const Real zero = 0.0f;
  store_one(a.gparams, index::offset(kResetAmount, channel, r.C), where_(a.reset == kSoft, -sum, zero));
  store_one(a.gparams, index::offset(kVReset, channel, r.C), where_(a.reset == kHard, sum, zero));
}

}  // namespace cuda
}  // namespace trtkern
