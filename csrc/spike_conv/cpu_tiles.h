// Computing on packed spikes with AMX: registers that are tiles of 16 rows of 64 bytes, and the product of two tiles,
// whose elements are bfloat16 and whose sums are float32.
//
// A spike, an average k / 4 and a small count are bfloat16 exactly. A float32 is the sum of three of them, exactly: its
// 24 bits of mantissa, eight at a time. So three products of tiles make what one of float32 would, rounded as float32
// is where sums are taken, and nowhere else (what is below 2^-126 is taken for 0). The smallest pieces are added up
// first: added to a sum of the large ones, 2^8 or 2^16 times as many, they would be lost, all on the same side.
#pragma once
#include "cpu/simd.h"
#include "spike_conv/cpu_pass.h"
#include "spike_conv/cpu_words.h"

#if defined(__AMX_BF16__)
namespace trtkern::TK_ISA {

constexpr int64_t kTileRows = 16, kPieces = 3;
constexpr int64_t kDepth = 32;                  // bfloat16 of a row: what a product of tiles adds up
constexpr int64_t kTileBytes = kTileRows * 64;  // of any tile
constexpr int64_t kPair = kDepth / kTileRows;   // elements that lie together in a tile on the right
constexpr int64_t kColumns = 2 * kTileRows;     // columns of the result that are computed together
typedef uint16_t vpieces __attribute__((vector_size(64)));

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

// The pieces of two rows of floats, as the pairs that a tile on the right holds: those of `even` in the lower halves.
// Piece p goes to the row at `to` of the p-th pair of tiles.
TK_INLINE void store_pair(vfloat even, vfloat odd, char* to) {
  const Pieces low = pieces_of(even), high = pieces_of(odd);
  for (int64_t p = 0; p < kPieces; ++p) {
    const vuint both = low.at[p] >> 16 | high.at[p];
    __builtin_memcpy(to + p * 2 * kTileBytes, &both, 64);
  }
}

// 32 floats as bfloat16 pieces, the p-th `pitch` bytes behind the one before it; lanes of what is not finite.
TK_INLINE vint store_pieces(vfloat low, vfloat high, char* to, int64_t pitch) {
  const Pieces first = pieces_of(low), second = pieces_of(high);
  for (int64_t p = 0; p < kPieces; ++p) {
    const __m256i lower = _mm512_cvtepi32_epi16((__m512i)(first.at[p] >> 16));
    const __m256i upper = _mm512_cvtepi32_epi16((__m512i)(second.at[p] >> 16));
    _mm512_store_si512(to + p * pitch, _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1));
  }
  return nonfinite_lanes(low) | nonfinite_lanes(high);
}

// n floats, at most 16, and zeros behind them.
TK_INLINE vfloat load_some(const float* from, int64_t n) {
  if (n >= kTileRows) return load(from);
  return n <= 0 ? vfloat{} : (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
}

// 16 rows of 16 floats as their columns.
TK_INLINE void transpose(vfloat* rows) {
  vfloat some[16];
  for (int i = 0; i < 16; i += 2) {  // pairs within 16 bytes
    some[i] = (vfloat)_mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    some[i + 1] = (vfloat)_mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // fours: rows[i + j] has column j of each 16 bytes
    for (int j = 0; j < 4; ++j) {
      const __m512 lower = (__m512)some[i + j / 2], upper = (__m512)some[i + 2 + j / 2];
      rows[i + j] = (vfloat)(j % 2 ? _mm512_shuffle_ps(lower, upper, 0xee) : _mm512_shuffle_ps(lower, upper, 0x44));
    }
  for (int j = 0; j < 4; ++j) {  // what stands in the same 16 bytes of the four fours
    const __m512 a = (__m512)rows[j], b = (__m512)rows[4 + j], c = (__m512)rows[8 + j], d = (__m512)rows[12 + j];
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x88), cd = _mm512_shuffle_f32x4(c, d, 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
    some[j] = (vfloat)_mm512_shuffle_f32x4(ab, cd, 0x88);
    some[8 + j] = (vfloat)_mm512_shuffle_f32x4(ab, cd, 0xdd);
    some[4 + j] = (vfloat)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    some[12 + j] = (vfloat)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = some[i];
}

// The results in the tile registers, of `IMAGES` tiles of `rows` images each from tile `image` on, to where an image
// has `channels` numbers, of which they are those from `channel` on; `pitch` from one image to the next. `bias`, of
// those channels, is added at the end.
template <int IMAGES>
TK_INLINE void write_tiles(float* sums, const float* bias, int64_t rows, float* to, int64_t pitch, int64_t image,
                           int64_t images, int64_t channel, int64_t channels, bool streaming) {
  constexpr int64_t kSumsPitch = kColumns * sizeof(float);
  _tile_stored(0, sums, kSumsPitch);
  _tile_stored(1, sums + kTileRows, kSumsPitch);
  if constexpr (IMAGES == 2) {
    _tile_stored(2, sums + rows * kColumns, kSumsPitch);
    _tile_stored(3, sums + rows * kColumns + kTileRows, kSumsPitch);
  }
  const int64_t first = image * rows, all = IMAGES * rows;
  const int64_t count = images - first < all ? images - first : all;
  const int64_t wide = channels - channel < kColumns ? channels - channel : kColumns;
  to += first * pitch + channel;
  for (int64_t n = 0; n < count; ++n, to += pitch, sums += kColumns) {
    for (int64_t i = 0; bias && i < kColumns; i += kTileRows) store(sums + i, load(sums + i) + load(bias + i));
    if (streaming) {
      stream(to, load(sums));
      stream(to + kTileRows, load(sums + kTileRows));
    } else {
      __builtin_memcpy(to, sums, wide * sizeof(float));
    }
  }
}

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
#endif  // __AMX_BF16__
