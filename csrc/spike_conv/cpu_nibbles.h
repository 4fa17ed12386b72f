// Nibbles of spikes: four spikes choose one of the 16 sums that four numbers have. And where a kernel's taps fall.
#pragma once
#include "spike_conv/cpu_pass.h"
#include "spike_conv/cpu_words.h"

namespace trtkern::TK_ISA {

constexpr int64_t kNibble = 4;                            // spikes in a nibble
constexpr int64_t kSubsets = 16;                          // of the subsets of four numbers
constexpr int64_t kChunkNibbles = kSpikeChunk / kNibble;  // of a chunk of channels
constexpr int64_t kLargeOutput = 4 << 20;                 // bytes from which on an output bypasses the caches

TK_INLINE int64_t whole(int64_t n, int64_t size) { return parts(n, size) * size; }
TK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

TK_INLINE int64_t images(const SpikeConvArgs& a) { return a.T * a.B; }
TK_INLINE int64_t taps(const SpikeConvArgs& a) { return a.kernel_h * a.kernel_w; }

// The place of the image, row * W + column, that a tap of the kernel sees at an output place; -1: outside.
TK_INLINE int64_t place_under(const SpikeConvArgs& a, int64_t out_row, int64_t out_column, int64_t tap) {
  const int64_t row = out_row * a.stride_h + tap / a.kernel_w - a.padding_h;
  const int64_t column = out_column * a.stride_w + tap % a.kernel_w - a.padding_w;
  return row >= 0 && row < a.H && column >= 0 && column < a.W ? row * a.W + column : -1;
}

// An output place, counted from the first of some, and the place of the image that a tap sees there.
struct Seen {
  int64_t out, place;
};

// Of n output places from `first` on, those at which the tap sees the image. How many.
inline int64_t list_seen(const SpikeConvArgs& a, int64_t tap, int64_t first, int64_t n, Seen* unusual) {
  Seen* next = unusual;
  int64_t row = first / a.out_w, column = first % a.out_w;
  for (int64_t out = 0; out < n; ++out) {
    const int64_t place = place_under(a, row, column, tap);
    if (place >= 0) *next++ = {out, place};
    if (++column == a.out_w) column = 0, ++row;
  }
  return next - unusual;
}

#if defined(__AVX2__)
// Bits as nibbles: byte i holds bits 4 i to 4 i + 3.
TK_INLINE __m128i nibbles_of_bits(uint64_t bits) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
  return _mm_unpacklo_epi8(_mm_cvtsi64_si128(bits & kLow), _mm_cvtsi64_si128(bits >> 4 & kLow));
}
#endif

typedef uint8_t vbytes __attribute__((vector_size(kSpikeChunk)));

// Nibbles of n channels (at most kSpikeChunk) of a place: byte i holds those of channel c + i in four images, from
// `image` on. What lies behind the channels, or the images, is 0.
TK_INLINE vbytes nibbles_of_images(const SpikeConvArgs& a, int64_t image, int64_t place, int64_t c, int64_t n) {
  vbytes nibbles = {};
  const int64_t count = least(kNibble, images(a) - image);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t t = (image + j) / a.B, b = (image + j) % a.B;
    const uint8_t* words = words_at(a, 0, t / 8, b, place / a.W, place % a.W) + c;
    vbytes some = {};
    if (n < kSpikeChunk)
      __builtin_memcpy(&some, words, n);
    else
      __builtin_memcpy(&some, words, sizeof some);
    nibbles |= (some >> (uint8_t)(t % 8) & (uint8_t)1) << (uint8_t)j;
  }
  return nibbles;
}

TK_INLINE void say_nonfinite(const SpikeMemory& memory) { __atomic_store_n(memory.nonfinite, 1, __ATOMIC_RELAXED); }

// An item's own memory, cut to pieces.
struct Cut {
  char* at;
  template <class T>
  TK_INLINE T* take(int64_t count) {
    T* piece = (T*)at;
    at += whole(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

}  // namespace trtkern::TK_ISA
