// 2 x 2 average pooling within scratch memory: `n` neurons in pairs of rows of `row`, `side` of them at each place of
// a row (csrc/lif/args.h, pool_row). A spike's average is exact in every element type.
//
// Vectors run over the end of a row into what is written next, or into kPoolPad elements behind the memory.
#pragma once
#include "cpu/rows.h"

namespace trtkern::TK_ISA {

constexpr int64_t kPoolPad = 4 * kPad;

// The even and the odd lanes of two vectors in a row, and the two that give them.
template <class V>
TK_INLINE V even_lanes(V a, V b) {
  if constexpr (kLanes == 16) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  }
}
template <class V>
TK_INLINE V odd_lanes(V a, V b) {
  if constexpr (kLanes == 16) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
}
template <class V>
TK_INLINE V twice_low(V a) {
  if constexpr (kLanes == 16) {
    return __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(a, a, 0, 0, 1, 1, 2, 2, 3, 3);
  } else {
    return __builtin_shufflevector(a, a, 0, 0, 1, 1);
  }
}
template <class V>
TK_INLINE V twice_high(V a) {
  if constexpr (kLanes == 16) {
    return __builtin_shufflevector(a, a, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(a, a, 4, 4, 5, 5, 6, 6, 7, 7);
  } else {
    return __builtin_shufflevector(a, a, 2, 2, 3, 3);
  }
}

// Averages of n spikes into n / 4.
template <class D>
TK_NOINLINE void fold(const typename D::Raw* spikes, int64_t n, int64_t row, int64_t side, typename D::Raw* out) {
  const vfloat quarter = lit<vfloat>(0.25f);
  for (int64_t top = 0; top < n; top += 2 * row, out += row / 2) {
    const auto* above = spikes + top;
    const auto* below = above + row;
    if (side == 1) {
      for (int64_t j = 0; j < row / 2; j += kLanes) {
        const vfloat a = get<D>(above + 2 * j) + get<D>(below + 2 * j);
        const vfloat b = get<D>(above + 2 * j + kLanes) + get<D>(below + 2 * j + kLanes);
        put<false>(out + j, D::pack_exact(quarter * (even_lanes(a, b) + odd_lanes(a, b))));
      }
      continue;
    }
    auto* to = out;
    for (int64_t place = 0; place < row; place += 2 * side, to += side)
      for (int64_t i = 0; i < side; i += kLanes) {
        const auto *a = above + place + i, *b = below + place + i;
        const vfloat sum = (get<D>(a) + get<D>(a + side)) + (get<D>(b) + get<D>(b + side));
        put<false>(to + i, D::pack_exact(quarter * sum));
      }
  }
}

// n / 4 gradients, each to the four neurons that it belongs to; `from` has kPoolPad elements behind it.
template <class D>
TK_NOINLINE void spread(const typename D::Raw* from, int64_t n, int64_t row, int64_t side, typename D::Raw* out) {
  using Pack = typename D::Pack;
  for (int64_t top = 0; top < n; top += row) {  // in the order of memory: vectors run over the ends
    const auto* g = from + top / row / 2 * (row / 2);
    auto* to = out + top;
    for (int64_t j = 0; side == 1 && j < row / 2; j += kLanes) {
      const Pack two = load_as<Pack>(g + j);
      put<false>(to + 2 * j, twice_low(two)), put<false>(to + 2 * j + kLanes, twice_high(two));
    }
    for (int64_t place = 0; side > 1 && place < row / 2; place += side)
      for (int64_t twin = 0; twin < 2; ++twin)
        for (int64_t i = 0; i < side; i += kLanes)
          put<false>(to + 2 * place + twin * side + i, load_as<Pack>(g + place + i));
  }
}

}  // namespace trtkern::TK_ISA
