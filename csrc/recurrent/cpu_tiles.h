// The product of the backward pass in tiles: 16 rows of gradients on the left, weights on the right, each the sum of
// three bfloat16 (spike_conv/cpu_tiles.h). Forward the lists of spikes are as fast. Of the nine products of two floats
// the three smallest are left out; of the others those below 2^-15 are added up by themselves, so that none is lost in
// the sum of the large ones.
#pragma once
#include "recurrent/cpu_product.h"
#include "spike_conv/cpu_tiles.h"

#if defined(__AMX_BF16__)
namespace trtkern::TK_ISA {

static_assert(kSamples == kTileRows);
constexpr int64_t kDepthBytes = kPieces * 2 * kTileBytes;  // of the weights of 32 k and 32 columns

inline int64_t tiles_items(int64_t width) { return parts(width, kColumns); }
// [columns][depths][pieces][2][16 pairs of k][16 columns][2]
inline int64_t tiles_bytes(int64_t width) { return parts(width, kColumns) * parts(width, kDepth) * kDepthBytes; }
// Two tiles of sums, and rows [units][depths][pieces][16][32].
inline int64_t tiles_own(int64_t width, int64_t units) {
  return (units * parts(width, kDepth) * kPieces + 2) * kTileBytes;
}

inline void lay_tiles(const RecurrentArgs& a, bool, int64_t column, char* weights, int* nonfinite) {
  const int64_t width = a.width, depths = parts(width, kDepth);
  vint unusual = {};
  const auto row = [&](int64_t k, int64_t c) {
    return load_some((const float*)a.weight + k * width + c, k < width ? width - c : 0);
  };
  char* to = weights + column * depths * kDepthBytes;
  for (int64_t depth = 0; depth < depths; ++depth, to += kDepthBytes)
    for (int64_t pair = 0; pair < kTileRows; ++pair)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t k = depth * kDepth + pair * kPair, c = column * kColumns + half * kTileRows;
        const vfloat even = row(k, c), odd = row(k + 1, c);
        unusual |= nonfinite_lanes(even) | nonfinite_lanes(odd);
        store_pair(even, odd, to + half * kTileBytes + pair * 64);
      }
  if (any_lane(unusual)) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// The rows as tiles on the left; whether all are finite. Rows that are not there are zeros.
TK_NOINLINE inline bool lay_rows(const float* from, int64_t rows, int64_t width, char* to) {
  vint unusual = {};
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t k = 0; k < width; k += kDepth) {
      const float* const at = from + r * width + k;
      const int64_t left = r < rows ? width - k : 0;
      const vfloat low = load_some(at, left), high = load_some(at + kTileRows, left - kTileRows);
      unusual |= store_pieces(low, high, to + k / kDepth * kPieces * kTileBytes + r * 64, kTileBytes);
    }
  return !any_lane(unusual);
}

// Adds up a block of columns: the large products in tiles 0 and 1, the small ones in 2 and 3.
TK_INLINE void add_numbers(const char* rows, const char* weights, int64_t depths) {
  for (int64_t depth = 0; depth < depths; ++depth, rows += kPieces * kTileBytes, weights += kDepthBytes) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + kTileBytes, 64);
    _tile_loadd(6, rows + 2 * kTileBytes, 64);
    _tile_loadd(7, weights, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(0, 5, 7);
    _tile_loadd(7, weights + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(7, weights + 2 * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 7);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(7, weights + 3 * kTileBytes, 64);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(7, weights + 4 * kTileBytes, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(7, weights + 5 * kTileBytes, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
}
inline unsigned multiply_tiles(const char* weights, const float* from, int64_t rows, int64_t width, bool, float* out,
                               char* own) {
  const int64_t depths = parts(width, kDepth), pitch = product_pitch(width), units = parts(rows, kTileRows);
  const int64_t unit = depths * kPieces * kTileBytes;
  char* const left = own + 2 * kTileBytes;
  unsigned unusual = 0;
  for (int64_t u = 0; u < units; ++u) {
    const float* const at = from + u * kTileRows * width;
    const int64_t there = rows - u * kTileRows < kTileRows ? rows - u * kTileRows : kTileRows;
    const bool finite = lay_rows(at, there, width, left + u * unit);
    unusual |= (unsigned)!finite << u;
  }
  configure_tiles(kTileRows);
  for (int64_t column = 0; column < parts(width, kColumns); ++column)
    for (int64_t u = 0; u < units; ++u) {  // the weights of a column stay in the caches
      const char* const right = weights + column * depths * kDepthBytes;
      float* const sums = out + u * kTileRows * pitch + column * kColumns;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      add_numbers(left + u * unit, right, depths);
      _tile_stored(0, sums, pitch * sizeof(float));
      _tile_stored(1, sums + kTileRows, pitch * sizeof(float));
      _tile_stored(2, own, 64);
      _tile_stored(3, own + kTileBytes, 64);
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t half = 0; half < 2; ++half) {
          float* const to = sums + r * pitch + half * kTileRows;
          store(to, load(to) + load((const float*)(own + half * kTileBytes) + r * kTileRows));
        }
    }
  _tile_release();
  return unusual;
}

}  // namespace trtkern::TK_ISA
#endif  // __AMX_BF16__
