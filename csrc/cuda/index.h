// Which thread of the CUDA kernels owns which neuron, and where everything lies: pure functions of plain numbers, that
// g++ compiles as well as nvcc, so that a test walks the whole grid without a GPU (docs/design.md, "CUDA").
// Every offset is 64 bits wide: T * N may exceed 2^31.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define TK_HD __host__ __device__ __forceinline__
#else
#define TK_HD inline
#endif

namespace trtkern {
namespace index {

constexpr int kThreads = 64;         // of a block of the LIF kernels
constexpr int kReduceThreads = 256;  // of a block of the reduction
constexpr int kReduceLanes = 32;     // channels side by side in one, where neighbours in memory are other channels
constexpr int64_t kMaxBlocks = 2147483647;

TK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Division of numbers that nearly always fit 32 bits: 64-bit division costs a GPU a hundred instructions.
TK_HD int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Blocks that cover N neurons at `vec` neurons a thread.
TK_HD int64_t blocks(int64_t N, int vec) { return ceil_div(ceil_div(N, vec), kThreads); }

// The first of the `vec` neighbouring neurons of a thread; beyond N for the last block's idle threads. Where vec > 1,
// N is a multiple of it, so the others are inside whenever the first is.
TK_HD int64_t first_neuron(int64_t block, int thread, int vec) { return (block * kThreads + thread) * vec; }

// Neuron n at step t of a [T, N] tensor, in elements; also row t of the edges and of the workspace.
TK_HD int64_t offset(int64_t t, int64_t n, int64_t N) { return t * N + n; }

TK_HD int64_t chunks(int64_t T, int chunk) { return ceil_div(T, chunk); }

// The channel of a neuron and its place within the run of `inner` neurons that share it; step() is the next neuron.
struct Channel {
  int64_t channel, place;

  TK_HD static Channel of(int64_t n, int64_t inner, int64_t C) {
    const int64_t run = divide(n, inner);
    return {run - divide(run, C) * C, n - run * inner};
  }
  TK_HD void step(int64_t inner, int64_t C) {
    if (++place < inner) return;
    place = 0;
    if (++channel == C) channel = 0;
  }
};

// The reduction of a workspace [rows, M] to [rows, C], in a fixed order: M neurons with their channels, or M blocks and
// one channel. The members of a channel are numbered k = 0, 1, ... in storage order and cut into segments; one block
// adds up one segment of one row, of one channel (wide) or of kReduceLanes channels side by side (narrow: `inner` too
// short for neighbouring threads to read neighbouring members of one channel).
struct Reduction {
  int64_t M, C, inner;

  TK_HD bool narrow() const { return C > 1 && inner < kReduceLanes; }
  TK_HD int64_t members() const { return ceil_div(M, C * inner) * inner; }
  TK_HD int64_t span() const { return narrow() ? 512 : 4096; }
  TK_HD int64_t segments() const { return ceil_div(members(), span()); }
  TK_HD int64_t tiles() const { return narrow() ? ceil_div(C, kReduceLanes) : C; }
  TK_HD int64_t blocks(int rows) const { return segments() * rows * tiles(); }

  // A block's segment, row and tile of channels.
  struct Place {
    int64_t segment, row, tile;
  };
  TK_HD Place place(int64_t block, int rows) const {
    const int64_t above = divide(block, tiles());
    const int64_t segment = divide(above, rows);
    return {segment, above - segment * rows, block - above * tiles()};
  }
  // A thread's channel (C or more: idle), its first member within a segment, and the stride to its next.
  TK_HD int64_t channel(int64_t tile, int thread) const {
    return narrow() ? tile * kReduceLanes + thread % kReduceLanes : tile;
  }
  TK_HD int channels(int64_t tile) const {  // of a tile
    if (!narrow()) return 1;
    const int64_t left = C - tile * kReduceLanes;
    return left < kReduceLanes ? static_cast<int>(left) : kReduceLanes;
  }
  TK_HD int start(int thread) const { return narrow() ? thread / kReduceLanes : thread; }
  TK_HD int stride() const { return narrow() ? kReduceThreads / kReduceLanes : kReduceThreads; }
  // Where member k of channel c lies in a row; M or more: there is none.
  TK_HD int64_t member(int64_t k, int64_t c) const {
    const int64_t outer = divide(k, inner);
    return (outer * C + c) * inner + (k - outer * inner);
  }
};

// How blocks share out [outer, C, inner] so that each adds up few channels. A thread takes packs of `vec` neighbours;
// a pack is of one channel (lanes 1) or of `vec` channels (lanes `vec`). `groups` packs stand side by side before a
// channel comes again, `run` packs in a row are of one group, and a group's packs are numbered k = 0, 1, ... in
// storage order: its members. A block takes 1 << shift groups side by side (so that its accesses stay wide) and a
// segment of their members, in `rounds` rounds. groups == 0: packs change their channel within; there is no such
// division.
struct Tiles {
  int64_t groups = 0, run = 1, members = 0;
  int shift = 0, lanes = 1, vec = 1, threads = kThreads, rounds = 1;

  TK_HD static Tiles of(int64_t N, int64_t C, int64_t inner, int vec, int threads, int rounds) {
    Tiles t;
    t.vec = vec, t.threads = threads, t.rounds = rounds;
    if (C == 1) inner = N;
    if (inner % vec == 0) {
      t.groups = C, t.run = inner / vec;
    } else if (inner == 1 && C % vec == 0) {
      t.groups = C / vec, t.lanes = vec;
    } else {
      return t;
    }
    const int most = vec > 1 ? 3 : 5;  // 8 accesses of 16 bytes are a cache line, as 32 of 4 are
    while (t.run < (1 << most) && t.shift < most && t.groups % (2 << t.shift) == 0) ++t.shift;
    t.members = N / (t.groups * vec);
    return t;
  }
  TK_HD int64_t N() const { return groups * members * vec; }
  TK_HD int64_t C() const { return groups * lanes; }
  TK_HD int rows() const { return threads >> shift; }  // members side by side in a round
  TK_HD int64_t span() const { return static_cast<int64_t>(rows()) * rounds; }
  TK_HD int64_t segments() const { return ceil_div(members, span()); }
  TK_HD int64_t blocks() const { return segments() * (groups >> shift); }
  TK_HD int64_t segment(int64_t block) const { return divide(block, groups >> shift); }

  // The first neuron of a thread's pack in a round; N() where the segment has no such member.
  TK_HD int64_t first_neuron(int64_t block, int thread, int round) const {
    const int64_t here = segment(block), tile = block - here * (groups >> shift);
    const int64_t k = here * span() + round * rows() + (thread >> shift);
    if (k >= members) return N();
    const int64_t outer = divide(k, run), group = (tile << shift) + (thread & ((1 << shift) - 1));
    return ((outer * groups + group) * run + k - outer * run) * vec;
  }

  // A block leaves `outputs` sums, each over the members of a column and over the numbers of a pack that share a
  // channel. Number o: lane o % lanes of column o / lanes; its place in a row of the workspace [rows, segments, C].
  TK_HD int outputs() const { return lanes << shift; }
  TK_HD int64_t place(int64_t block, int o) const {
    const int64_t here = segment(block), tile = block - here * (groups >> shift);
    return here * C() + tile * outputs() + o;
  }
  // Numbers that such a sum adds up.
  TK_HD int64_t count(int64_t segment) const {
    const int64_t left = members - segment * span();
    return (left < span() ? left : span()) * (vec / lanes);
  }
};

// 2 x 2 neurons that are averaged: rows 2k and 2k + 1 of `row` neurons, and in them places 2j and 2j + 1 of `side`
// neurons side by side (lif/args.h).
struct Pool {
  int64_t row, side;

  // Where the average lies to which neuron n belongs.
  TK_HD int64_t pooled(int64_t n) const {
    const int64_t pair = divide(n, 2 * row);
    int64_t within = n - pair * 2 * row;
    if (within >= row) within -= row;
    const int64_t place = divide(within, side);
    return pair * (row / 2) + (place / 2) * side + within - place * side;
  }
  // The first of the four neurons of average m; the others: + side, + row, + row + side.
  TK_HD int64_t first(int64_t m) const {
    const int64_t pair = divide(m, row / 2), within = m - pair * (row / 2), place = divide(within, side);
    return pair * 2 * row + place * 2 * side + within - place * side;
  }
  // Whether `vec` neighbouring averages have four packs of `vec` neighbouring neurons for parts: places of at least a
  // pack (over), or rows of an even number of packs, each pack making half as many averages (beside).
  TK_HD bool over(int vec) const { return side % vec == 0; }
  TK_HD bool beside(int vec) const { return side == 1 && row % (2 * vec) == 0; }
  // Neuron n + apart(q, vec) is the first of pack q of the four.
  TK_HD int64_t apart(int q, int vec) const { return (q >> 1) * row + (q & 1) * (over(vec) ? side : vec); }
};

// What a backward pass with N neurons at `vec` a thread leaves to add up: a row of sums a neuron, or, where all neurons
// share their parameters, a row of sums a block.
TK_HD Reduction reduction(int64_t N, int64_t C, int64_t inner, int vec) {
  return C == 1 ? Reduction{blocks(N, vec), 1, 1} : Reduction{N, C, inner};
}

// Float32 numbers in its workspace: [rows, M], then the sums of the segments, [segments, rows, C].
TK_HD int64_t workspace(const Reduction& r, int rows) { return rows * (r.M + r.segments() * r.C); }

}  // namespace index
}  // namespace trtkern
