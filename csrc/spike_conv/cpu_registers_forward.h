// Forward with tables in registers (spike_conv/cpu_registers.h).
//
// The nibbles of an input channel's four lie as [H * W][vectors of 16 images][C / 16] vectors. An item is a tile of
// vectors of 16 images at an output place, and a cache line of outputs.
#pragma once
#include "spike_conv/cpu_registers.h"

#if defined(__AVX512F__)
namespace trtkern::TK_ISA {

struct RegistersForward {
  static constexpr int64_t kTile = 128;     // vectors of images of an item
  static constexpr int64_t kPrepared = 64;  // vectors of images that an item of the first phase prepares

  const SpikeConvArgs& a;
  const int64_t vectors = parts(images(a), kLanes);  // of images, at a place
  const int64_t quads = parts(a.C, kQuad);
  const int64_t groups = parts(a.C, kNibble), together = groups_together(groups);
  const int64_t tiles = parts(a.out_h * a.out_w * vectors, kTile), lines = parts(a.K, kOutputLine);

  explicit RegistersForward(const SpikeConvArgs& args) : a(args) {}

  static SpikePlan plan(const SpikeConvArgs& args) {
    SpikePlan plan;
    if (!single_spikes(args) || taps(args) > kMostTaps) return plan;
    const RegistersForward self(args);
    plan.shared = args.H * args.W * self.vectors * self.quads * kQuadBytes + kQuadBytes;
    Cut cut{nullptr};
    Own(self, cut);
    plan.own = (int64_t)cut.at;
    plan.phases = 2;
    plan.items = [](const SpikeConvArgs& args, int64_t phase) {
      const RegistersForward self(args);
      return phase ? self.tiles * self.lines : parts(args.H * args.W * self.vectors, kPrepared);
    };
    plan.run = [](const SpikeConvArgs& args, int64_t phase, int64_t item, const SpikeMemory& memory) {
      const RegistersForward self(args);
      phase ? self.convolve(item, memory) : self.prepare(item, memory);
    };
    return plan;
  }

 private:
  static constexpr int64_t kMostTaps = 1024;

  struct Own {
    Lanes* jobs;     // [taps, kTile]: of each tap, the vectors of the tile that it sees within the image
    int64_t* count;  // [taps]
    float* sums;     // [kOutputParts, kTile, kOutputs, kLanes]
    float* tables;   // [groups, kOutputs, kSubsets]
    Own(const RegistersForward& self, Cut& cut)
        : jobs(cut.take<Lanes>(taps(self.a) * kTile)),
          count(cut.take<int64_t>(taps(self.a))),
          sums(cut.take<float>(kOutputLine * kTile * kLanes)),
          tables(cut.take<float>(self.together * kTableFloats)) {}
  };

  // The first phase: nibbles of vectors of images.
  TK_NOINLINE void prepare(int64_t item, const SpikeMemory& memory) const {
    const int64_t last = least((item + 1) * kPrepared, a.H * a.W * vectors);
    for (int64_t i = item * kPrepared; i < last; ++i)
      for (int64_t c = 0; c < a.C; c += kSpikeChunk)
        prepare_chunk(i / vectors, i % vectors * kLanes, c, (__m512i*)memory.shared + i * quads + c / kQuad);
  }

  // Of 16 images at a place and a chunk of channels: a vector for each quad of them.
  TK_INLINE void prepare_chunk(int64_t place, int64_t image, int64_t c, __m512i* to) const {
    alignas(64) __m128i some[kLanes] = {};  // an image each: a lane's quad of four
    const int64_t count = least(kLanes, images(a) - image), n = least(kSpikeChunk, a.C - c);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (image + i) / a.B, b = (image + i) % a.B;
      some[i] = nibbles_of_bits(spike_bits(a, t, b, place / a.W, place % a.W, c, n));
    }
    // Two times: the halves of two vectors of four images each, evens and odds of their quads.
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const auto* four = (const __m512i*)some;
    const __m512i low02 = _mm512_permutex2var_epi32(four[0], even, four[1]);
    const __m512i low13 = _mm512_permutex2var_epi32(four[0], odd, four[1]);
    const __m512i high02 = _mm512_permutex2var_epi32(four[2], even, four[3]);
    const __m512i high13 = _mm512_permutex2var_epi32(four[2], odd, four[3]);
    const int64_t left = parts(n, kQuad);
    to[0] = _mm512_shuffle_i64x2(low02, high02, 0x44);
    if (left > 1) to[1] = _mm512_shuffle_i64x2(low13, high13, 0x44);
    if (left > 2) to[2] = _mm512_shuffle_i64x2(low02, high02, 0xee);
    if (left > 3) to[3] = _mm512_shuffle_i64x2(low13, high13, 0xee);
  }

  // The second phase: a tile, a line of outputs.
  TK_NOINLINE void convolve(int64_t item, const SpikeMemory& memory) const {
    const int64_t first = item / lines * kTile, count = least(kTile, a.out_h * a.out_w * vectors - first);
    const int64_t k = item % lines * kOutputLine;
    Cut cut{memory.own};
    const Own own(*this, cut);
    list_jobs(first, count, own);
    vuint unusual = {};
    for (int64_t part = 0; part < kOutputParts; ++part) {
      float* sums = own.sums + part * kTile * kOutputs * kLanes;
      begin(k + part * kOutputs, count, sums);
      for (int64_t group = 0; group < groups; group += together)
        for (int64_t tap = 0; tap < taps(a); ++tap) {
          if (!own.count[tap]) continue;
          const int64_t some = least(together, groups - group);
          unusual |= make_tables(k + part * kOutputs, tap, group, some, own.tables);
          const auto* nibbles = (const uint8_t*)memory.shared + group / kLaneBytes * kQuadBytes;
          add_tap(own.jobs + tap * kTile, own.count[tap], nibbles, some, own.tables, sums);
        }
    }
    if (first_is_not_0(unusual)) say_nonfinite(memory);
    write(first, count, k, own.sums);
  }

  void list_jobs(int64_t first, int64_t count, const Own& own) const {
    for (int64_t tap = 0; tap < taps(a); ++tap) {
      Lanes* job = own.jobs + tap * kTile;
      int64_t out = first / vectors, vector = first % vectors;
      int64_t row = out / a.out_w, column = out % a.out_w, place = place_under(a, row, column, tap);
      for (int64_t i = 0; i < count; ++i) {
        if (place >= 0) *job++ = {i * kOutputs * kLanes, (place * vectors + vector) * quads * kQuadBytes};
        if (++vector < vectors) continue;
        vector = 0;
        if (++column == a.out_w) column = 0, ++row;
        place = place_under(a, row, column, tap);
      }
      own.count[tap] = job - (own.jobs + tap * kTile);
    }
  }

  // The sums before anything is added: the bias.
  void begin(int64_t k, int64_t count, float* sums) const {
    for (int64_t i = 0; i < kOutputs; ++i) {
      const vfloat bias = lit<vfloat>(a.bias && k + i < a.K ? ((const float*)a.bias)[k + i] : 0.0f);
      for (int64_t j = 0; j < count; ++j) store(sums + (j * kOutputs + i) * kLanes, bias);
    }
  }

  // The tables of a tap's groups, and all their bits, to see whether a weight is not finite.
  TK_INLINE vuint make_tables(int64_t k, int64_t tap, int64_t group, int64_t count, float* tables) const {
    vuint unusual = {};
    const float* tap_weight = (const float*)a.weight + tap / a.kernel_w * a.weight_h + tap % a.kernel_w * a.weight_w;
    for (int64_t i = 0; i < kOutputs; ++i) {
      const float* weight = tap_weight + (k + i) * a.weight_k;
      float* table = tables + i * kSubsets;
      for (int64_t g = group; g < group + count; ++g, table += kTableFloats) {
        const int64_t c = g * kNibble;
        vfloat sums = {};
        if (k + i < a.K && c + kNibble <= a.C) {
          sums = sums_of_four(weight + c * a.weight_c, a.weight_c);
        } else if (k + i < a.K) {
          float some[kNibble] = {};
          for (int64_t j = c; j < a.C; ++j) some[j - c] = weight[j * a.weight_c];
          sums = sums_of_four(some, 1);
        }
        unusual |= (vuint)sums;
        store(table, sums);
      }
    }
    return unusual;
  }

  static void add_tap(const Lanes* jobs, int64_t count, const uint8_t* nibbles, int64_t groups, const float* tables,
                      float* sums) {
    int64_t i = 0;
    for (; i + kSide <= count; i += kSide) add_jobs<kSide>(jobs + i, nibbles, groups, tables, sums);
    for (; i < count; ++i) add_jobs<1>(jobs + i, nibbles, groups, tables, sums);
  }

  template <int R>
  TK_INLINE static void add_jobs(const Lanes* jobs, const uint8_t* nibbles, int64_t groups, const float* tables,
                                 float* sums) {
    vfloat held[R][kOutputs];
    const uint8_t* from[R];
    for (int r = 0; r < R; ++r) {
      from[r] = nibbles + jobs[r].nibbles;
      for (int k = 0; k < kOutputs; ++k) held[r][k] = load(sums + jobs[r].sums + k * kLanes);
    }
    add_groups<R>(held, from, kQuadBytes, groups, tables, one_in_register());
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < kOutputs; ++k) store(sums + jobs[r].sums + k * kLanes, held[r][k]);
  }

  // y of a tile: a line of outputs for each of the 16 images of a vector.
  void write(int64_t first, int64_t count, int64_t k, const float* sums) const {
    const int64_t outs = a.out_h * a.out_w, n = least(kOutputLine, a.K - k);
    const bool streaming = images(a) * outs * a.K * 4 >= kLargeOutput && a.K % kOutputLine == 0 && a.y % 64 == 0;
    const __mmask16 mask = (1u << n) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (first + i) % vectors * kLanes, out = (first + i) / vectors;
      vfloat lines[kLanes];
      transpose(sums + i * kOutputs * kLanes, lines);
      float* y = (float*)a.y + (image * outs + out) * a.K + k;
      for (int64_t j = 0; j < least(kLanes, images(a) - image); ++j, y += outs * a.K)
        streaming ? stream(y, lines[j]) : _mm512_mask_storeu_ps(y, mask, (__m512)lines[j]);
    }
    if (streaming) fence();
  }

  // From 16 outputs with 16 images each to 16 images with 16 outputs each.
  TK_INLINE static void transpose(const float* sums, vfloat (&lines)[kLanes]) {
    for (int lane = 0; lane < kLanes; lane += 4) {
      __m512 x[kOutputs];  // output j of each part, four images
      for (int j = 0; j < kOutputs; ++j) {
        const float* from = sums + j * kLanes + lane;
        constexpr int64_t kPart = kTile * kOutputs * kLanes;
        x[j] = _mm512_castps128_ps512(_mm_load_ps(from));
        x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + kPart), 1);
        x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + 2 * kPart), 2);
        x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + 3 * kPart), 3);
      }
      const __m512d low01 = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), high01 = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
      const __m512d low23 = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), high23 = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
      lines[lane] = (vfloat)_mm512_unpacklo_pd(low01, low23);
      lines[lane + 1] = (vfloat)_mm512_unpackhi_pd(low01, low23);
      lines[lane + 2] = (vfloat)_mm512_unpacklo_pd(high01, high23);
      lines[lane + 3] = (vfloat)_mm512_unpackhi_pd(high01, high23);
    }
  }
};

}  // namespace trtkern::TK_ISA
#endif  // __AVX512F__
