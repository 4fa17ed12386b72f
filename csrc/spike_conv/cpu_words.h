// Reading packed spikes, an image place at a time.
#pragma once
#include "cpu/simd.h"
#include "spike_conv/args.h"

namespace trtkern::TK_ISA {

constexpr int64_t kSpikeChunk = 64;  // channels that are read at once

// How many parts of that size, or less, n things make.
TK_INLINE int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Where the words of a sample's place lie: C bytes, those of `plane` and `addend`.
TK_INLINE const uint8_t* words_at(const SpikeConvArgs& a, int64_t addend, int64_t plane, int64_t b, int64_t row,
                                  int64_t column) {
  const int64_t planes = (a.T + 7) / 8;
  return (const uint8_t*)a.words +
         ((((addend * planes + plane) * a.B + b) * a.words_h + row) * a.words_w + column) * a.C;
}

// A step's bits of n channels (at most kSpikeChunk) of a place of single spikes, bit i for channel c + i.
TK_INLINE uint64_t spike_bits(const SpikeConvArgs& a, int64_t t, int64_t b, int64_t row, int64_t column, int64_t c,
                              int64_t n) {
  const uint8_t* words = words_at(a, 0, t / 8, b, row, column) + c;
  alignas(64) uint8_t some[kSpikeChunk];
  if (n < kSpikeChunk) {
    __builtin_memset(some, 0, sizeof some);
    __builtin_memcpy(some, words, n);
    words = some;
  }
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(_mm512_slli_epi16(_mm512_loadu_si512(words), 7 - (int)(t % 8)));
#elif defined(__AVX2__)
  const __m128i shift = _mm_cvtsi32_si128(7 - (int)(t % 8));
  const uint32_t low = _mm256_movemask_epi8(_mm256_sll_epi16(_mm256_loadu_si256((const __m256i*)words), shift));
  const uint32_t high = _mm256_movemask_epi8(_mm256_sll_epi16(_mm256_loadu_si256((const __m256i*)words + 1), shift));
  return low | (uint64_t)high << 32;
#else
  uint64_t bits = 0;
  for (int i = 0; i < kSpikeChunk; ++i) bits |= (uint64_t)(words[i] >> t % 8 & 1) << i;
  return bits;
#endif
}

// A step's counts of n channels (at most kSpikeChunk) of a place of the image, value / scale each; those behind are 0.
TK_INLINE void spike_counts(const SpikeConvArgs& a, int64_t t, int64_t b, int64_t row, int64_t column, int64_t c,
                            int64_t n, uint8_t* counts) {
  typedef uint8_t vbytes __attribute__((vector_size(kSpikeChunk)));
  vbytes total = {};
  const int64_t side = a.pool;
  for (int64_t addend = 0; addend < a.addends; ++addend)
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) {
        vbytes words = {};
        __builtin_memcpy(&words, words_at(a, addend, t / 8, b, side * row + i, side * column + j) + c, n);
        total += words >> (uint8_t)(t % 8) & (uint8_t)1;
      }
  __builtin_memcpy(counts, &total, sizeof total);
}

// What a count of 1 stands for.
TK_INLINE float spike_scale(const SpikeConvArgs& a) { return a.pool == 2 ? 0.25f : 1.0f; }

// Whether the place holds single spikes: a value is a bit.
TK_INLINE bool single_spikes(const SpikeConvArgs& a) { return a.addends == 1 && a.pool == 1; }

}  // namespace trtkern::TK_ISA
