// Forward with tables in the L1 cache (spike_conv/cpu_tables.h).
//
// A row is an image at a place. The nibbles of the input lie as [chunks of 64 channels, H, W, images, 16], so that the
// rows which a tap of the kernel sees lie in runs. An item is a tile of rows of the output, and kTableOutputs outputs.
#pragma once
#include "spike_conv/cpu_tables.h"

#if defined(__AVX2__)
namespace trtkern::TK_ISA {

struct TablesForward {
  static constexpr int64_t kTile = 1024;      // rows of an item, at most
  static constexpr int64_t kPrepared = 1024;  // rows that an item of the first phase prepares

  const SpikeConvArgs& a;
  const int64_t outs = a.out_h * a.out_w, rows = outs * images(a), in_rows = a.H * a.W * images(a);
  const int64_t tiles = parts(rows, kTile), tile = parts(rows, tiles);
  const int64_t lines = parts(a.K, kTableOutputs), chunks = parts(a.C, kSpikeChunk);

  explicit TablesForward(const SpikeConvArgs& args) : a(args) {}

  static SpikePlan plan(const SpikeConvArgs& args) {
    SpikePlan plan;
    if (!single_spikes(args) || taps(args) > kMostTaps) return plan;
    const TablesForward self(args);
    plan.shared = self.chunks * self.in_rows * kChunkNibbles;
    Cut cut{nullptr};
    Own(self, cut);
    plan.own = (int64_t)cut.at;
    plan.phases = 2;
    plan.items = [](const SpikeConvArgs& args, int64_t phase) {
      const TablesForward self(args);
      return phase ? self.tiles * self.lines : parts(self.in_rows, kPrepared);
    };
    plan.run = [](const SpikeConvArgs& args, int64_t phase, int64_t item, const SpikeMemory& memory) {
      const TablesForward self(args);
      phase ? self.convolve(item, memory) : self.prepare(item, memory);
    };
    return plan;
  }

 private:
  static constexpr int64_t kMostTaps = 256;

  // Rows of the tile from `row` on that see the rows of the input from `unusual` on.
  struct Run {
    int64_t row, unusual, count;
  };

  struct Own {
    Run* runs;       // [taps, tile]
    int64_t* count;  // [taps]
    float* weight;   // [kSpikeChunk, kTableOutputs]
    float* sums;     // [tile, kTableOutputs]
    char* tables;    // kTablesHeld
    Own(const TablesForward& self, Cut& cut)
        : runs(cut.take<Run>(taps(self.a) * self.most_runs())),
          count(cut.take<int64_t>(taps(self.a))),
          weight(cut.take<float>(kSpikeChunk * kTableOutputs)),
          sums(cut.take<float>(self.tile * kTableOutputs)),
          tables(cut.take<char>(kTablesHeld * kTableBytes)) {}
  };

  // At most a run for each place of the tile.
  int64_t most_runs() const { return parts(tile, images(a)) + 1; }

  TK_NOINLINE void prepare(int64_t item, const SpikeMemory& memory) const {
    const int64_t last = least((item + 1) * kPrepared, in_rows);
    for (int64_t row = item * kPrepared; row < last; ++row) {
      const int64_t place = row / images(a), image = row % images(a);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t c = chunk * kSpikeChunk;
        const uint64_t bits =
            spike_bits(a, image / a.B, image % a.B, place / a.W, place % a.W, c, least(kSpikeChunk, a.C - c));
        const __m128i nibbles = _mm_slli_epi16(nibbles_of_bits(bits), kNibbleShift);
        _mm_store_si128((__m128i*)memory.shared + chunk * in_rows + row, nibbles);
      }
    }
  }

  TK_NOINLINE void convolve(int64_t item, const SpikeMemory& memory) const {
    const int64_t first = item / lines * tile, count = least(tile, rows - first);
    const int64_t k = item % lines * kTableOutputs;
    Cut cut{memory.own};
    const Own own(*this, cut);
    list_runs(first, count, own);
    begin(k, count, own.sums);
    vfloat unusual = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t tap = 0; tap < taps(a); ++tap) {
        if (!own.count[tap]) continue;
        const int64_t c = chunk * kSpikeChunk, n = least(kSpikeChunk, a.C - c), groups = parts(n, kNibble);
        read_weight(k, tap, c, n, own.weight);
        tap + 1 < taps(a) ? prefetch_weight(k, tap + 1, c) : prefetch_weight(k, 0, c + kSpikeChunk);
        unusual += make_tables(own.weight, groups, own.tables);
        const auto* nibbles = (const uint8_t*)memory.shared + chunk * in_rows * kChunkNibbles;
        const Run* runs = own.runs + tap * most_runs();
        for (const Run* run = runs; run < runs + own.count[tap]; ++run) add_run(*run, nibbles, groups, own);
      }
    if (has_nan(unusual)) say_nonfinite(memory);
    write(first, count, k, own.sums);
  }

  void list_runs(int64_t first, int64_t count, const Own& own) const {
    const int64_t n = images(a);
    for (int64_t tap = 0; tap < taps(a); ++tap) {
      Run *const runs = own.runs + tap * most_runs(), *run = runs;
      int64_t out = first / n, image = first % n, row = out / a.out_w, column = out % a.out_w;
      for (int64_t i = 0; i < count;) {
        const int64_t here = least(n - image, count - i), place = place_under(a, row, column, tap);
        if (place >= 0) {
          const int64_t unusual = place * n + image;
          if (run > runs && run[-1].row + run[-1].count == i && run[-1].unusual + run[-1].count == unusual)
            run[-1].count += here;
          else
            *run++ = {i, unusual, here};
        }
        i += here, image = 0;
        if (++column == a.out_w) column = 0, ++row;
      }
      own.count[tap] = run - runs;
    }
  }

  // The sums before anything is added: the bias.
  void begin(int64_t k, int64_t count, float* sums) const {
    float bias[kTableOutputs] = {};
    for (int64_t i = 0; a.bias && i < least(kTableOutputs, a.K - k); ++i) bias[i] = ((const float*)a.bias)[k + i];
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(sums + i * kTableOutputs, bias, sizeof bias);
  }

  TK_INLINE const float* weight_at(int64_t k, int64_t tap, int64_t c) const {
    return (const float*)a.weight + k * a.weight_k + tap / a.kernel_w * a.weight_h + tap % a.kernel_w * a.weight_w +
           c * a.weight_c;
  }

  // Asks for what read_weight reads next: rows that lie too far apart for the processor to foresee.
  TK_INLINE void prefetch_weight(int64_t k, int64_t tap, int64_t c) const {
    constexpr int64_t kLine = 16;
    for (int64_t i = 0; i < kTableOutputs && a.weight_c == 1; ++i)
      for (int64_t j = 0; j < kSpikeChunk; j += kLine) prefetch(weight_at(k + i, tap, c + j));
  }

  // The weights of a tap and n channels, [channels, outputs]; what is not there is 0.
  void read_weight(int64_t k, int64_t tap, int64_t c, int64_t n, float* to) const {
    const float* from = weight_at(k, tap, c);
    const int64_t outputs = least(kTableOutputs, a.K - k);
    if (n == kSpikeChunk && outputs == kTableOutputs && a.weight_c == 1) {
      for (int64_t i = 0; i < kTableOutputs; i += kLanes)
        for (int64_t j = 0; j < kSpikeChunk; j += kLanes)
          transpose(from + i * a.weight_k + j, a.weight_k, to + j * kTableOutputs + i);
      return;
    }
    __builtin_memset(to, 0, kSpikeChunk * kTableOutputs * sizeof(float));
    for (int64_t i = 0; i < outputs; ++i)
      for (int64_t j = 0; j < n; ++j) to[j * kTableOutputs + i] = from[i * a.weight_k + j * a.weight_c];
  }

  // A square of kLanes outputs, `apart` elements the one from the next, and as many channels.
  TK_INLINE static void transpose(const float* from, int64_t apart, float* to) {
    vfloat rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * apart);
    // Squares of twice the side each time: the two that lie across the diagonal change places.
#pragma GCC unroll 4
    for (int side = 1; side < kLanes; side *= 2) {
      const vint lane = lane_numbers(), second = (lane & side) != 0;
      const vint upper = second ? lane - side + kLanes : lane, lower = second ? lane + kLanes : lane + side;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i & side) continue;
        const vfloat one = rows[i], other = rows[i + side];
        rows[i] = __builtin_shuffle(one, other, upper);
        rows[i + side] = __builtin_shuffle(one, other, lower);
      }
    }
    for (int i = 0; i < kLanes; ++i) store(to + i * kTableOutputs, rows[i]);
  }

  // NaN in a lane where a weight is not finite.
  TK_INLINE static vfloat make_tables(const float* weight, int64_t groups, char* tables) {
    vfloat unusual = {};
    auto* table = (float*)tables;
    for (int64_t i = 0; i < groups; ++i, weight += kNibble * kTableOutputs)
      for (int64_t v = 0; v < kTableVectors; ++v, table += kSubsets * kLanes) {
        const float* four = weight + v * kLanes;
        unusual += make_table(table, load(four), load(four + kTableOutputs), load(four + 2 * kTableOutputs),
                              load(four + 3 * kTableOutputs));
      }
    return unusual;
  }

  TK_INLINE static void add_run(const Run& run, const uint8_t* nibbles, int64_t groups, const Own& own) {
    float* sums = own.sums + run.row * kTableOutputs;
    nibbles += run.unusual * kChunkNibbles;
    int64_t i = 0;
    for (; i + kTogether <= run.count; i += kTogether)
      add_rows<kTogether>(sums + i * kTableOutputs, nibbles + i * kChunkNibbles, groups, own.tables);
    for (; i < run.count; ++i) add_rows<1>(sums + i * kTableOutputs, nibbles + i * kChunkNibbles, groups, own.tables);
  }

  template <int R>
  TK_INLINE static void add_rows(float* sums, const uint8_t* nibbles, int64_t groups, const char* tables) {
    vfloat rows[R][kTableVectors];
    load_rows<R>(rows, sums);
    for (int64_t i = 0; i < groups; ++i) look_up<R>(rows, tables + i * kTableBytes, nibbles + i, kChunkNibbles);
    store_rows<R>(sums, rows);
  }

  void write(int64_t first, int64_t count, int64_t k, const float* sums) const {
    const int64_t n = images(a), outputs = least(kTableOutputs, a.K - k);
    const bool streaming = rows * a.K * 4 >= kLargeOutput && a.K % kLanes == 0 && a.y % sizeof(vfloat) == 0;
    int64_t out = first / n, image = first % n;
    for (int64_t i = 0; i < count; ++i, sums += kTableOutputs) {
      float* y = (float*)a.y + (image * outs + out) * a.K + k;
      if (streaming)
        for (int64_t j = 0; j < outputs; j += kLanes) stream(y + j, load(sums + j));
      else
        __builtin_memcpy(y, sums, outputs * sizeof(float));
      if (++image == n) image = 0, ++out;
    }
    if (streaming) fence();
  }
};

}  // namespace trtkern::TK_ISA
#endif  // __AVX2__
