// The gradient of the image in tiles: gradients of y on the left, weights on the right. There are no spikes in it. Both
// are float32, each the sum of three bfloat16; of their nine products the three smallest are left out, which together
// are below 2^-20 of the product, and about 2^-23 on average.
//
// The rows of a tile are images, of one place each; the depth is 32 output channels; the columns are input channels.
#pragma once
#include "spike_conv/cpu_tiles.h"

#if defined(__AMX_BF16__)
namespace trtkern::TK_ISA {

constexpr int64_t kSlabBytes = 8 << 20;  // of gradients that are laid out at a time

// Sizes in tiles, and where things lie. Gradients, of some rows of y: [rows][out_w][depths][pieces][images][16][32]
// bfloat16. Weights: [columns][kernel_h * kernel_w][depths][pieces][2][16 pairs of output channels][16 input
// channels][2] bfloat16.
struct TilesInputGrad {
  int64_t images, rows, depths, columns, taps;
  int64_t row_bytes, slab, slabs, most_rows;  // rows of gx in a slab, how many slabs, rows of y that one reads
  int64_t gradients, weights;                 // bytes

  explicit TilesInputGrad(const SpikeConvArgs& a) {
    const int64_t all = a.T * a.B;
    images = parts(all, kTileRows), rows = parts(all, images);
    depths = parts(a.K, kDepth), columns = parts(a.C, kColumns), taps = a.kernel_h * a.kernel_w;
    row_bytes = a.out_w * depths * kPieces * images * rows * 64;
    const int64_t fit = kSlabBytes / row_bytes * a.stride_h - a.kernel_h;
    slab = fit < 1 ? 1 : fit > a.H ? a.H : fit;
    slabs = parts(a.H, slab), slab = parts(a.H, slabs);
    most_rows = (slab + a.kernel_h - 2) / a.stride_h + 2;
    gradients = parts(most_rows * row_bytes, 64) * 64;
    weights = columns * taps * depths * kPieces * 2 * kTileBytes;
  }
  // The first row of y that a slab of gx reads, and the one behind the last.
  int64_t first_row(const SpikeConvArgs& a, int64_t s) const {
    const int64_t at = s * slab + a.padding_h - (a.kernel_h - 1);
    return at <= 0 ? 0 : parts(at, a.stride_h);
  }
  int64_t end_row(const SpikeConvArgs& a, int64_t s) const {
    const int64_t last = (s + 1) * slab < a.H ? (s + 1) * slab : a.H;
    const int64_t end = (last - 1 + a.padding_h) / a.stride_h + 1;
    return end < a.out_h ? end : a.out_h;
  }
  int64_t rows_of(const SpikeConvArgs& a, int64_t s) const { return (s + 1) * slab < a.H ? slab : a.H - s * slab; }
  int64_t weights_at(int64_t column, int64_t tap) const {
    return (column * taps + tap) * depths * kPieces * 2 * kTileBytes;
  }
};

// The gradients of a row of y, of all steps and samples.
TK_NOINLINE inline void lay_gradient_row(const SpikeConvArgs& a, const TilesInputGrad& f, int64_t row, char* to,
                                         int* nonfinite) {
  const int64_t piece = f.images * f.rows * 64, all = a.T * a.B;
  vint unusual = {};
  for (int64_t column = 0; column < a.out_w; ++column)
    for (int64_t n = 0; n < f.images * f.rows; ++n) {
      const float* const g = (const float*)a.g + ((n * a.out_h + row) * a.out_w + column) * a.K;
      for (int64_t depth = 0; depth < f.depths; ++depth) {
        const int64_t k = depth * kDepth, left = n < all ? a.K - k : 0;
        char* const at = to + ((column * f.depths + depth) * kPieces * f.images * f.rows + n) * 64;
        unusual |= store_pieces(load_some(g + k, left), load_some(g + k + kTileRows, left - kTileRows), at, piece);
      }
    }
  if (any_lane(unusual)) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// The pieces of the weights of a block of input channels.
TK_NOINLINE inline void lay_weights_back(const SpikeConvArgs& a, const TilesInputGrad& f, int64_t column, char* weights,
                                         int* nonfinite) {
  vint unusual = {};
  const auto row = [&](const float* from, int64_t k, int64_t c) -> vfloat {
    const int64_t left = k < a.K ? a.C - c : 0;
    if (a.weight_c == 1) return load_some(from + k * a.weight_k + c, left);
    vfloat some = {};
    for (int64_t i = 0; i < kTileRows && i < left; ++i) some[i] = from[k * a.weight_k + (c + i) * a.weight_c];
    return some;
  };
  for (int64_t tap = 0; tap < f.taps; ++tap) {
    const float* const from = (const float*)a.weight + tap / a.kernel_w * a.weight_h + tap % a.kernel_w * a.weight_w;
    char* to = weights + f.weights_at(column, tap);
    for (int64_t depth = 0; depth < f.depths; ++depth, to += kPieces * 2 * kTileBytes)
      for (int64_t pair = 0; pair < kTileRows; ++pair)
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t k = depth * kDepth + pair * kPair, c = column * kColumns + half * kTileRows;
          const vfloat even = row(from, k, c), odd = row(from, k + 1, c);
          unusual |= nonfinite_lanes(even) | nonfinite_lanes(odd);
          store_pair(even, odd, to + half * kTileBytes + pair * 64);
        }
  }
  if (any_lane(unusual)) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// The products of pieces that are taken, the smallest first: of a gradient, of a weight.
constexpr int kProducts[][2] = {{0, 2}, {1, 1}, {2, 0}, {0, 1}, {1, 0}, {0, 0}};

// Adds what `IMAGES` tiles of gradients (1 or 2) at a place of y give with a tap's weights, a piece of each.
template <int IMAGES>
TK_INLINE void add_gradients(const char* gradients, const char* weights, int64_t depths, int64_t piece_bytes,
                             int64_t tile_bytes) {
  for (int64_t depth = 0; depth < depths; ++depth) {
    _tile_loadd(4, gradients, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (IMAGES == 2) {
      _tile_loadd(5, gradients + tile_bytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    gradients += kPieces * piece_bytes;
    weights += kPieces * 2 * kTileBytes;
  }
}

// gx of `IMAGES` tiles of images from tile `image` on, at a place, of a block of input channels.
template <int IMAGES>
TK_INLINE void compute_gradient(const SpikeConvArgs& a, const TilesInputGrad& f, int64_t place, int64_t column,
                                int64_t image, int64_t first_row, const char* gradients, const char* weights,
                                float* sums, bool streaming) {
  const int64_t tile_bytes = f.rows * 64, piece_bytes = f.images * tile_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (const auto& [of_gradient, of_weight] : kProducts)
    for (int64_t i = 0; i < a.kernel_h; ++i) {
      const int64_t down = place / a.W + a.padding_h - i, row = down / a.stride_h;
      if (down < 0 || down % a.stride_h || row >= a.out_h) continue;
      for (int64_t j = 0; j < a.kernel_w; ++j) {
        const int64_t right = place % a.W + a.padding_w - j, at = right / a.stride_w;
        if (right < 0 || right % a.stride_w || at >= a.out_w) continue;
        const int64_t of_place =
            (row - first_row) * f.row_bytes + (at * f.depths * kPieces + of_gradient) * piece_bytes;
        const int64_t of_tap = f.weights_at(column, i * a.kernel_w + j) + of_weight * 2 * kTileBytes;
        add_gradients<IMAGES>(gradients + of_place + image * tile_bytes, weights + of_tap, f.depths, piece_bytes,
                              tile_bytes);
      }
    }
  write_tiles<IMAGES>(sums, nullptr, f.rows, (float*)a.gx + place * a.C, a.H * a.W * a.C, image, a.T * a.B,
                      column * kColumns, a.C, streaming);
}

inline void run_tiles_input_grad(const SpikeConvArgs& a, int64_t phase, int64_t item, const SpikeMemory& memory) {
  const TilesInputGrad f(a);
  char *const gradients = memory.shared, *const weights = memory.shared + f.gradients;
  const int64_t s = phase / 2, first_row = f.first_row(a, s);
  if (phase % 2 == 0) {  // weights in the first of all, and the rows of y of each slab
    const int64_t rows = f.end_row(a, s) - first_row;
    if (item >= rows) return lay_weights_back(a, f, item - rows, weights, memory.nonfinite);
    return lay_gradient_row(a, f, first_row + item, gradients + item * f.row_bytes, memory.nonfinite);
  }
  // Whole lines of gx, which is larger than what the caches keep of it.
  const bool streaming = a.C % kColumns == 0 && a.gx % 64 == 0 && a.T * a.B * a.H * a.W * a.C >= 1 << 20;
  const int64_t rows = f.rows_of(a, s), column = item / rows, row = s * f.slab + item % rows;
  configure_tiles(f.rows);
  for (int64_t place = row * a.W; place < (row + 1) * a.W; ++place) {
    int64_t image = 0;
    float* const sums = (float*)memory.own;
    for (; image + 2 <= f.images; image += 2)
      compute_gradient<2>(a, f, place, column, image, first_row, gradients, weights, sums, streaming);
    if (image < f.images)
      compute_gradient<1>(a, f, place, column, image, first_row, gradients, weights, sums, streaming);
  }
  _tile_release();
  fence();
}

inline int64_t tiles_input_grad_items(const SpikeConvArgs& a, int64_t phase) {
  const TilesInputGrad f(a);
  const int64_t s = phase / 2;
  if (phase % 2 == 0) return f.end_row(a, s) - f.first_row(a, s) + (phase == 0 ? f.columns : 0);
  return f.columns * f.rows_of(a, s);
}

inline SpikePlan tiles_input_grad(const SpikeConvArgs& a) {
  const TilesInputGrad f(a);
  const int64_t own = 2 * kTileRows * kColumns * sizeof(float);
  return {f.gradients + f.weights, own, 2 * f.slabs, tiles_input_grad_items, run_tiles_input_grad};
}

}  // namespace trtkern::TK_ISA
#endif  // __AMX_BF16__
