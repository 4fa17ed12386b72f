// The weight's gradient with tables in registers (spike_conv/cpu_registers.h).
//
// The nibbles of four images of an input channel lie as [H * W][quads of 16 images][C / 16] vectors. An item is a cache
// line of outputs and a block of input channels: it goes through all images and places, a chunk of tables at a time.
#pragma once
#include "spike_conv/cpu_registers.h"

#if defined(__AVX512F__)
namespace trtkern::TK_ISA {

struct RegistersWeightGrad {
  static constexpr int64_t kPrepared = 64;       // quads of a place that an item of the first phase prepares
  static constexpr int64_t kItems = 32;          // that are wanted, for as many threads
  static constexpr int64_t kFewestLookups = 32;  // of a table, which takes as long to make as a few of them
  static constexpr int64_t kMostSums = 512;      // vectors of sums, four lines each, that an item should have

  const SpikeConvArgs& a;
  const int64_t quads = parts(images(a), kQuad);  // of images, at a place
  const int64_t vectors = parts(a.C, kLanes);     // of channels
  const int64_t groups = parts(images(a), kNibble), together = groups_together(groups);
  const int64_t chunk = most(1, kMostGroups / together);  // places whose tables are there at a time
  const int64_t lines = parts(a.K, kOutputLine), block = block_of_vectors(), blocks = parts(vectors, block);
  const int64_t outs = a.out_h * a.out_w;

  explicit RegistersWeightGrad(const SpikeConvArgs& args) : a(args) {}

  static SpikePlan plan(const SpikeConvArgs& args) {
    SpikePlan plan;
    if (!single_spikes(args) || taps(args) > kMostSums) return plan;
    const RegistersWeightGrad self(args);
    plan.shared = args.H * args.W * self.quads * self.vectors * kQuadBytes + kQuadBytes;
    Cut cut{nullptr};
    Own(self, cut);
    plan.own = (int64_t)cut.at;
    plan.phases = 2;
    plan.items = [](const SpikeConvArgs& args, int64_t phase) {
      const RegistersWeightGrad self(args);
      return phase ? self.lines * self.blocks : parts(args.H * args.W * self.quads, kPrepared);
    };
    plan.run = [](const SpikeConvArgs& args, int64_t phase, int64_t item, const SpikeMemory& memory) {
      const RegistersWeightGrad self(args);
      phase ? self.add_up(item, memory) : self.prepare(item, memory);
    };
    return plan;
  }

 private:
  struct Own {
    Seen* unusual;   // [taps, chunk]
    int64_t* count;  // [taps]
    float* g;        // [together * kNibble images, chunk, kOutputLine]
    float* tables;   // [chunk, together, kOutputs, kSubsets]
    float* sums;     // [kOutputParts, taps, block, kOutputs, kLanes]
    Own(const RegistersWeightGrad& self, Cut& cut)
        : unusual(cut.take<Seen>(taps(self.a) * self.chunk)),
          count(cut.take<int64_t>(taps(self.a))),
          g(cut.take<float>(self.together * kNibble * self.chunk * kOutputLine)),
          tables(cut.take<float>(self.chunk * self.together * kTableFloats)),
          sums(cut.take<float>(kOutputParts * self.part_floats())) {}
  };

  int64_t part_floats() const { return taps(a) * block * kOutputs * kLanes; }

  // Vectors of channels of an item.
  int64_t block_of_vectors() const {
    const int64_t wanted = parts(vectors, parts(kItems, parts(a.K, kOutputLine)));
    const int64_t some = least(most(wanted, parts(kFewestLookups, taps(a))), most(1, kMostSums / taps(a)));
    return whole(some, kSide);
  }

  // The first phase.
  TK_NOINLINE void prepare(int64_t item, const SpikeMemory& memory) const {
    const int64_t last = least((item + 1) * kPrepared, a.H * a.W * quads);
    for (int64_t i = item * kPrepared; i < last; ++i)
      for (int64_t c = 0; c < a.C; c += kSpikeChunk)
        prepare_chunk(i / quads, i % quads * kQuad, c, (__m512i*)memory.shared + i * vectors + c / kLanes);
  }

  // Of 16 images at a place and a chunk of channels: a vector for each 16 of them.
  TK_INLINE void prepare_chunk(int64_t place, int64_t image, int64_t c, __m512i* to) const {
    const int64_t n = least(kSpikeChunk, a.C - c), left = parts(n, kLanes);
    __m512i bytes[kLaneBytes];
    for (int64_t j = 0; j < kLaneBytes; ++j) bytes[j] = (__m512i)nibbles_of_images(a, image + j * kNibble, place, c, n);
    const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    // Lane m of vector i: channels 16 m + 4 i to 16 m + 4 i + 3.
    const __m512i quad[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                             _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    const __m512i a0 = _mm512_shuffle_i32x4(quad[0], quad[1], 0x44), a1 = _mm512_shuffle_i32x4(quad[2], quad[3], 0x44);
    const __m512i b0 = _mm512_shuffle_i32x4(quad[0], quad[1], 0xee), b1 = _mm512_shuffle_i32x4(quad[2], quad[3], 0xee);
    to[0] = _mm512_shuffle_i32x4(a0, a1, 0x88);
    if (left > 1) to[1] = _mm512_shuffle_i32x4(a0, a1, 0xdd);
    if (left > 2) to[2] = _mm512_shuffle_i32x4(b0, b1, 0x88);
    if (left > 3) to[3] = _mm512_shuffle_i32x4(b0, b1, 0xdd);
  }

  // The second phase: a line of outputs, a block of channels.
  TK_NOINLINE void add_up(int64_t item, const SpikeMemory& memory) const {
    const int64_t k = item / blocks * kOutputLine, vector = item % blocks * block;
    const int64_t here = least(block, vectors - vector);
    Cut cut{memory.own};
    const Own own(*this, cut);
    for (int64_t i = 0; i < kOutputParts * part_floats(); i += kLanes) store(own.sums + i, vfloat{});
    const auto* nibbles = (const uint8_t*)memory.shared + vector * kQuadBytes;
    vuint all = {};
    for (int64_t group = 0; group < groups; group += together)
      for (int64_t out = 0; out < outs; out += chunk) {
        const int64_t some = least(together, groups - group), n = least(chunk, outs - out);
        copy_gradients(group * kNibble, some * kNibble, out, n, k, own.g);
        for (int64_t tap = 0; tap < taps(a); ++tap)
          own.count[tap] = list_seen(a, tap, out, n, own.unusual + tap * chunk);
        for (int64_t part = 0; part < kOutputParts; ++part) {
          all |= make_tables(own.g + part * kOutputs, n, some, own.tables);
          for (int64_t tap = 0; tap < taps(a); ++tap)
            add_tap(own.unusual + tap * chunk, own.count[tap], nibbles + group / kLaneBytes * vectors * kQuadBytes,
                    some, here, own.tables, own.sums + part * part_floats() + tap * block * kOutputs * kLanes);
        }
      }
    if (first_is_not_0(all)) say_nonfinite(memory);
    write(k, vector, here, own.sums);
  }

  // A line of outputs of some images at n places; images that are not there are 0.
  void copy_gradients(int64_t image, int64_t count, int64_t out, int64_t n, int64_t k, float* to) const {
    const __mmask16 mask = (1u << least(kOutputLine, a.K - k)) - 1;
    for (int64_t i = image; i < image + count; ++i, to += chunk * kOutputLine) {
      const float* from = (const float*)a.g + (i * outs + out) * a.K + k;
      const __mmask16 there = i < images(a) ? mask : (__mmask16)0;
      for (int64_t j = 0; j < n; ++j) {
        prefetch(from + (j + chunk) * a.K);
        _mm512_store_ps(to + j * kOutputLine, _mm512_maskz_loadu_ps(there, from + j * a.K));
      }
    }
  }

  // The tables of kOutputs outputs, and all their bits, to see whether a gradient is not finite.
  TK_INLINE vuint make_tables(const float* g, int64_t n, int64_t some, float* tables) const {
    vuint all = {};
    for (int64_t place = 0; place < n; ++place)
      for (int64_t group = 0; group < some; ++group, tables += kTableFloats)
        for (int64_t i = 0; i < kOutputs; ++i) {
          const float* four = g + (group * kNibble * chunk + place) * kOutputLine + i;
          const vfloat sums = sums_of_four(four, chunk * kOutputLine);
          all |= (vuint)sums;
          store(tables + i * kSubsets, sums);
        }
    return all;
  }

  // Adds what a tap sees to its sums, [vectors of channels, kOutputs, kLanes].
  void add_tap(const Seen* unusual, int64_t count, const uint8_t* nibbles, int64_t some, int64_t channels,
               const float* tables, float* sums) const {
    int64_t i = 0;
    for (; i + kSide <= channels; i += kSide)
      add_vectors<kSide>(unusual, count, nibbles + i * kQuadBytes, some, tables, sums + i * kOutputs * kLanes);
    for (; i < channels; ++i)
      add_vectors<1>(unusual, count, nibbles + i * kQuadBytes, some, tables, sums + i * kOutputs * kLanes);
  }

  template <int R>
  TK_INLINE void add_vectors(const Seen* unusual, int64_t count, const uint8_t* nibbles, int64_t some,
                             const float* tables, float* sums) const {
    const vfloat one = one_in_register();
    vfloat held[R][kOutputs];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < kOutputs; ++k) held[r][k] = load(sums + (r * kOutputs + k) * kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t* from[R];
      for (int r = 0; r < R; ++r) from[r] = nibbles + (unusual[j].place * quads * vectors + r) * kQuadBytes;
      add_groups<R>(held, from, vectors * kQuadBytes, some, tables + unusual[j].out * some * kTableFloats, one);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < kOutputs; ++k) store(sums + (r * kOutputs + k) * kLanes, held[r][k]);
  }

  void write(int64_t k, int64_t vector, int64_t here, const float* sums) const {
    for (int64_t i = 0; i < least(kOutputLine, a.K - k); ++i)
      for (int64_t v = 0; v < here; ++v)
        for (int64_t tap = 0; tap < taps(a); ++tap) {
          const int64_t c = (vector + v) * kLanes, n = least(kLanes, a.C - c);
          const float* from =
              sums + i / kOutputs * part_floats() + ((tap * block + v) * kOutputs + i % kOutputs) * kLanes;
          float* to = (float*)a.gweight + (k + i) * a.weight_k + tap / a.kernel_w * a.weight_h +
                      tap % a.kernel_w * a.weight_w + c * a.weight_c;
          if (a.weight_c == 1)
            _mm512_mask_storeu_ps(to, (1u << n) - 1, _mm512_load_ps(from));
          else
            for (int64_t j = 0; j < n; ++j) to[j * a.weight_c] = from[j];
        }
  }
};

}  // namespace trtkern::TK_ISA
#endif  // __AVX512F__
