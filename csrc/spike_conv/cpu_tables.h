// Tables in the L1 cache: a table has, for four numbers of each of kTableOutputs outputs, the 16 sums of their subsets,
// [vectors of outputs, 16 sums, lanes]. A nibble looks up a row of outputs, which is added.
//
// Forward, the numbers are the weights of four input channels, and what is added to belongs to an image at a place. In
// the weight's gradient they are the gradients of four images at a place, and what is added to belongs to an input
// channel and a tap of the kernel.
#pragma once
#include "spike_conv/cpu_nibbles.h"

#if defined(__AVX2__)
namespace trtkern::TK_ISA {

constexpr int64_t kTableOutputs = 32;
constexpr int kTableVectors = kTableOutputs / kLanes;
constexpr int64_t kTableBytes = kTableOutputs * kSubsets * 4;
constexpr int64_t kTablesHeld = 16;                 // 32 KiB
constexpr int kTogether = kLanes == 16 ? 4 : 2;     // rows that are added to together, so that no sum waits for another
constexpr int kNibbleShift = kLanes == 16 ? 3 : 2;  // a nibble lies as an eighth of the bytes that it moves in a table

static_assert((sizeof(vfloat) >> kNibbleShift) == 8, "an address can multiply by 8");

// rows[r] += what the nibble at `nibbles + r * apart` looks up, r < R.
template <int R>
TK_INLINE void look_up(vfloat (&rows)[R][kTableVectors], const char* table, const uint8_t* nibbles, int64_t apart) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto* found = (const vfloat*)(table + (int64_t)nibbles[r * apart] * 8);
#pragma GCC unroll 8
    for (int v = 0; v < kTableVectors; ++v) rows[r][v] += found[v * kSubsets];
  }
}

template <int R>
TK_INLINE void load_rows(vfloat (&rows)[R][kTableVectors], const float* from) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTableVectors; ++v) rows[r][v] = load(from + r * kTableOutputs + v * kLanes);
}
template <int R>
TK_INLINE void store_rows(float* to, const vfloat (&rows)[R][kTableVectors]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTableVectors; ++v) store(to + r * kTableOutputs + v * kLanes, rows[r][v]);
}

// The 16 sums of a, b, c, d, one vector after the other. Returns 0, or NaN where one is not finite: sum 0 has none.
TK_INLINE vfloat make_table(float* table, vfloat a, vfloat b, vfloat c, vfloat d) {
  const vfloat zero = {}, none = fma_(zero, d, fma_(zero, c, fma_(zero, b, zero * a)));
  const vfloat ab = a + b, cd = c + d;
  const vfloat sums[kSubsets] = {zero, a,     b,     ab,     c,  a + c,  b + c,  ab + c,
                                 d,    a + d, b + d, ab + d, cd, a + cd, b + cd, ab + cd};
  for (int64_t i = 0; i < kSubsets; ++i) store(table + i * kLanes, sums[i]);
  return none;
}

// Whether a lane is NaN.
TK_INLINE bool has_nan(vfloat a) {
  int found = 0;
  for (int i = 0; i < kLanes; ++i) found |= a[i] != a[i];
  return found;
}

}  // namespace trtkern::TK_ISA
#endif  // __AVX2__
