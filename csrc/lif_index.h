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
  TK_HD int start(int thread) const { return narrow() ? thread / kReduceLanes : thread; }
  TK_HD int stride() const { return narrow() ? kReduceThreads / kReduceLanes : kReduceThreads; }
  // Where member k of channel c lies in a row; M or more: there is none.
  TK_HD int64_t member(int64_t k, int64_t c) const {
    const int64_t outer = divide(k, inner);
    return (outer * C + c) * inner + (k - outer * inner);
  }
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
