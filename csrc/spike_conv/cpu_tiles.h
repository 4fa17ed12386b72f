// Computing on packed spikes with AMX: registers that are tiles of 16 rows of 64 bytes, and the product of two tiles,
// whose elements are bfloat16 and whose sums are float32.
//
// A spike, an average k / 4 and a small count are bfloat16 exactly. A float32 is the sum of three of them, exactly: its
// 24 bits of mantissa, eight at a time. So three products of tiles make what one of float32 would, rounded as float32
// is where sums are taken, and nowhere else (what is below 2^-126 is taken for 0).
#pragma once
#include "cpu/simd.h"
#include "spike_conv/cpu_pass.h"
#include "spike_conv/cpu_words.h"

namespace trtkern::TK_ISA {

constexpr int64_t kTileRows = 16, kPieces = 3;
constexpr int64_t kDepth = 32;                  // bfloat16 of a row: what a product of tiles adds up
constexpr int64_t kTileBytes = kTileRows * 64;  // of any tile
constexpr int64_t kPair = kDepth / kTileRows;   // elements that lie together in a tile on the right
constexpr int64_t kColumns = 2 * kTileRows;     // columns of the result that are computed together
typedef uint16_t vpieces __attribute__((vector_size(64)));

TK_INLINE int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Tile registers: four of results, two on the left with `rows` rows, two on the right.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
TK_INLINE void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = (uint8_t)(i < 6 ? rows : kTileRows);
  _tile_loadconfig(&config);
}

// The three bfloat16 of floats, each in the upper half of its lane. What is not finite is all in the first.
struct Pieces {
  vuint at[kPieces];
};
TK_INLINE Pieces pieces_of(vfloat value) {
  Pieces p;
  vfloat rest = value;
  for (int i = 0; i < kPieces; ++i) {
    p.at[i] = (vuint)rest & 0xffff0000u;
    rest = rest - (vfloat)p.at[i];
  }
  return p;
}
// 1 in the lanes of what is not finite.
TK_INLINE vint nonfinite_lanes(vfloat value) { return (vint)(((vuint)value & 0x7f800000u) == 0x7f800000u); }
TK_INLINE bool any_lane(vint lanes) { return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0; }

// Two rows of floats as the pairs of a tile on the right: `even` in the lower halves.
TK_INLINE vuint paired(vuint even, vuint odd) { return even >> 16 | odd; }

// The bfloat16 of 32 counts.
TK_INLINE vpieces values_of(const uint8_t* counts, float scale) {
  vpieces values;
  for (int half = 0; half < 2; ++half) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)counts + half));
    const vuint bits = (vuint)((vfloat)_mm512_cvtepi32_ps(wide) * lit<vfloat>(scale)) >> 16;
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)bits);
    __builtin_memcpy((char*)&values + 32 * half, &narrow, 32);
  }
  return values;
}
TK_INLINE vpieces values_of(uint32_t bits) { return (vpieces)_mm512_maskz_set1_epi16(bits, 0x3f80); }

}  // namespace trtkern::TK_ISA
