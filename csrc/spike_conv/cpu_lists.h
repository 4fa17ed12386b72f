// Lists of what fired: sums over the rows that a list names, so that the work is proportional to the firing rate.
//
// Both kernels add rows of kListOutputs numbers. Forward: each spike in reach of an output adds a row of the weight,
// the weights from that input to 64 outputs. The weight's gradient: each spike adds a row of g, the gradients of 64
// outputs. At most kListRows such rows lie side by side, so that they stay in L1 while many lists read them.
//
// An item of a list is 16 bits: the row times 256, the count below it. A row being 256 bytes, the upper bits are its
// address; the count is 0 where single spikes are summed, and else says how often the row is added.
#pragma once
#include "cpu/simd.h"
#include "spike_conv/cpu_pass.h"
#include "spike_conv/cpu_words.h"

namespace trtkern::TK_ISA {

constexpr int64_t kListOutputs = 64;
constexpr int64_t kListRows = 128;
constexpr int64_t kListSlack = 32;               // items beyond a list that building it may write
constexpr int64_t kListCounts = 256;             // counts that an item can hold
constexpr int kListPass = kLanes == 16 ? 4 : 8;  // vectors of sums that stay in registers
constexpr int kListPasses = kListOutputs / kLanes / kListPass;
// Two lists at a time where one has not enough sums to hide the latency of an addition.
constexpr int kListsAtOnce = kListPass == 4 ? 2 : 1;

// What fired of an input place (or of a channel), and which row of sums it is added to.
struct SpikeList {
  uint32_t first;  // its first item
  uint16_t count, target;
};

TK_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
TK_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
TK_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Where each part of an even split begins.
TK_INLINE int64_t part_begin(int64_t n, int64_t count, int64_t part) { return n * part / count; }

// Of every count what it stands for.
TK_INLINE void list_factors(const SpikeConvArgs& a, float* factors) {
  for (int i = 0; i < kListCounts; ++i) factors[i] = (float)i * spike_scale(a);
}

TK_INLINE bool counts_fit(const SpikeConvArgs& a) { return a.addends * a.pool * a.pool < kListCounts; }

// Memory handed out piece by piece; from a null address it only counts.
struct Room {
  char* at;
  template <class T>
  TK_INLINE T* take(int64_t n) {
    T* taken = (T*)at;
    at += (n * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

// ---- adding

template <bool kCounts>
TK_INLINE void add_item(const char* rows, const float* factors, const uint16_t* item, vfloat (&sums)[kListPass]) {
  const char* row = rows + (kCounts ? *item & 0xff00 : *item);
  const vfloat factor = lit<vfloat>(kCounts ? factors[*item & 0xff] : 1.0f);
#pragma GCC unroll 8
  for (int v = 0; v < kListPass; ++v) {
    const vfloat value = load((const float*)row + v * kLanes);
    sums[v] = kCounts ? fma_(value, factor, sums[v]) : sums[v] + value;
  }
}

// kLists lists, side by side as far as the shortest goes.
template <bool kCounts, int kLists>
TK_INLINE void add_at_once(const SpikeList* lists, const uint16_t* items, const char* rows, const float* factors,
                           float* sums) {
  vfloat held[kLists][kListPass];
  const uint16_t* at[kLists];
  float* to[kLists];
  int64_t count[kLists], n = lists[0].count;
#pragma GCC unroll 2
  for (int list = 0; list < kLists; ++list) {
    at[list] = items + lists[list].first, to[list] = sums + lists[list].target * kListOutputs;
    count[list] = lists[list].count, n = lesser(n, count[list]);
#pragma GCC unroll 8
    for (int v = 0; v < kListPass; ++v) held[list][v] = load(to[list] + v * kLanes);
  }
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 2
    for (int list = 0; list < kLists; ++list)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add_item<kCounts>(rows, factors, at[list] + i + j, held[list]);
  for (; i < n; ++i)
#pragma GCC unroll 2
    for (int list = 0; list < kLists; ++list) add_item<kCounts>(rows, factors, at[list] + i, held[list]);
#pragma GCC unroll 2
  for (int list = 0; list < kLists; ++list) {
    for (int64_t more = n; more < count[list]; ++more) add_item<kCounts>(rows, factors, at[list] + more, held[list]);
#pragma GCC unroll 8
    for (int v = 0; v < kListPass; ++v) store(to[list] + v * kLanes, held[list][v]);
  }
}

// Add to sums [.., kListOutputs] the rows that n lists name, each list to its target. No two have the same target.
template <bool kCounts>
TK_NOINLINE void add_lists(const SpikeList* lists, int64_t n, const uint16_t* items, const float* rows,
                           const float* factors, float* sums) {
  for (int pass = 0; pass < kListPasses; ++pass, rows += kListPass * kLanes, sums += kListPass * kLanes) {
    int64_t i = 0;
    for (; i + kListsAtOnce <= n; i += kListsAtOnce)
      add_at_once<kCounts, kListsAtOnce>(lists + i, items, (const char*)rows, factors, sums);
    for (; i < n; ++i) add_at_once<kCounts, 1>(lists + i, items, (const char*)rows, factors, sums);
  }
}

// ---- lists in order of their length

// The order of n lists by their count, empty ones left out; returns how many there are. With neighbours of one length
// the loop over the items ends where the processor expects it. `order` gets their numbers.
TK_INLINE int64_t by_length(const SpikeList* lists, int64_t n, uint16_t* order) {
  uint32_t from[kListRows + 2] = {};
  for (int64_t i = 0; i < n; ++i) ++from[lists[i].count + 1];
  const uint32_t empty = from[1];
  from[0] = from[1] = 0;  // empty ones go nowhere
  for (int64_t i = 2; i < kListRows + 2; ++i) from[i] += from[i - 1];
  for (int64_t i = 0; i < n; ++i)
    if (lists[i].count) order[from[lists[i].count]++] = (uint16_t)i;
  return n - empty;
}

// ---- which channels fired at a place

// A step's bits of n channels from c, as many as a word has at most.
TK_INLINE uint64_t bits_of(const SpikeConvArgs& a, int64_t t, int64_t b, int64_t row, int64_t column, int64_t c,
                           int64_t n) {
  const bool whole = c + kSpikeChunk <= a.C;
  const uint64_t bits =
      whole ? spike_bits(a, t, b, row, column, c, kSpikeChunk) : spike_bits(a, t, b, row, column, c, a.C - c);
  return n < kSpikeChunk ? bits & ((uint64_t(1) << n) - 1) : bits;
}

TK_INLINE uint64_t counts_of(const SpikeConvArgs& a, int64_t t, int64_t b, int64_t row, int64_t column, int64_t c,
                             int64_t n, uint8_t* counts) {
  if (c + kSpikeChunk <= a.C)
    spike_counts(a, t, b, row, column, c, kSpikeChunk, counts);
  else
    spike_counts(a, t, b, row, column, c, a.C - c, counts);
  uint64_t bits = 0;
#if defined(__AVX512BW__)
  const __m512i all = _mm512_load_si512(counts);
  bits = _mm512_test_epi8_mask(all, all);
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_load_si256((const __m256i*)counts + i), _mm256_setzero_si256());
    bits |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(zero) << 32 * i;
  }
#else
  for (int i = 0; i < kSpikeChunk; ++i) bits |= (uint64_t)(counts[i] != 0) << i;
#endif
  return n < kSpikeChunk ? bits & ((uint64_t(1) << n) - 1) : bits;
}

// Write an item for each bit, of rows from `row`; returns how many. counts: of each bit, or null.
TK_INLINE int64_t write_items(uint64_t bits, int64_t row, const uint8_t* counts, uint16_t* items) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  uint16_t* at = items;
  for (int part = 0; part < 4; ++part, bits >>= 16) {
    __m512i item = _mm512_slli_epi32(_mm512_add_epi32((__m512i)lane_numbers(), _mm512_set1_epi32(row + 16 * part)), 8);
    if (counts) item = _mm512_or_si512(item, _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)counts + part)));
    const __m512i few = _mm512_maskz_compress_epi32((__mmask16)bits, item);
    _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(few));
    at += __builtin_popcount((uint16_t)bits);
  }
  return at - items;
#else
  int64_t n = 0;
  for (; bits; bits &= bits - 1) {
    const int i = __builtin_ctzll(bits);
    items[n++] = (uint16_t)((row + i) << 8 | (counts ? counts[i] : 0));
  }
  return n;
#endif
}

// The items of a step and sample's place for n channels (at most kListRows) from c; returns how many.
template <bool kCounts>
TK_INLINE int64_t list_place(const SpikeConvArgs& a, int64_t t, int64_t b, int64_t row, int64_t column, int64_t c,
                             int64_t n, uint16_t* items) {
  alignas(64) uint8_t counts[kSpikeChunk];
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += kSpikeChunk) {
    const int64_t some = lesser(kSpikeChunk, n - at);
    const uint64_t bits =
        kCounts ? counts_of(a, t, b, row, column, c + at, some, counts) : bits_of(a, t, b, row, column, c + at, some);
    count += write_items(bits, at, kCounts ? counts : nullptr, items + count);
  }
  return count;
}

}  // namespace trtkern::TK_ISA
