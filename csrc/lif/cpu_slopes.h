// The surrogates of many neurons, where which one it is is known at run time.
#pragma once
#include "cpu/rows.h"

namespace trtkern::TK_ISA {

constexpr int kAnySurrogate = -1;  // in place of one: it is a member's
constexpr int kStrip = 256;        // neurons whose surrogates are then taken at once, each in a loop of its own

// The surrogate at n numbers u, in their place.
template <int ID = 0>
TK_NOINLINE void surrogates_of(int id, float* u, float alpha, int64_t n) {
  if constexpr (ID < kSurrogates) {
    if (id != ID) return surrogates_of<ID + 1>(id, u, alpha, n);
    const vfloat sharpness = lit<vfloat>(alpha);
    for (int64_t i = 0; i < n; i += kLanes) store(u + i, surrogate<ID>(load(u + i), sharpness));
  }
}

// The surrogates of a strip of n neurons.
template <class N>
TK_INLINE void strip_slopes(const float* traces, const Rows& params, int64_t from, int64_t n, int surrogate,
                            float alpha, float* slopes) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vfloat trace[N::kTraces], potential, threshold;
    load_numbers<N::kTraces>(traces, kStride, from + i, trace);
    N::fire(trace, params_of<N>(params, from + i).at, potential, threshold);
    store(slopes + i, potential - threshold);
  }
  surrogates_of(surrogate, slopes, alpha, n);
}

}  // namespace trtkern::TK_ISA
