// Lists, forward: y of a tile of output places, from the lists of all input places in its reach.
//
// Phase 0 copies the weight to rows of 64 outputs, phase 1 takes a tile of places and some blocks of 64 outputs an
// item. An output adds up block of channels by block, tap by tap, channel by channel, whatever the tile.
#pragma once
#include "spike_conv/cpu_lists_weights.h"

namespace trtkern::TK_ISA {

constexpr int64_t kTilePlaces = 512;      // output places of a tile: their sums stay in L2
constexpr int64_t kTileItems = 1 << 20;   // items of a tile's lists, where a smaller tile helps
constexpr int64_t kStreamFrom = 4 << 20;  // bytes of y that bypass the caches
constexpr int64_t kMostPlaces = 65535;    // places of a class, and of a tile, that 16 bits can number

// A range of output places.
struct OutputTile {
  int64_t image, images, row, rows, column, columns;
};

// How the outputs are split into tiles, and the channels into blocks.
struct ForwardSplit {
  int64_t images, rows, columns;                 // tiles in each direction
  int64_t most_images, most_rows, most_columns;  // of a tile
  int64_t most_places;                           // input places in the reach of a tile
  int64_t blocks;                                // of channels
  int64_t channels;                              // of a block, at most kListRows; the last may have fewer
  int64_t outputs;                               // blocks of kListOutputs outputs
  int64_t groups;                                // items of a tile: each takes some of those
};

// Grid places of a class that a tile reaches, of one image.
TK_INLINE int64_t reached(const SpikeConvArgs& a, int64_t of_class, int64_t rows, int64_t columns) {
  const GridSide high = grid_rows(a, of_class), wide = grid_columns(a, of_class);
  if (!high.any || !wide.any) return 0;
  return lesser(high.size, rows + high.most - high.least) * lesser(wide.size, columns + wide.most - wide.least);
}

TK_INLINE ForwardSplit forward_split(const SpikeConvArgs& a) {
  ForwardSplit s{};
  s.blocks = parts(a.C, kListRows), s.channels = parts(a.C, s.blocks), s.outputs = parts(a.K, kListOutputs);
  const int64_t places = greater(32, lesser(kTilePlaces, kTileItems / a.C)), images = a.T * a.B;
  s.columns = parts(a.out_w, places), s.most_columns = parts(a.out_w, s.columns);
  s.rows = parts(a.out_h, lesser(a.out_h, greater(1, places / s.most_columns))), s.most_rows = parts(a.out_h, s.rows);
  int64_t most = 0;
  for (int64_t k = 0; k < class_count(a); ++k) most += reached(a, k, s.most_rows, s.most_columns);
  s.most_images = 1;
  if (s.rows * s.columns == 1 && images) {
    s.most_images = greater(1, lesser(places / (a.out_h * a.out_w), kTileItems / (a.C * greater(1, most))));
    s.most_images = lesser(s.most_images, images);
  }
  s.images = parts(images, s.most_images), s.most_images = images ? parts(images, s.images) : 0;
  s.most_places = s.most_images * most;
  const int64_t tiles = s.images * s.rows * s.columns, wanted = a.threads > 1 ? 4 * a.threads : 1;
  s.groups = tiles ? lesser(s.outputs, parts(wanted, tiles)) : 1;
  return s;
}

// Lists of input places with where those are: their row and column of the tile before a tap's shift.
struct PlaceLists {
  SpikeList* lists;
  int32_t *rows, *columns;
};

// The memory of an item.
struct ForwardRoom {
  float *sums, *factors;
  PlaceLists places;    // of a class, its lists [blocks, places]; a target is the output place before a tap's shift
  PlaceLists in_order;  // those of a block, by their length
  uint16_t* order;
  int64_t* jobs_count;  // [blocks, taps]
  SpikeList* jobs;      // [blocks, taps, places of the tile]: the lists that a tap adds
  uint16_t* items;
  int64_t jobs_size, bytes;
};

TK_INLINE ForwardRoom forward_room(const SpikeConvArgs& a, const ForwardSplit& s, char* memory) {
  ForwardRoom r;
  Room room{memory};
  const int64_t places = s.most_images * s.most_rows * s.most_columns;
  r.jobs_size = places + kLanes;  // a vector more may be written
  r.sums = room.take<float>(places * kListOutputs), r.factors = room.take<float>(kListCounts);
  int64_t blocks = s.blocks;
  PlaceLists* both[] = {&r.places, &r.in_order};
  for (PlaceLists* of : both) {
    of->lists = room.take<SpikeList>(blocks * s.most_places + kLanes);
    of->rows = room.take<int32_t>(s.most_places + kLanes), of->columns = room.take<int32_t>(s.most_places + kLanes);
    blocks = 1;
  }
  r.order = room.take<uint16_t>(s.most_places);
  r.jobs_count = room.take<int64_t>(s.blocks * tap_count(a));
  r.jobs = room.take<SpikeList>(s.blocks * tap_count(a) * r.jobs_size);
  r.items = room.take<uint16_t>(s.most_places * a.C + kListSlack);
  r.bytes = room.at - memory;
  return r;
}

TK_INLINE int64_t block_channels(const SpikeConvArgs& a, const ForwardSplit& s, int64_t block) {
  return lesser(s.channels, a.C - block * s.channels);
}

// Rows of the weight before a block of outputs, a block of channels and a tap.
TK_INLINE int64_t weight_row(const SpikeConvArgs& a, const ForwardSplit& s, int64_t output, int64_t block,
                             int64_t tap) {
  return (output * a.C + block * s.channels) * tap_count(a) + tap * block_channels(a, s, block);
}

TK_INLINE void copy_weight(const SpikeConvArgs& a, const ForwardSplit& s, int64_t item, const SpikeMemory& memory) {
  const int64_t output = item / s.blocks, block = item % s.blocks, c = block * s.channels;
  WeightPart part;
  part.outputs = lesser(kListOutputs, a.K - output * kListOutputs);
  part.channels = part.tap_rows = block_channels(a, s, block);
  part.weight = (float*)a.weight + output * kListOutputs * a.weight_k + c * a.weight_c;
  part.rows = (float*)memory.shared + weight_row(a, s, output, block, 0) * kListOutputs;
  if (part.outputs < kListOutputs) __builtin_memset(part.rows, 0, tap_count(a) * part.channels * kListOutputs * 4);
  if (!move_weights<false>(a, part)) *memory.nonfinite = 1;
}

// List the input places of a class that the tile reaches; returns how many there are.
template <bool kCounts>
TK_INLINE int64_t list_class(const SpikeConvArgs& a, const ForwardSplit& s, const OutputTile& tile, int64_t of_class,
                             const ForwardRoom& r, int64_t& used) {
  const GridSide high = grid_rows(a, of_class), wide = grid_columns(a, of_class);
  if (!high.any || !wide.any) return 0;
  const int64_t i0 = greater(0, tile.row + high.least), i1 = lesser(high.size, tile.row + tile.rows + high.most);
  const int64_t j0 = greater(0, tile.column + wide.least),
                j1 = lesser(wide.size, tile.column + tile.columns + wide.most);
  int64_t n = 0, t = tile.image / a.B, b = tile.image % a.B;
  for (int64_t image = 0; image < tile.images; ++image) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j, ++n) {
        const int64_t place = (image * tile.rows + i - tile.row) * tile.columns + j - tile.column;
        r.places.rows[n] = (int32_t)(i - tile.row), r.places.columns[n] = (int32_t)(j - tile.column);
        const int64_t row = of_class / a.stride_w + i * a.stride_h, column = of_class % a.stride_w + j * a.stride_w;
        for (int64_t block = 0; block < s.blocks; ++block) {
          const int64_t count = list_place<kCounts>(a, t, b, row, column, block * s.channels,
                                                    block_channels(a, s, block), r.items + used);
          r.places.lists[block * s.most_places + n] = {(uint32_t)used, (uint16_t)count, (uint16_t)place};
          used += count;
        }
      }
    if (++b == a.B) b = 0, ++t;
  }
  return n;
}

// Those of a block that are not empty, by their length; returns how many there are.
TK_INLINE int64_t put_in_order(const ForwardSplit& s, const ForwardRoom& r, int64_t block, int64_t places) {
  const SpikeList* lists = r.places.lists + block * s.most_places;
  const int64_t n = by_length(lists, places, r.order);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = r.order[i];
    r.in_order.lists[i] = lists[place];
    r.in_order.rows[i] = r.places.rows[place], r.in_order.columns[i] = r.places.columns[place];
  }
  return n;
}

// The lists that a tap adds, of n in order, and where to; returns how many.
TK_INLINE int64_t tap_jobs(const SpikeConvArgs& a, const OutputTile& tile, int64_t tap, const PlaceLists& of, int64_t n,
                           SpikeList* jobs) {
  const int32_t high = (int32_t)tap_row(a, tap).shift, wide = (int32_t)tap_column(a, tap).shift;
  const uint16_t shift = (uint16_t)(high * (int32_t)tile.columns + wide);
  const uint32_t rows = (uint32_t)tile.rows, columns = (uint32_t)tile.columns;
  int64_t found = 0, i = 0;
#if TK_WIDTH == 16 && defined(__AVX512VL__)
  const __m512i back = _mm512_set1_epi64((int64_t)((uint64_t)shift << 48));
  for (; i < n; i += 8) {
    const __m256i row = _mm256_sub_epi32(load_as<__m256i>(of.rows + i), _mm256_set1_epi32(high));
    const __m256i column = _mm256_sub_epi32(load_as<__m256i>(of.columns + i), _mm256_set1_epi32(wide));
    __mmask8 inside = _mm256_cmplt_epu32_mask(row, _mm256_set1_epi32((int)rows));
    inside = _mm256_mask_cmplt_epu32_mask(inside, column, _mm256_set1_epi32((int)columns));
    if (n - i < 8) inside &= (__mmask8)((1 << (n - i)) - 1);
    const __m512i lists = _mm512_sub_epi64(load_as<__m512i>(of.lists + i), back);
    _mm512_storeu_si512(jobs + found, _mm512_maskz_compress_epi64(inside, lists));
    found += __builtin_popcount(inside);
  }
#endif
  for (; i < n; ++i) {
    const bool inside = ((uint32_t)(of.rows[i] - high) < rows) & ((uint32_t)(of.columns[i] - wide) < columns);
    jobs[found] = of.lists[i];
    jobs[found].target -= shift;
    found += inside;
  }
  return found;
}

template <bool kCounts>
TK_INLINE void list_tile(const SpikeConvArgs& a, const ForwardSplit& s, const OutputTile& tile, const ForwardRoom& r) {
  const int64_t taps = tap_count(a);
  int64_t used = 0;
  for (int64_t k = 0; k < class_count(a); ++k) {
    const int64_t places = list_class<kCounts>(a, s, tile, k, r, used);
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t n = put_in_order(s, r, block, places);
      for (int64_t tap = 0; tap < taps; ++tap)
        if (tap_class(a, tap) == k) {
          const int64_t at = block * taps + tap;
          r.jobs_count[at] = tap_jobs(a, tile, tap, r.in_order, n, r.jobs + at * r.jobs_size);
        }
    }
  }
}

// Write a tile's sums of a block of outputs to y.
TK_INLINE void write_tile(const SpikeConvArgs& a, const OutputTile& tile, int64_t output, const float* sums) {
  const int64_t k = output * kListOutputs, n = lesser(kListOutputs, a.K - k);
  const bool streaming = a.T * a.B * a.out_h * a.out_w * a.K * 4 >= kStreamFrom && a.K % 16 == 0 && a.y % 64 == 0;
  for (int64_t image = 0; image < tile.images; ++image)
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = (tile.image + image) * a.out_h + tile.row + i;
      float* y = (float*)a.y + (row * a.out_w + tile.column) * a.K + k;
      for (int64_t j = 0; j < tile.columns; ++j, y += a.K, sums += kListOutputs) {
        int64_t at = 0;
        if (streaming)
          for (; at + kLanes <= n; at += kLanes) stream(y + at, load(sums + at));
        else
          for (; at + kLanes <= n; at += kLanes) store(y + at, load(sums + at));
        for (; at < n; ++at) y[at] = sums[at];
      }
    }
  if (streaming) fence();
}

template <bool kCounts>
TK_NOINLINE void forward_tile(const SpikeConvArgs& a, const ForwardSplit& s, int64_t item, const SpikeMemory& memory) {
  const int64_t group = item % s.groups, column = item / s.groups % s.columns;
  const int64_t row = item / s.groups / s.columns % s.rows, image = item / s.groups / s.columns / s.rows;
  OutputTile tile;
  tile.image = part_begin(a.T * a.B, s.images, image);
  tile.images = part_begin(a.T * a.B, s.images, image + 1) - tile.image;
  tile.row = part_begin(a.out_h, s.rows, row), tile.rows = part_begin(a.out_h, s.rows, row + 1) - tile.row;
  tile.column = part_begin(a.out_w, s.columns, column);
  tile.columns = part_begin(a.out_w, s.columns, column + 1) - tile.column;
  const ForwardRoom r = forward_room(a, s, memory.own);
  if (kCounts) list_factors(a, r.factors);
  list_tile<kCounts>(a, s, tile, r);

  const int64_t taps = tap_count(a), places = tile.images * tile.rows * tile.columns;
  const int64_t last = part_begin(s.outputs, s.groups, group + 1);
  for (int64_t output = part_begin(s.outputs, s.groups, group); output < last; ++output) {
    alignas(64) float start[kListOutputs] = {};
    const int64_t k = output * kListOutputs;
    if (a.bias) __builtin_memcpy(start, (const float*)a.bias + k, 4 * lesser(kListOutputs, a.K - k));
    for (int64_t i = 0; i < places; ++i) __builtin_memcpy(r.sums + i * kListOutputs, start, sizeof start);
    for (int64_t block = 0; block < s.blocks; ++block)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = block * taps + tap;
        const float* rows = (const float*)memory.shared + weight_row(a, s, output, block, tap) * kListOutputs;
        add_lists<kCounts>(r.jobs + at * r.jobs_size, r.jobs_count[at], r.items, rows, r.factors, r.sums);
      }
    write_tile(a, tile, output, r.sums);
  }
}

TK_INLINE int64_t forward_items(const SpikeConvArgs& a, int64_t phase) {
  const ForwardSplit s = forward_split(a);
  return phase == 0 ? s.outputs * s.blocks : s.images * s.rows * s.columns * s.groups;
}

TK_INLINE void forward_run(const SpikeConvArgs& a, int64_t phase, int64_t item, const SpikeMemory& memory) {
  const ForwardSplit s = forward_split(a);
  if (phase == 0)
    copy_weight(a, s, item, memory);
  else if (single_spikes(a))
    forward_tile<false>(a, s, item, memory);
  else
    forward_tile<true>(a, s, item, memory);
}

TK_INLINE SpikePlan lists_forward(const SpikeConvArgs& a) {
  const ForwardSplit s = forward_split(a);
  if (!counts_fit(a) || s.most_places > kMostPlaces) return {};
  SpikePlan plan;
  plan.shared = s.outputs * tap_count(a) * a.C * kListOutputs * 4;
  plan.own = forward_room(a, s, nullptr).bytes;
  plan.phases = 2;
  plan.items = forward_items, plan.run = forward_run;
  return plan;
}

}  // namespace trtkern::TK_ISA
