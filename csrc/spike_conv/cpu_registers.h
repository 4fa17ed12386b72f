// Tables in registers: the 16 sums of four numbers stand in one vector register, and a permutation by 16 nibbles looks
// up 16 sums at once. AVX-512.
//
// Forward, the numbers are the weights of four input channels for one output, and the lanes are 16 images. In the
// weight's gradient they are the gradients of four images for one output, and the lanes are 16 input channels. Nibbles
// lie as bytes, four to a lane: a vector that is loaded j bytes further on holds the j-th of them in its low bits, and
// a permutation looks at no others.
#pragma once
#include "spike_conv/cpu_nibbles.h"

#if defined(__AVX512F__)
namespace trtkern::TK_ISA {

constexpr int64_t kLaneBytes = 4;                    // nibbles of a lane that lie together: a quad
constexpr int64_t kQuad = kLaneBytes * kNibble;      // spikes of a quad
constexpr int64_t kQuadBytes = kLanes * kLaneBytes;  // of a vector of quads
constexpr int kOutputs = 4;                          // whose tables are used together
constexpr int kOutputLine = 16;                      // a cache line of outputs: what an item works out
constexpr int kOutputParts = kOutputLine / kOutputs;
constexpr int kSide = 4;                               // vectors of lanes that meet the same tables
constexpr int64_t kTableFloats = kOutputs * kSubsets;  // of a group: four numbers for each of the outputs
constexpr int64_t kMostGroups = 128;                   // whose tables are there at a time: 32 KiB

// Where the sums of a vector of lanes and its nibbles lie: elements and bytes.
struct Lanes {
  int64_t sums, nibbles;
};

// The 16 sums of the subsets of four numbers, each `stride` after the other: entry e has number i where e has bit i.
// Entry 0 is not 0 (but NaN) where a number is not finite.
TK_INLINE vfloat sums_of_four(const float* numbers, int64_t stride) {
  const vfloat bit0 = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
  const vfloat bit1 = {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1};
  const vfloat bit2 = {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1};
  const vfloat bit3 = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  vfloat sums = bit0 * lit<vfloat>(numbers[0]);
  sums = fma_(bit1, lit<vfloat>(numbers[stride]), sums);
  sums = fma_(bit2, lit<vfloat>(numbers[2 * stride]), sums);
  return fma_(bit3, lit<vfloat>(numbers[3 * stride]), sums);
}

// What sums_of_four gave for numbers of which one is not finite has a lane 0 that is not 0.
TK_INLINE bool first_is_not_0(vuint all) { return all[0] << 1; }

// sums += table[nibbles], for each of kOutputs tables of one group and R vectors of lanes. The assembly is what a
// compiler would write too, had it not the habit (GCC 12) to keep the sums in memory. Half of the additions are written
// as fma, which other ports run on some processors.
template <int R>
TK_INLINE void add_group(vfloat (&sums)[R][kOutputs], const uint8_t* const (&nibbles)[R], int64_t at,
                         const float* tables, vfloat one) {
  vint index[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    asm volatile("vmovdqu32 %1, %0" : "=v"(index[r]) : "m"(*(const vbytes*)(nibbles[r] + at)));
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k) {
    vfloat table, found;
    asm volatile("vmovaps %1, %0" : "=v"(table) : "m"(*(const vfloat*)(tables + k * kSubsets)));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      asm volatile("vpermps %1, %2, %0" : "=v"(found) : "v"(table), "v"(index[r]));
      if ((r + k) % 2)
        asm volatile("vfmadd231ps %1, %2, %0" : "+v"(sums[r][k]) : "v"(found), "v"(one));
      else
        asm volatile("vaddps %1, %0, %0" : "+v"(sums[r][k]) : "v"(found));
    }
  }
}

// ... for groups that follow one another, a quad of them being `step` bytes behind the other.
template <int R>
TK_INLINE void add_groups(vfloat (&sums)[R][kOutputs], const uint8_t* const (&nibbles)[R], int64_t step, int64_t groups,
                          const float* tables, vfloat one) {
  int64_t at = 0;
  for (; groups >= kLaneBytes; groups -= kLaneBytes, at += step, tables += kLaneBytes * kTableFloats) {
#pragma GCC unroll 4
    for (int j = 0; j < kLaneBytes; ++j) add_group<R>(sums, nibbles, at + j, tables + j * kTableFloats, one);
  }
  for (int64_t j = 0; j < groups; ++j) add_group<R>(sums, nibbles, at + j, tables + j * kTableFloats, one);
}

TK_INLINE vfloat one_in_register() {
  vfloat one = lit<vfloat>(1.0f);
  asm volatile("" : "+v"(one));
  return one;
}

// Groups that are taken together of so many: parts of the same size, whole quads.
TK_INLINE int64_t groups_together(int64_t groups) {
  return whole(parts(groups, parts(groups, kMostGroups)), kLaneBytes);
}

}  // namespace trtkern::TK_ISA
#endif  // __AVX512F__
