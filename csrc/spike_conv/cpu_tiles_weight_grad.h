// The weight's gradient in tiles: spikes on the left, gradients of y on the right. The rows of a tile are input
// channels; the depth is 32 of the T * B images, of one place each; the columns are output channels.
#pragma once
#include "spike_conv/cpu_tiles.h"

#if defined(__AMX_BF16__)
namespace trtkern::TK_ISA {

constexpr int64_t kRowsPair = 2 * kTileRows;                         // input channels that are computed together
constexpr int64_t kSums = kRowsPair * kColumns;                      // ... and their sums, floats
constexpr int64_t kGradientBytes = kPieces * 2 * kTileBytes;         // of a place and 32 images
constexpr int64_t kMostPositions = 64, kPositionsBytes = 600 << 10;  // what a second-level cache holds beside the sums

// Sizes in tiles, and where things lie. A position is a place of y and 32 images. Spikes:
// [H][W][depths][rows][16 channels][32 images] bfloat16, image b * T + t being step t of sample b.
struct TilesWeightGrad {
  int64_t depths, rows, columns, taps, positions, at_once;
  int64_t spikes;  // bytes

  explicit TilesWeightGrad(const SpikeConvArgs& a) {
    depths = parts(a.T * a.B, kDepth), rows = 2 * parts(a.C, kRowsPair);
    columns = parts(a.K, kColumns), taps = a.kernel_h * a.kernel_w;
    positions = a.out_h * a.out_w * depths;
    const int64_t bytes = rows * kTileBytes + kGradientBytes, fit = kPositionsBytes / bytes;
    at_once = fit < 8 ? 8 : fit > kMostPositions ? kMostPositions : fit;
    spikes = a.H * a.W * depths * rows * kTileBytes;
  }
  int64_t spikes_at(int64_t place, int64_t depth) const { return (place * depths + depth) * rows * kTileBytes; }
};

// The spikes of 32 images at the places of an image row.
TK_NOINLINE inline void lay_channels(const SpikeConvArgs& a, const TilesWeightGrad& f, int64_t row, int64_t depth,
                                     char* spikes) {
  const bool single = single_spikes(a);
  const float scale = spike_scale(a);
  const int64_t first = depth * kDepth, all = a.T * a.B, count = all - first < kDepth ? all - first : kDepth;
  alignas(64) uint8_t counts[kDepth][kSpikeChunk], images[kTileRows][kDepth];
  alignas(64) uint32_t bits[kTileRows];
  for (int64_t column = 0; column < a.W; ++column) {
    char* to = spikes + f.spikes_at(row * a.W + column, depth);
    for (int64_t r = 0; r < f.rows; ++r, to += kTileBytes) {
      const int64_t c = r * kTileRows, left = a.C - c < kTileRows ? a.C - c : kTileRows;
      if (left <= 0) {
        __builtin_memset(to, 0, kTileBytes);
      } else if (single) {
        vuint masks = {};
        for (int64_t n = 0; n < count; ++n) {
          const int64_t t = (first + n) % a.T, b = (first + n) / a.T;
          const __m128i words =
              _mm_maskz_loadu_epi8((__mmask16)((1u << left) - 1), words_at(a, 0, t / 8, b, row, column) + c);
          masks |= ((vuint)_mm512_cvtepu8_epi32(words) >> (uint32_t)(t % 8) & 1u) << (uint32_t)n;
        }
        __builtin_memcpy(bits, &masks, sizeof bits);
        for (int64_t i = 0; i < kTileRows; ++i) {
          const vpieces values = values_of(bits[i]);
          __builtin_memcpy(to + i * 64, &values, 64);
        }
      } else {
        const int64_t within = c % kSpikeChunk, chunk = a.C - (c - within);
        for (int64_t n = 0; within == 0 && n < kDepth; ++n) {
          if (n >= count) __builtin_memset(counts[n], 0, sizeof counts[n]);
          if (n < count)
            spike_counts(a, (first + n) % a.T, (first + n) / a.T, row, column, c,
                         chunk < kSpikeChunk ? chunk : kSpikeChunk, counts[n]);
        }
        for (int64_t n = 0; n < kDepth; ++n)
          for (int64_t i = 0; i < kTileRows; ++i) images[i][n] = counts[n][within + i];
        for (int64_t i = 0; i < kTileRows; ++i) {
          const vpieces values = values_of(images[i], scale);
          __builtin_memcpy(to + i * 64, &values, 64);
        }
      }
    }
  }
}

// The pieces of the gradients at a position, of a block of output channels; lanes of what is not finite into `unusual`.
TK_INLINE void lay_gradients(const SpikeConvArgs& a, int64_t place, int64_t depth, int64_t column, char* to,
                             vint* unusual) {
  const int64_t all = a.T * a.B, k = column * kColumns, left = a.K - k;
  const auto row = [&](int64_t n, int64_t half) -> vfloat {
    if (n >= all || left <= half * kTileRows) return vfloat{};
    const int64_t t = n % a.T, b = n / a.T;
    const float* g = (const float*)a.g + ((t * a.B + b) * a.out_h * a.out_w + place) * a.K + k + half * kTileRows;
    if (left >= (half + 1) * kTileRows) return load(g);
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << (left - half * kTileRows)) - 1), g);
  };
  for (int64_t pair = 0; pair < kTileRows; ++pair)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t n = depth * kDepth + pair * kPair;
      const vfloat even = row(n, half), odd = row(n + 1, half);
      *unusual |= nonfinite_lanes(even) | nonfinite_lanes(odd);
      store_pair(even, odd, to + half * kTileBytes + pair * 64);
    }
}

// Adds what n positions give to the sums of 32 input by 32 output channels. `some`: memory of such sums.
TK_INLINE void add_positions(const char* const* spikes, const char* const* gradients, int64_t n, float* some,
                             float* sums) {
  constexpr int64_t kPitch = kColumns * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t piece = kPieces - 1; piece >= 0; --piece)
    for (int64_t i = 0; i < n; ++i) {
      const char* const g = gradients[i] + piece * 2 * kTileBytes;
      _tile_loadd(4, spikes[i], 64);
      _tile_loadd(6, g, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, spikes[i] + kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, g + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, some, kPitch);
  _tile_stored(1, some + kTileRows, kPitch);
  _tile_stored(2, some + kTileRows * kColumns, kPitch);
  _tile_stored(3, some + kTileRows * kColumns + kTileRows, kPitch);
  for (int64_t i = 0; i < kSums; i += kLanes) store(sums + i, load(sums + i) + load(some + i));
}

// The sums [kernel_h * kernel_w][rows / 2][32][32] of a block of output channels, to where they belong.
TK_NOINLINE inline void write_weight_grad(const SpikeConvArgs& a, const TilesWeightGrad& f, int64_t column,
                                          const float* sums) {
  vfloat rows[kTileRows];
  for (int64_t tap = 0; tap < f.taps; ++tap)
    for (int64_t c = 0; c < a.C; c += kTileRows)
      for (int64_t k = 0; k < kColumns && column * kColumns + k < a.K; k += kTileRows) {
        const float* const from = sums + (tap * f.rows * kTileRows + c) * kColumns + k;
        for (int64_t i = 0; i < kTileRows; ++i) rows[i] = load(from + i * kColumns);
        transpose(rows);
        const int64_t out = column * kColumns + k, channels = a.C - c < kTileRows ? a.C - c : kTileRows;
        float* const to = (float*)a.gweight + out * a.weight_k + c * a.weight_c + tap / a.kernel_w * a.weight_h +
                          tap % a.kernel_w * a.weight_w;
        for (int64_t i = 0; i < kTileRows && out + i < a.K; ++i) {
          if (a.weight_c == 1 && channels == kTileRows) {
            store(to + i * a.weight_k, rows[i]);
          } else {
            for (int64_t j = 0; j < channels; ++j) to[i * a.weight_k + j * a.weight_c] = rows[i][j];
          }
        }
      }
}

inline void run_tiles_weight_grad(const SpikeConvArgs& a, int64_t phase, int64_t item, const SpikeMemory& memory) {
  const TilesWeightGrad f(a);
  char* const spikes = memory.shared;
  if (phase == 0) return lay_channels(a, f, item / f.depths, item % f.depths, spikes);
  char* const laid = memory.own;
  float* const some = (float*)(laid + f.at_once * kGradientBytes);
  float* const sums = some + kSums;
  const int64_t pairs = f.rows / 2;
  __builtin_memset(sums, 0, f.taps * pairs * kSums * sizeof(float));
  vint unusual = {};
  const char *at[kMostPositions], *gradients[kMostPositions];
  configure_tiles(kTileRows);
  for (int64_t first = 0; first < f.positions; first += f.at_once) {
    const int64_t count = f.positions - first < f.at_once ? f.positions - first : f.at_once;
    for (int64_t i = 0; i < count; ++i)
      lay_gradients(a, (first + i) / f.depths, (first + i) % f.depths, item, laid + i * kGradientBytes, &unusual);
    for (int64_t tap = 0; tap < f.taps; ++tap) {
      int64_t n = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = (first + i) / f.depths, depth = (first + i) % f.depths;
        const int64_t row = place / a.out_w * a.stride_h - a.padding_h + tap / a.kernel_w;
        const int64_t column = place % a.out_w * a.stride_w - a.padding_w + tap % a.kernel_w;
        if (row < 0 || row >= a.H || column < 0 || column >= a.W) continue;
        at[n] = spikes + f.spikes_at(row * a.W + column, depth);
        gradients[n++] = laid + i * kGradientBytes;
      }
      for (int64_t pair = 0; n && pair < pairs; ++pair) {
        add_positions(at, gradients, n, some, sums + (tap * pairs + pair) * kSums);
        for (int64_t i = 0; i < n; ++i) at[i] += 2 * kTileBytes;
      }
    }
  }
  _tile_release();
  if (any_lane(unusual)) __atomic_store_n(memory.nonfinite, 1, __ATOMIC_RELAXED);
  write_weight_grad(a, f, item, sums);
}

inline int64_t tiles_weight_grad_items(const SpikeConvArgs& a, int64_t phase) {
  const TilesWeightGrad f(a);
  return phase == 0 ? a.H * f.depths : f.columns;
}

inline SpikePlan tiles_weight_grad(const SpikeConvArgs& a) {
  const TilesWeightGrad f(a);
  const int64_t sums = f.taps * (f.rows / 2) * kSums * (int64_t)sizeof(float);
  return {f.spikes, f.at_once * kGradientBytes + kSums * (int64_t)sizeof(float) + sums, 2, tiles_weight_grad_items,
          run_tiles_weight_grad};
}

}  // namespace trtkern::TK_ISA
#endif  // __AMX_BF16__
