// The sums of a backward pass on the CPU, for the gradients of the parameters and of the norm: floats that a few
// numbers go into, added to totals in double, in an order that the width of a vector does not change.
#pragma once
#include "cpu/rows.h"

namespace trtkern::TK_ISA {

constexpr int64_t kSumStride = kStride + 512;  // between the two: loads do not meet stores 4096 bytes before them

// Adds to a vector of sums.
TK_INLINE void add_to(float* sum, vfloat a) { store(sum, a + load(sum)); }
TK_INLINE void add_to(float* sum, vfloat a, vfloat b) { store(sum, fma_(a, b, load(sum))); }

// Sums for the gradients of the parameters, a row of floats each: cleared for a chunk, then added to [P, C].
template <class N>
struct ParamSums {
  float* rows;
  double* totals;  // null: not wanted

  void clear(const LifArgs& a) const {
    for (int k = 0; totals && k < N::kParams; ++k)
      if (N::learned(a.reset) >> k & 1) __builtin_memset(rows + k * kStride, 0, sizeof(float) * kStride);
  }
  void add(const LifArgs& a, const Block& b) const {
    for (int k = 0; totals && k < N::kParams; ++k)
      if (N::learned(a.reset) >> k & 1) add_channels(a, b, rows + k * kStride, totals + k * a.C);
  }
};

// The two sums of the norm. Where channels are long, kSpan neurons in turn share a float, for a block; where they are
// short, a float is a neuron's, kept while blocks start at the same channel. Some kMostAdded numbers go into one.
struct NormSums {
  float* rows;
  double* totals;  // [2, C]; null: not wanted
  bool shared = false;
  int64_t added = 0;  // rows
  Block block{};
  static constexpr int64_t kMostAdded = kBackwardBlock / kSpan;

  NormSums(float* rows, double* totals) : rows(rows), totals(totals) {}
  // Before a step of a block; `fresh`: its channels are not those of the block before.
  void begin(const LifArgs& a, const Block& b, bool shared_by_span, bool fresh) {
    if (!totals) return;
    if (fresh || added == 0 || added >= kMostAdded || b.size() > block.size()) {
      flush(a);
      block = b, shared = shared_by_span;
      for (int k = 0; k < 2; ++k)
        __builtin_memset(rows + k * kSumStride, 0, sizeof(float) * (shared ? kSpan : kStride));
    }
    ++added;
  }
  // Before all steps of a block at once: begin() for each, or false and nothing where they do not go into the same
  // floats.
  bool begin_all(const LifArgs& a, const Block& b, bool shared_by_span, bool fresh) {
    const bool anew = fresh || added == 0 || added >= kMostAdded || b.size() > block.size();
    if (!totals) return true;
    if (!anew && added + a.T > kMostAdded) return false;
    begin(a, b, shared_by_span, fresh);
    added += a.T - 1;
    return true;
  }
  void flush(const LifArgs& a) {
    for (int k = 0; added && k < 2; ++k) {
      if (shared) {
        totals[k * a.C + block.at / a.inner % a.C] += ordered_sum(rows + k * kSumStride, kSpan);
      } else {
        add_channels(a, block, rows + k * kSumStride, totals + k * a.C);
      }
    }
    added = 0;
  }
};

// The two sums of the norm of a span, in registers.
struct SpanSums {
  vfloat gx[kSpanVectors], moment[kSpanVectors];
  TK_INLINE void store_to(float* sums) const {
    for (int k = 0; k < kSpanVectors; ++k) {
      add_to(sums + k * kLanes, gx[k]);
      add_to(sums + kSumStride + k * kLanes, moment[k]);
    }
  }
};

}  // namespace trtkern::TK_ISA
