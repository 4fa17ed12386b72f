// The gradients of the parameters, and the sums that a normalised x wants: a thread's sums over its steps, and the two
// stages that add them up over neurons, in a fixed order and without atomics: equal inputs give equal bits. Included by
// lif/cuda_body.h.
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

// Adds up the segments [segments, rows, C] of number i of [rows, C], and writes the gradient [P, C], or row i / C
// of norm_sums. `norm`: rows before those of the parameters.
TK_INLINE void finish_sum(const LifArgs& a, const index::Reduction& r, int rows, int norm, int64_t i) {
  const uint64_t segments = address<Float32>(a.workspace, rows * r.M);
  Pack<Float32, 1> part;
  double exact = 0.0;
  for (int64_t segment = 0; segment < r.segments(); ++segment) {
    part.load(address<Float32>(segments, index::offset(segment, i, rows * r.C)));
    exact += widen(part.get(0));
  }
  const int row = static_cast<int>(index::divide(i, r.C)) - norm;
  const int64_t channel = i - (row + norm) * r.C;
  if (row < 0) {
    if (a.norm_sums != 0) store_double(a.norm_sums, i, exact);
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
