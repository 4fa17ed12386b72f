// The weight's gradient with tables in the L1 cache (spike_conv/cpu_tables.h).
//
// The nibbles of four images lie as [H * W, groups of four images, C]. An item is kTableOutputs outputs and a block of
// input channels: it goes through all images and places, a chunk of tables at a time.
#pragma once
#include "spike_conv/cpu_tables.h"

#if defined(__AVX2__)
namespace trtkern::TK_ISA {

struct TablesWeightGrad {
  static constexpr int64_t kPrepared = 256;    // groups of a place that an item of the first phase prepares
  static constexpr int64_t kItems = 32;        // that are wanted, for as many threads
  static constexpr int64_t kFewestSums = 256;  // rows of an item, so that it pays to make its tables
  static constexpr int64_t kMostSums = 2048;   // ... so that they stay in L2: 256 KiB
  static constexpr int64_t kChannels = 64;     // of a block, a multiple of these

  const SpikeConvArgs& a;
  const int64_t channels = whole(a.C, kSpikeChunk), groups = parts(images(a), kNibble);
  const int64_t together = least(groups, kTablesHeld), chunk = kTablesHeld / together;  // groups and places at a time
  const int64_t lines = parts(a.K, kTableOutputs), block = block_of_channels(), blocks = parts(a.C, block);
  const int64_t outs = a.out_h * a.out_w;

  explicit TablesWeightGrad(const SpikeConvArgs& args) : a(args) {}

  static SpikePlan plan(const SpikeConvArgs& args) {
    SpikePlan plan;
    if (!single_spikes(args) || taps(args) > kMostTaps) return plan;
    const TablesWeightGrad self(args);
    plan.shared = args.H * args.W * self.groups * self.channels;
    Cut cut{nullptr};
    Own(self, cut);
    plan.own = (int64_t)cut.at;
    plan.phases = 2;
    plan.items = [](const SpikeConvArgs& args, int64_t phase) {
      const TablesWeightGrad self(args);
      return phase ? self.lines * self.blocks : parts(args.H * args.W * self.groups, kPrepared);
    };
    plan.run = [](const SpikeConvArgs& args, int64_t phase, int64_t item, const SpikeMemory& memory) {
      const TablesWeightGrad self(args);
      phase ? self.add_up(item, memory) : self.prepare(item, memory);
    };
    return plan;
  }

 private:
  static constexpr int64_t kMostTaps = 256;

  struct Own {
    Seen* unusual;   // [taps, chunk]
    int64_t* count;  // [taps]
    char* tables;    // [chunk, together]
    float* sums;     // [taps, block, kTableOutputs]
    Own(const TablesWeightGrad& self, Cut& cut)
        : unusual(cut.take<Seen>(taps(self.a) * self.chunk)),
          count(cut.take<int64_t>(taps(self.a))),
          tables(cut.take<char>(kTablesHeld * kTableBytes)),
          sums(cut.take<float>(taps(self.a) * self.block * kTableOutputs)) {}
  };

  int64_t block_of_channels() const {
    const int64_t wanted = parts(a.C, parts(kItems, parts(a.K, kTableOutputs)));
    const int64_t some = least(most(wanted, kFewestSums / taps(a)), kMostSums / taps(a));
    return least(whole(most(some, 1), kChannels), channels);
  }

  TK_NOINLINE void prepare(int64_t item, const SpikeMemory& memory) const {
    const int64_t last = least((item + 1) * kPrepared, a.H * a.W * groups);
    for (int64_t i = item * kPrepared; i < last; ++i)
      for (int64_t c = 0; c < a.C; c += kSpikeChunk) {
        const int64_t n = least(kSpikeChunk, a.C - c);
        const vbytes nibbles = nibbles_of_images(a, i % groups * kNibble, i / groups, c, n) << (uint8_t)kNibbleShift;
        __builtin_memcpy(memory.shared + i * channels + c, &nibbles, sizeof nibbles);
      }
  }

  TK_NOINLINE void add_up(int64_t item, const SpikeMemory& memory) const {
    const int64_t k = item / blocks * kTableOutputs, c = item % blocks * block, here = least(block, a.C - c);
    Cut cut{memory.own};
    const Own own(*this, cut);
    __builtin_memset(own.sums, 0, taps(a) * block * kTableOutputs * sizeof(float));
    vfloat all = {};
    for (int64_t group = 0; group < groups; group += together)
      for (int64_t out = 0; out < outs; out += chunk) {
        const int64_t some = least(together, groups - group), n = least(chunk, outs - out);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t g = 0; g < some; ++g)
            all += table_of_images((group + g) * kNibble, out + i, k, own.tables + (i * some + g) * kTableBytes);
        for (int64_t tap = 0; tap < taps(a); ++tap)
          own.count[tap] = list_seen(a, tap, out, n, own.unusual + tap * chunk);
        const auto* nibbles = (const uint8_t*)memory.shared + group * channels + c;
        for (int64_t tap = 0; tap < taps(a); ++tap)
          add_tap(own.unusual + tap * chunk, own.count[tap], nibbles, some, here, own.tables,
                  own.sums + tap * block * kTableOutputs);
      }
    if (has_nan(all)) say_nonfinite(memory);
    write(k, c, here, own.sums);
  }

  // The table of the gradients of four images at a place. NaN in a lane where one is not finite.
  TK_INLINE vfloat table_of_images(int64_t image, int64_t out, int64_t k, char* table) const {
    const int64_t count = least(kNibble, images(a) - image), outputs = least(kTableOutputs, a.K - k);
    float some[kNibble][kTableOutputs] = {};
    const float* four[kNibble];
    for (int64_t i = 0; i < kNibble; ++i) {
      const float* g = (const float*)a.g + ((image + i) * outs + out) * a.K + k;
      four[i] = i < count && outputs == kTableOutputs ? g : some[i];
      if (i < count) prefetch(g + chunk * a.K), prefetch(g + chunk * a.K + kTableOutputs / 2);
      if (i < count && outputs < kTableOutputs) __builtin_memcpy(some[i], g, outputs * sizeof(float));
    }
    vfloat all = {};
    for (int64_t v = 0; v < kTableVectors; ++v) {
      const int64_t at = v * kLanes;
      all += make_table((float*)table + at * kSubsets, load(four[0] + at), load(four[1] + at), load(four[2] + at),
                        load(four[3] + at));
    }
    return all;
  }

  void add_tap(const Seen* unusual, int64_t count, const uint8_t* nibbles, int64_t some, int64_t here,
               const char* tables, float* sums) const {
    int64_t c = 0;
    for (; c + kTogether <= here; c += kTogether)
      add_channels<kTogether>(unusual, count, nibbles + c, some, tables, sums + c * kTableOutputs);
    for (; c < here; ++c) add_channels<1>(unusual, count, nibbles + c, some, tables, sums + c * kTableOutputs);
  }

  template <int R>
  TK_INLINE void add_channels(const Seen* unusual, int64_t count, const uint8_t* nibbles, int64_t some,
                              const char* tables, float* sums) const {
    vfloat rows[R][kTableVectors];
    load_rows<R>(rows, sums);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < some; ++i)
        look_up<R>(rows, tables + (unusual[j].out * some + i) * kTableBytes,
                   nibbles + (unusual[j].place * groups + i) * channels, 1);
    store_rows<R>(sums, rows);
  }

  void write(int64_t k, int64_t c, int64_t here, const float* sums) const {
    for (int64_t i = 0; i < least(kTableOutputs, a.K - k); ++i)
      for (int64_t j = 0; j < here; ++j)
        for (int64_t tap = 0; tap < taps(a); ++tap)
          ((float*)a.gweight)[(k + i) * a.weight_k + tap / a.kernel_w * a.weight_h + tap % a.kernel_w * a.weight_w +
                              (c + j) * a.weight_c] = sums[(tap * block + j) * kTableOutputs + i];
  }
};

}  // namespace trtkern::TK_ISA
#endif  // __AVX2__
