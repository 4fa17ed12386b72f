// Lists, the weight's gradient: of each tap and input channel the sum of the rows of g where that channel fired.
//
// A chunk is some neighbours of a row of the image in some images, at most kListRows places: of each channel a list of
// the places where it fired. A tap reads of g what lies in the same order, so that g is copied once, block of 64
// outputs by block, with columns of zeros beside the image; the lists fit each tap as they are. So much of the images
// is in memory at a time as fits kSlab bytes, a slab: phase 2 i copies g and makes lists of slab i, phase 2 i + 1 adds,
// and the last phase writes the gradient. A sum takes slab by slab, chunk by chunk, place by place.
#pragma once
#include "spike_conv/cpu_lists_weights.h"

namespace trtkern::TK_ISA {

constexpr int64_t kSlab = 4 << 20;
constexpr int64_t kSumChannels = 512;  // channels whose sums an item keeps in L2

// How the images are split, and the work on a slab.
struct GradSplit {
  int64_t groups, most_images;         // of images that chunks take their places from
  int64_t slabs, most_groups;          // of those groups
  int64_t first_column, columns;       // of g with its columns of zeros
  int64_t run;                         // neighbours of a chunk
  int64_t chunks;                      // of a group
  int64_t grid_rows;                   // of all classes
  int64_t outputs;                     // blocks of kListOutputs outputs
  int64_t tap_groups, channel_blocks;  // with them, the items that add
};

TK_INLINE int64_t chunks_of_row(const SpikeConvArgs& a, const GradSplit& s, int64_t of_class) {
  return parts(grid_columns(a, of_class).size, s.run);
}
// Rows of the image that a class reads; none where no tap does.
TK_INLINE int64_t rows_of_class(const SpikeConvArgs& a, int64_t of_class) {
  const GridSide high = grid_rows(a, of_class);
  return high.any && grid_columns(a, of_class).any ? high.size : 0;
}

TK_INLINE void split_work(const SpikeConvArgs& a, GradSplit& s) {
  s.outputs = parts(a.K, kListOutputs), s.tap_groups = a.kernel_h, s.channel_blocks = parts(a.C, kSumChannels);
  if (a.threads <= 1) return;
  const int64_t wanted = 4 * a.threads;
  if (s.outputs * s.tap_groups * s.channel_blocks < wanted) s.tap_groups = tap_count(a);
  const int64_t blocks = lesser(parts(a.C, kListOutputs), parts(wanted, s.outputs * s.tap_groups));
  s.channel_blocks = greater(s.channel_blocks, blocks);
}

// So many images of at most `fit` that chunks have the most places.
TK_INLINE int64_t group_images(const SpikeConvArgs& a, int64_t fit) {
  const int64_t images = a.T * a.B, columns = parts(a.W, a.stride_w);
  int64_t best = 1, most = 0;
  for (int64_t n = lesser(fit, images); n >= 1; --n) {
    const int64_t even = parts(images, parts(images, n));
    const int64_t places = n * parts(columns, parts(columns, kListRows / n));
    if (even == n && places > most) best = n, most = places;
  }
  return best;
}

TK_INLINE GradSplit grad_split(const SpikeConvArgs& a) {
  GradSplit s{};
  split_work(a, s);
  int64_t end = a.out_w, places = 0;
  for (int64_t k = 0; k < class_count(a); ++k) {
    const GridSide wide = grid_columns(a, k);
    s.grid_rows += rows_of_class(a, k), places += rows_of_class(a, k) * wide.size;
    if (!rows_of_class(a, k)) continue;
    s.first_column = lesser(s.first_column, -wide.most), end = greater(end, wide.size - wide.least);
  }
  s.columns = end - s.first_column;
  const int64_t images = a.T * a.B;
  const int64_t bytes = s.outputs * a.out_h * s.columns * kListOutputs * 4 + places * a.C * 2;
  const int64_t fit = greater(1, kSlab / bytes);
  s.groups = parts(images, group_images(a, lesser(kListRows, fit)));
  s.most_images = parts(images, s.groups);
  s.slabs = parts(s.groups, greater(1, fit / s.most_images)), s.most_groups = parts(s.groups, s.slabs);
  s.run = kListRows / s.most_images;
  for (int64_t k = 0; k < class_count(a); ++k) s.chunks += rows_of_class(a, k) * chunks_of_row(a, s, k);
  return s;
}

// The memory of all items.
struct GradRoom {
  float* sums;       // [outputs, taps, C, kListOutputs]
  float* g;          // [groups of a slab][outputs, out_h, columns, images of the group, kListOutputs]
  int64_t g_size;    // of a group
  SpikeList* lists;  // [groups of a slab, chunks, C], in blocks of channels by their length
  uint32_t* counts;  // [groups of a slab, chunks, channel_blocks]: lists that are not empty
  uint16_t* items;   // [groups of a slab, chunks, items_size]
  int64_t items_size, bytes;
};
TK_INLINE GradRoom grad_room(const SpikeConvArgs& a, const GradSplit& s, char* memory) {
  GradRoom r;
  Room room{memory};
  const int64_t chunks = s.most_groups * s.chunks;
  r.sums = room.take<float>(s.outputs * tap_count(a) * a.C * kListOutputs);
  r.g_size = s.outputs * a.out_h * s.columns * s.most_images * kListOutputs;
  r.g = room.take<float>(s.most_groups * r.g_size);
  r.lists = room.take<SpikeList>(chunks * a.C), r.counts = room.take<uint32_t>(chunks * s.channel_blocks);
  r.items_size = s.run * s.most_images * a.C;
  r.items = room.take<uint16_t>(chunks * r.items_size);
  r.bytes = room.at - memory;
  return r;
}

// The memory of an item that makes lists.
struct ListRoom {
  uint16_t (*items)[kListRows];  // of kSpikeChunk channels
  SpikeList* lists;              // of all channels
  uint16_t* order;
  int64_t bytes;
};
TK_INLINE ListRoom list_room(const SpikeConvArgs& a, char* memory) {
  ListRoom r;
  Room room{memory};
  r.items = (uint16_t (*)[kListRows])room.take<uint16_t>(kSpikeChunk * kListRows);
  r.lists = room.take<SpikeList>(a.C), r.order = room.take<uint16_t>(a.C);
  r.bytes = room.at - memory;
  return r;
}

// Some images.
struct ImageGroup {
  int64_t in_slab, first, count;
};
TK_INLINE ImageGroup image_group(const SpikeConvArgs& a, const GradSplit& s, int64_t slab, int64_t in_slab) {
  const int64_t group = part_begin(s.groups, s.slabs, slab) + in_slab, first = part_begin(a.T * a.B, s.groups, group);
  return {in_slab, first, part_begin(a.T * a.B, s.groups, group + 1) - first};
}
TK_INLINE int64_t groups_of_slab(const GradSplit& s, int64_t slab) {
  return part_begin(s.groups, s.slabs, slab + 1) - part_begin(s.groups, s.slabs, slab);
}

// Where the rows of a row and column of g lie; columns from 0 on are those of y.
TK_INLINE float* g_rows(const SpikeConvArgs& a, const GradSplit& s, const GradRoom& r, const ImageGroup& group,
                        int64_t output, int64_t row, int64_t column) {
  const int64_t place = (output * a.out_h + row) * s.columns + column - s.first_column;
  return r.g + group.in_slab * r.g_size + place * group.count * kListOutputs;
}

// Copy a row of g of a group's images. False: it is not finite.
TK_INLINE bool copy_g(const SpikeConvArgs& a, const GradSplit& s, const GradRoom& r, const ImageGroup& group,
                      int64_t row) {
  vfloat watch = {};
  float watch_one = 0.0f;
  for (int64_t output = 0; output < s.outputs; ++output) {
    const int64_t n = lesser(kListOutputs, a.K - output * kListOutputs), column = group.count * kListOutputs;
    float* to = g_rows(a, s, r, group, output, row, s.first_column);
    __builtin_memset(to, 0, -s.first_column * column * 4);
    to -= s.first_column * column;
    __builtin_memset(to + a.out_w * column, 0, (s.columns + s.first_column - a.out_w) * column * 4);
    for (int64_t image = 0; image < group.count; ++image) {
      const int64_t place = ((group.first + image) * a.out_h + row) * a.out_w;
      const float* g = (const float*)a.g + place * a.K + output * kListOutputs;
      float* at = to + image * kListOutputs;
      for (int64_t j = 0; j < a.out_w; ++j, g += a.K, at += column) {
        int64_t k = 0;
        for (; k + kLanes <= n; k += kLanes) {
          const vfloat value = load(g + k);
          watch += value * 0.0f;
          store(at + k, value);
        }
        for (; k < n; ++k) at[k] = g[k], watch_one += g[k] * 0.0f;
        for (; k < kListOutputs; ++k) at[k] = 0.0f;
      }
    }
  }
  for (int i = 0; i < kLanes; ++i) watch_one += watch[i];
  return watch_one == 0.0f;
}

// Neighbours of a row of a class's grid.
struct GridRun {
  int64_t of_class, row, column, columns;
};
TK_INLINE GridRun grid_run(const SpikeConvArgs& a, const GradSplit& s, int64_t of_class, int64_t row, int64_t run) {
  const int64_t size = grid_columns(a, of_class).size, runs = chunks_of_row(a, s, of_class);
  const int64_t column = part_begin(size, runs, run);
  return {of_class, row, column, part_begin(size, runs, run + 1) - column};
}

// List where n channels from c (at most kSpikeChunk) fired; returns the items that `items` then has.
template <bool kCounts>
TK_INLINE int64_t list_channels(const SpikeConvArgs& a, const ImageGroup& group, const GridRun& run, int64_t c,
                                int64_t n, const ListRoom& own, uint16_t* items, int64_t used) {
  uint32_t found[kSpikeChunk] = {};
  alignas(64) uint8_t counts[kSpikeChunk];
  const int64_t row = run.of_class / a.stride_w + run.row * a.stride_h;
  int64_t place = 0;
  for (int64_t j = 0; j < run.columns; ++j) {
    const int64_t column = run.of_class % a.stride_w + (run.column + j) * a.stride_w;
    int64_t t = group.first / a.B, b = group.first % a.B;
    for (int64_t image = 0; image < group.count; ++image, ++place) {
      uint64_t bits = kCounts ? counts_of(a, t, b, row, column, c, n, counts) : bits_of(a, t, b, row, column, c, n);
      for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctzll(bits);
        own.items[i][found[i]++] = (uint16_t)(place << 8 | (kCounts ? counts[i] : 0));
      }
      if (++b == a.B) b = 0, ++t;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    own.lists[c + i] = {(uint32_t)used, (uint16_t)found[i], 0};
    __builtin_memcpy(items + used, own.items[i], found[i] * 2);
    used += found[i];
  }
  return used;
}

// Make the lists of a chunk.
template <bool kCounts>
TK_NOINLINE void list_chunk(const SpikeConvArgs& a, const GradSplit& s, const GradRoom& r, const ImageGroup& group,
                            const GridRun& run, int64_t chunk, const ListRoom& own) {
  uint16_t* items = r.items + chunk * r.items_size;
  int64_t used = 0;
  for (int64_t c = 0; c < a.C; c += kSpikeChunk)
    used = list_channels<kCounts>(a, group, run, c, lesser(kSpikeChunk, a.C - c), own, items, used);
  for (int64_t block = 0; block < s.channel_blocks; ++block) {
    const int64_t c = part_begin(a.C, s.channel_blocks, block);
    const int64_t n = by_length(own.lists + c, part_begin(a.C, s.channel_blocks, block + 1) - c, own.order);
    SpikeList* lists = r.lists + chunk * a.C + c;
    for (int64_t i = 0; i < n; ++i) {
      lists[i] = own.lists[c + own.order[i]];
      lists[i].target = own.order[i];
    }
    r.counts[chunk * s.channel_blocks + block] = (uint32_t)n;
  }
}

// An item of a slab's first phase: copy a row of g, or make the lists of a row of a class's grid.
TK_INLINE void prepare_row(const SpikeConvArgs& a, const GradSplit& s, int64_t slab, int64_t item,
                           const SpikeMemory& memory) {
  const GradRoom r = grad_room(a, s, memory.shared);
  const int64_t items = a.out_h + s.grid_rows;
  const ImageGroup group = image_group(a, s, slab, item / items);
  int64_t row = item % items;
  if (row < a.out_h) {
    if (!copy_g(a, s, r, group, row)) *memory.nonfinite = 1;
    return;
  }
  row -= a.out_h;
  int64_t chunk = group.in_slab * s.chunks, k = 0;
  for (; row >= rows_of_class(a, k); ++k) {
    chunk += rows_of_class(a, k) * chunks_of_row(a, s, k);
    row -= rows_of_class(a, k);
  }
  const ListRoom own = list_room(a, memory.own);
  const int64_t runs = chunks_of_row(a, s, k);
  for (int64_t i = 0; i < runs; ++i) {
    const GridRun run = grid_run(a, s, k, row, i);
    if (single_spikes(a))
      list_chunk<false>(a, s, r, group, run, chunk + row * runs + i, own);
    else
      list_chunk<true>(a, s, r, group, run, chunk + row * runs + i, own);
  }
}

// What an item of a slab's second phase adds to: some taps and channels of a block of outputs.
struct GradPart {
  int64_t output, tap, tap_end, block, c, channels;
};
TK_INLINE GradPart grad_part(const SpikeConvArgs& a, const GradSplit& s, int64_t item) {
  GradPart p;
  p.block = item % s.channel_blocks, item /= s.channel_blocks;
  p.tap = part_begin(tap_count(a), s.tap_groups, item % s.tap_groups);
  p.tap_end = part_begin(tap_count(a), s.tap_groups, item % s.tap_groups + 1);
  p.output = item / s.tap_groups;
  p.c = part_begin(a.C, s.channel_blocks, p.block);
  p.channels = part_begin(a.C, s.channel_blocks, p.block + 1) - p.c;
  return p;
}
TK_INLINE float* part_sums(const SpikeConvArgs& a, const GradRoom& r, int64_t output, int64_t tap, int64_t c) {
  return r.sums + ((output * tap_count(a) + tap) * a.C + c) * kListOutputs;
}

// Add a chunk to the sums of the part's taps.
template <bool kCounts>
TK_INLINE void add_chunk(const SpikeConvArgs& a, const GradSplit& s, const GradRoom& r, const ImageGroup& group,
                         const GridRun& run, int64_t chunk, const GradPart& part, const float* factors) {
  const SpikeList* lists = r.lists + chunk * a.C + part.c;
  const int64_t n = r.counts[chunk * s.channel_blocks + part.block];
  for (int64_t tap = part.tap; tap < part.tap_end; ++tap) {
    const int64_t row = run.row - tap_row(a, tap).shift;
    if (tap_class(a, tap) != run.of_class || row < 0 || row >= a.out_h) continue;
    const float* g = g_rows(a, s, r, group, part.output, row, run.column - tap_column(a, tap).shift);
    add_lists<kCounts>(lists, n, r.items + chunk * r.items_size, g, factors, part_sums(a, r, part.output, tap, part.c));
  }
}

template <bool kCounts>
TK_NOINLINE void add_slab(const SpikeConvArgs& a, const GradSplit& s, int64_t slab, int64_t item,
                          const SpikeMemory& memory) {
  const GradRoom r = grad_room(a, s, memory.shared);
  const GradPart part = grad_part(a, s, item);
  float factors[kListCounts];
  if (kCounts) list_factors(a, factors);
  if (slab == 0)
    for (int64_t tap = part.tap; tap < part.tap_end; ++tap)
      __builtin_memset(part_sums(a, r, part.output, tap, part.c), 0, part.channels * kListOutputs * 4);
  for (int64_t i = 0; i < groups_of_slab(s, slab); ++i) {
    const ImageGroup group = image_group(a, s, slab, i);
    int64_t chunk = i * s.chunks;
    for (int64_t k = 0; k < class_count(a); ++k) {
      const int64_t rows = rows_of_class(a, k), runs = chunks_of_row(a, s, k);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < runs; ++at, ++chunk)
          add_chunk<kCounts>(a, s, r, group, grid_run(a, s, k, row, at), chunk, part, factors);
    }
  }
}

// Write the gradient of kListOutputs outputs and some channels.
TK_INLINE void write_grad(const SpikeConvArgs& a, const GradSplit& s, int64_t item, const SpikeMemory& memory) {
  const GradRoom r = grad_room(a, s, memory.shared);
  const int64_t blocks = parts(a.C, kListRows), output = item / blocks, block = item % blocks;
  const int64_t c = part_begin(a.C, blocks, block);
  WeightPart part;
  part.outputs = lesser(kListOutputs, a.K - output * kListOutputs);
  part.channels = part_begin(a.C, blocks, block + 1) - c, part.tap_rows = a.C;
  part.weight = (float*)a.gweight + output * kListOutputs * a.weight_k + c * a.weight_c;
  part.rows = part_sums(a, r, output, 0, c);
  move_weights<true>(a, part);
}

TK_INLINE int64_t grad_items(const SpikeConvArgs& a, int64_t phase) {
  const GradSplit s = grad_split(a);
  if (phase == 2 * s.slabs) return s.outputs * parts(a.C, kListRows);
  if (phase % 2 == 0) return groups_of_slab(s, phase / 2) * (a.out_h + s.grid_rows);
  return s.outputs * s.tap_groups * s.channel_blocks;
}

TK_INLINE void grad_run(const SpikeConvArgs& a, int64_t phase, int64_t item, const SpikeMemory& memory) {
  const GradSplit s = grad_split(a);
  if (phase == 2 * s.slabs)
    write_grad(a, s, item, memory);
  else if (phase % 2 == 0)
    prepare_row(a, s, phase / 2, item, memory);
  else if (single_spikes(a))
    add_slab<false>(a, s, phase / 2, item, memory);
  else
    add_slab<true>(a, s, phase / 2, item, memory);
}

TK_INLINE SpikePlan lists_weight_grad(const SpikeConvArgs& a) {
  if (!counts_fit(a) || a.T * a.B == 0) return {};
  const GradSplit s = grad_split(a);
  SpikePlan plan;
  plan.shared = grad_room(a, s, nullptr).bytes;
  plan.own = list_room(a, nullptr).bytes;
  plan.phases = 2 * s.slabs + 1;
  plan.items = grad_items, plan.run = grad_run;
  return plan;
}

}  // namespace trtkern::TK_ISA
