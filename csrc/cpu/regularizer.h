// The TRT regulariser and its gradient over a run of parameters, one pass for both (docs/trt.md).
// With c = e^(delta t) - 1, k = 1 + c eps and d = (k + c |w|) / sqrt(k), step t adds 1 / (d sqrt(k)) to A and 1 / d^2
// to B;
//   sum_t w^2 / (1 + c (|w| + eps)) = w^2 A        its gradient = w (A + B)
// Step 0 has c = 0: it adds 1 to both.
//
// Sums go into 32 lanes whatever the width of a vector, so all of them agree bitwise.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace trtkern::TK_ISA {

constexpr int kSumLanes = 32;
constexpr int kVectors = kSumLanes / kLanes;
constexpr int64_t kFlush = 2048;  // parameters whose values are added in float

// A and B of two vectors of |w|. Two steps share a division, 1 / d = d' / (d d'): d is held below 2^62, where 1 / d has
// long vanished beside the 1 of step 0, so that d d' is finite.
template <int STEPS>
TK_INLINE void reciprocal_sums(const RegularizerArgs& r, const vfloat* size, vfloat* a, vfloat* b) {
  const int64_t steps = STEPS ? STEPS : r.T;
  const vfloat one = lit<vfloat>(1.0f), limit = lit<vfloat>(0x1p62f);
  a[0] = a[1] = b[0] = b[1] = one;
  const auto divisor = [&](int64_t t, int j) __attribute__((always_inline)) {
    return least_(fma_(lit<vfloat>(r.slope[t]), size[j], lit<vfloat>(r.offset[t])), limit);
  };
  const auto add = [&](int64_t t, int j, vfloat q) __attribute__((always_inline)) {
    a[j] = fma_(q, lit<vfloat>(r.root[t]), a[j]);
    b[j] = fma_(q, q, b[j]);
  };
  int64_t t = 1;
#pragma GCC unroll 8
  for (; t + 1 < steps; t += 2) {
    for (int j = 0; j < 2; ++j) {
      const vfloat d = divisor(t, j), next = divisor(t + 1, j), q = one / (d * next);
      add(t, j, q * next);
      add(t + 1, j, q * d);
    }
  }
  for (int j = 0; t < steps && j < 2; ++j) add(t, j, one / divisor(t, j));
}

template <bool STREAM>
TK_INLINE void write_gradient(float* g, vfloat gradient, bool accumulate) {
  if constexpr (STREAM) {
    stream(g, gradient);
  } else {
    store(g, accumulate ? load(g) + gradient : gradient);
  }
}

// kSumLanes parameters: their values added to `sums`, their gradients written to g unless it is null.
template <int STEPS, bool STREAM>
TK_INLINE void regularize(const RegularizerArgs& r, const float* w, float* g, vfloat* sums) {
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; i += 2) {
    vfloat value[2], size[2], a[2], b[2];
    for (int j = 0; j < 2; ++j) {
      value[j] = load(w + (i + j) * kLanes);
      size[j] = abs_(value[j]) * lit<vfloat>(r.shift);
    }
    reciprocal_sums<STEPS>(r, size, a, b);
    for (int j = 0; j < 2; ++j) {
      sums[i + j] = fma_(value[j] * value[j], a[j], sums[i + j]);
      if (!g) continue;
      const vfloat gradient = lit<vfloat>(r.factor) * value[j] * (a[j] + b[j]);
      write_gradient<STREAM>(g + (i + j) * kLanes, gradient, r.accumulate);
    }
  }
}

template <int STEPS, bool STREAM>
double regularize_piece(const RegularizerArgs& r, const float* w, float* g, int64_t n) {
  double totals[kSumLanes] = {};
  for (int64_t i = 0; i < n;) {
    vfloat sums[kVectors] = {};
    const int64_t end = n - i < kFlush ? n : i + kFlush;
    for (; i + kSumLanes <= end; i += kSumLanes) regularize<STEPS, STREAM>(r, w + i, g ? g + i : nullptr, sums);
    if (i < end) {  // the last few, beside zeros, which add nothing
      float last[kSumLanes] = {}, gradient[kSumLanes] = {};
      const int64_t bytes = sizeof(float) * (end - i);
      __builtin_memcpy(last, w + i, bytes);
      if (g) __builtin_memcpy(gradient, g + i, bytes);
      regularize<STEPS, false>(r, last, g ? gradient : nullptr, sums);
      if (g) __builtin_memcpy(g + i, gradient, bytes);
      i = end;
    }
    float lanes[kSumLanes];
    __builtin_memcpy(lanes, sums, sizeof lanes);
    for (int j = 0; j < kSumLanes; ++j) totals[j] += lanes[j];
  }
  double total = 0.0;
  for (int j = 0; j < kSumLanes; ++j) total += totals[j];
  fence();
  return total;
}

// T up to kMaxFixedSteps unrolls its steps; beyond, they are a loop.
template <int STEPS>
double regularizer_pick(const RegularizerArgs& r, const float* w, float* g, int64_t n, bool streaming) {
  if (STEPS && r.T != STEPS) return regularizer_pick<STEPS ? STEPS - 1 : 0>(r, w, g, n, streaming);
  return streaming ? regularize_piece<STEPS, true>(r, w, g, n) : regularize_piece<STEPS, false>(r, w, g, n);
}

// `streaming` needs g 64-byte aligned and a fresh gradient.
inline double regularizer(const RegularizerArgs& r, const float* w, float* g, int64_t n, bool streaming) {
  return regularizer_pick<kMaxFixedSteps>(r, w, g, n, streaming);
}

}  // namespace trtkern::TK_ISA
