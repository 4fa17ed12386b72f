// Which input places a tap of the kernel reads, with strides: a tap (its row and column in the kernel) reads every
// stride-th row and column. Those form a grid, and the taps that read the same grid form a class; stride 1 has one.
#pragma once
#include "spike_conv/cpu_lists.h"

namespace trtkern::TK_ISA {

// One side of it, rows or columns: tap reads places first + stride * i, for the output place i - shift.
struct TapSide {
  int64_t first, shift;
};
TK_INLINE TapSide tap_side(int64_t tap, int64_t padding, int64_t stride) {
  const int64_t shift = floor_div(tap - padding, stride);
  return {tap - padding - shift * stride, shift};
}

// The grid of a class on one side: which of its places are in the image, and how its taps are shifted.
struct GridSide {
  int64_t size;         // places 0 to size - 1
  int64_t least, most;  // shifts of its taps
  bool any;             // whether a tap reads it
};
TK_INLINE GridSide grid_side(int64_t first, int64_t places, int64_t taps, int64_t padding, int64_t stride) {
  GridSide side{first < places ? parts(places - first, stride) : 0, 0, 0, false};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const TapSide t = tap_side(tap, padding, stride);
    if (t.first != first) continue;
    if (!side.any) side.least = t.shift;
    side.most = t.shift, side.any = true;
  }
  return side;
}

TK_INLINE TapSide tap_row(const SpikeConvArgs& a, int64_t tap) {
  return tap_side(tap / a.kernel_w, a.padding_h, a.stride_h);
}
TK_INLINE TapSide tap_column(const SpikeConvArgs& a, int64_t tap) {
  return tap_side(tap % a.kernel_w, a.padding_w, a.stride_w);
}
TK_INLINE int64_t tap_class(const SpikeConvArgs& a, int64_t tap) {
  return tap_row(a, tap).first * a.stride_w + tap_column(a, tap).first;
}
TK_INLINE int64_t tap_count(const SpikeConvArgs& a) { return a.kernel_h * a.kernel_w; }
TK_INLINE int64_t class_count(const SpikeConvArgs& a) { return a.stride_h * a.stride_w; }
TK_INLINE GridSide grid_rows(const SpikeConvArgs& a, int64_t of_class) {
  return grid_side(of_class / a.stride_w, a.H, a.kernel_h, a.padding_h, a.stride_h);
}
TK_INLINE GridSide grid_columns(const SpikeConvArgs& a, int64_t of_class) {
  return grid_side(of_class % a.stride_w, a.W, a.kernel_w, a.padding_w, a.stride_w);
}

}  // namespace trtkern::TK_ISA
