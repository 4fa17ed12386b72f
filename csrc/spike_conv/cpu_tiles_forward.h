// Forward in tiles: spikes on the left, weights on the right. The rows of a tile are images, of one place each; the
// depth is 32 input channels; the columns are output channels.
#pragma once
#include "spike_conv/cpu_tiles.h"

#if defined(__AMX_BF16__)
namespace trtkern::TK_ISA {

// Sizes in tiles, and where things lie. Spikes: [H][W][depths][images][rows][32] bfloat16. Weights:
// [columns][kernel_h * kernel_w][depths][pieces][2][16 pairs of channels][16 output channels][2] bfloat16.
struct TilesForward {
  int64_t images, rows, depths, columns, taps, places;
  int64_t spikes, weights;  // bytes

  explicit TilesForward(const SpikeConvArgs& a) {
    const int64_t all = a.T * a.B;
    images = parts(all, kTileRows), rows = parts(all, images);
    depths = parts(a.C, kDepth), columns = parts(a.K, kColumns), taps = a.kernel_h * a.kernel_w;
    spikes = a.H * a.W * depths * images * rows * 64;
    weights = columns * taps * depths * kPieces * 2 * kTileBytes;
    // Places that are computed one after the other, with one part of the weights.
    places = parts(a.out_h * a.out_w, parts(a.out_h * a.out_w, 64));
  }
  int64_t place_blocks(const SpikeConvArgs& a) const { return parts(a.out_h * a.out_w, places); }
  int64_t spikes_at(int64_t place) const { return place * depths * images * rows * 64; }
  int64_t weights_at(int64_t column, int64_t tap) const {
    return ((column * taps + tap) * depths) * kPieces * 2 * kTileBytes;
  }
};

// The spikes of an image row, of all steps and samples.
TK_NOINLINE inline void lay_spikes(const SpikeConvArgs& a, const TilesForward& f, int64_t row, char* spikes) {
  const bool single = single_spikes(a);
  const float scale = spike_scale(a);
  alignas(64) uint8_t counts[kSpikeChunk];
  for (int64_t column = 0; column < a.W; ++column) {
    char* const place = spikes + f.spikes_at(row * a.W + column);
    for (int64_t n = 0; n < f.images * f.rows; ++n) {
      const int64_t t = n / a.B, b = n % a.B;
      for (int64_t c = 0; c < f.depths * kDepth; c += kSpikeChunk) {
        const int64_t left = a.C - c < kSpikeChunk ? a.C - c : kSpikeChunk;
        vpieces halves[2] = {};
        if (n < a.T * a.B && single) {
          const uint64_t bits = spike_bits(a, t, b, row, column, c, left);
          halves[0] = values_of((uint32_t)bits), halves[1] = values_of((uint32_t)(bits >> 32));
        } else if (n < a.T * a.B) {
          spike_counts(a, t, b, row, column, c, left, counts);
          halves[0] = values_of(counts, scale), halves[1] = values_of(counts + kDepth, scale);
        }
        for (int64_t half = 0; half < 2 && c + half * kDepth < f.depths * kDepth; ++half)
          __builtin_memcpy(place + ((c / kDepth + half) * f.images * f.rows + n) * 64, &halves[half], 64);
      }
    }
  }
}

// 16 x 16 floats of the weights, [channel][output channel]; those that are not there are 0.
TK_INLINE void weights_of(const SpikeConvArgs& a, const float* from, int64_t c, int64_t k, vfloat* rows) {
  const int64_t channels = a.C - c < kTileRows ? a.C - c : kTileRows,
                outputs = a.K - k < kTileRows ? a.K - k : kTileRows;
  from += k * a.weight_k + c * a.weight_c;
  if (a.weight_c == 1 && channels == kTileRows && outputs == kTileRows) {
    for (int64_t i = 0; i < kTileRows; ++i) rows[i] = load(from + i * a.weight_k);
    return transpose(rows);
  }
  for (int64_t i = 0; i < kTileRows; ++i) {
    vfloat row = {};
    for (int64_t j = 0; i < channels && j < outputs; ++j) row[j] = from[j * a.weight_k + i * a.weight_c];
    rows[i] = row;
  }
}

// The pieces of the weights of a block of output channels.
TK_NOINLINE inline void lay_weights(const SpikeConvArgs& a, const TilesForward& f, int64_t column, char* weights,
                                    int* nonfinite) {
  vint unusual = {};
  vfloat rows[kTileRows];
  for (int64_t tap = 0; tap < f.taps; ++tap) {
    const float* const from = (const float*)a.weight + tap / a.kernel_w * a.weight_h + tap % a.kernel_w * a.weight_w;
    char* to = weights + f.weights_at(column, tap);
    for (int64_t depth = 0; depth < f.depths; ++depth, to += kPieces * 2 * kTileBytes)
      for (int64_t part = 0; part < kDepth / kTileRows; ++part)
        for (int64_t half = 0; half < kColumns / kTileRows; ++half) {
          weights_of(a, from, depth * kDepth + part * kTileRows, column * kColumns + half * kTileRows, rows);
          for (int64_t i = 0; i < kTileRows; i += kPair) {
            unusual |= nonfinite_lanes(rows[i]) | nonfinite_lanes(rows[i + 1]);
            store_pair(rows[i], rows[i + 1], to + half * kTileBytes + (part * kTileRows + i) / kPair * 64);
          }
        }
  }
  if (any_lane(unusual)) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// Adds what `IMAGES` tiles of images (1 or 2) at a place give with a piece of a tap's weights.
template <int IMAGES>
TK_INLINE void add_products(const char* spikes, const char* weights, int64_t depths, int64_t images_bytes,
                            int64_t tile_bytes) {
  for (int64_t depth = 0; depth < depths; ++depth) {
    _tile_loadd(4, spikes, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (IMAGES == 2) {
      _tile_loadd(5, spikes + tile_bytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    weights += kPieces * 2 * kTileBytes;
    spikes += images_bytes;
  }
}

// y of `IMAGES` tiles of images from tile `image` on, at a place, of a block of output channels.
template <int IMAGES>
TK_INLINE void compute_place(const SpikeConvArgs& a, const TilesForward& f, int64_t place, int64_t column,
                             int64_t image, const char* spikes, const char* weights, const float* bias, float* sums,
                             bool streaming) {
  const int64_t tile_bytes = f.rows * 64, images_bytes = f.images * tile_bytes;
  const int64_t top = place / a.out_w * a.stride_h - a.padding_h, left = place % a.out_w * a.stride_w - a.padding_w;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t piece = kPieces - 1; piece >= 0; --piece)
    for (int64_t i = 0; i < a.kernel_h; ++i)
      for (int64_t j = 0; j < a.kernel_w; ++j) {
        const int64_t row = top + i, at = left + j;
        if (row < 0 || row >= a.H || at < 0 || at >= a.W) continue;
        const int64_t of_tap = f.weights_at(column, i * a.kernel_w + j) + piece * 2 * kTileBytes;
        add_products<IMAGES>(spikes + f.spikes_at(row * a.W + at) + image * tile_bytes, weights + of_tap, f.depths,
                             images_bytes, tile_bytes);
      }
  write_tiles<IMAGES>(sums, bias, f.rows, (float*)a.y + place * a.K, a.out_h * a.out_w * a.K, image, a.T * a.B,
                      column * kColumns, a.K, streaming);
}

inline void run_tiles_forward(const SpikeConvArgs& a, int64_t phase, int64_t item, const SpikeMemory& memory) {
  const TilesForward f(a);
  char *const spikes = memory.shared, *const weights = memory.shared + parts(f.spikes, 64) * 64;
  if (phase == 0) {
    if (item < f.columns) return lay_weights(a, f, item, weights, memory.nonfinite);
    return lay_spikes(a, f, item - f.columns, spikes);
  }
  const int64_t blocks = f.place_blocks(a), column = item / blocks, all = a.out_h * a.out_w;
  float* const sums = (float*)memory.own;
  float* const bias = sums + 2 * kTileRows * kColumns;
  for (int64_t k = 0; k < kColumns; ++k)
    bias[k] = a.bias && column * kColumns + k < a.K ? ((const float*)a.bias)[column * kColumns + k] : 0.0f;
  // Whole lines of y, which is larger than what the caches keep of it.
  const bool streaming = a.K % kColumns == 0 && a.y % 64 == 0 && a.T * a.B * all * a.K >= 1 << 20;
  configure_tiles(f.rows);
  const int64_t from = item % blocks * f.places, to = from + f.places < all ? from + f.places : all;
  for (int64_t place = from; place < to; ++place) {
    int64_t image = 0;
    for (; image + 2 <= f.images; image += 2)
      compute_place<2>(a, f, place, column, image, spikes, weights, bias, sums, streaming);
    if (image < f.images) compute_place<1>(a, f, place, column, image, spikes, weights, bias, sums, streaming);
  }
  _tile_release();
  fence();
}

inline int64_t tiles_forward_items(const SpikeConvArgs& a, int64_t phase) {
  const TilesForward f(a);
  return phase == 0 ? f.columns + a.H : f.columns * f.place_blocks(a);
}

inline SpikePlan tiles_forward(const SpikeConvArgs& a) {
  const TilesForward f(a);
  const int64_t own = (2 * kTileRows + 1) * kColumns * sizeof(float);
  return {parts(f.spikes, 64) * 64 + f.weights, own, 2, tiles_forward_items, run_tiles_forward};
}

}  // namespace trtkern::TK_ISA
#endif  // __AMX_BF16__
