// The LIF kernels and the choice among them, for one element type: included by lif/cuda_float32.cu and its likes, which
// nvcc compiles side by side.
//
// Of each element type there are: forward, three chunk classes (T up to 4, up to 8, and chunks of 16 steps); backward,
// the same three for each surrogate; and for rows that are not 16-byte aligned (N no multiple of the vector, or a
// tensor that starts in the middle of one) the last class again with one neuron a thread. Everything else is decided at
// run time, uniformly.
//
// For long sequences of few neurons there are two more (lif/cuda_ahead.h), with any surrogate.
//
// The fused kernels (FUSED in lif/cuda_traits.h) are others, so that a plain LIF pays nothing for what they can. They
// choose their surrogate at run time, and there is none for T between 5 and 8 alone: built like the others they would
// take as long to compile as all the rest.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/dialect.h"

#include "lif/cuda_body.h"

#include "cuda/device.h"
#include "cuda/last_block.h"

namespace trtkern {
namespace cuda {

// Blocks that a multiprocessor's 65536 registers must hold: leaves each thread 168, which every kernel fits.
constexpr int kBlocks = 6;

template <class Kernel>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_forward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, Kernel::V);
  if (n >= (Kernel::FUSED && a.pool_row != 0 ? a.N / 4 : a.N)) return;
  const Words kept{shared + threadIdx.x, index::kThreads};
  // A plain store: whoever wins, the flag is 1.
  if (!forward_thread<Kernel>(a, n, kept) && a.flag != 0) *reinterpret_cast<int*>(a.flag) = 1;
}

// The block's sums into column `column` of the workspace [rows, columns]: lanes by shuffle, then warps, in a fixed
// order.
template <int ROWS, class S>
__device__ void block_sums(const LifArgs& a, const S& slots, int rows, int64_t column, int64_t columns) {
  constexpr int kWarps = index::kThreads / 32;
  __shared__ float warp_sums[ROWS][kWarps];
  for (int r = 0; r < rows; ++r) {
    float sum = sum_of(a, slots, r).value;
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % 32 == 0) warp_sums[r][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= rows) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[threadIdx.x][warp];
  reinterpret_cast<float*>(a.workspace)[index::offset(threadIdx.x, column, columns)] = sum;
}

// The sums of a plain LIF: of a block where all neurons share their parameters, else of each neuron.
template <class Kernel>
__device__ void leave_sums(const LifArgs& a, const Slots<Kernel>& slots, int64_t n) {
  clear_counters(a.counters, a.C);
  if (a.C == 1) {
    block_sums<kSums>(a, slots, kSums, blockIdx.x, gridDim.x);
  } else if (n < a.N) {
    store_sums(a, kSums, n, slots);
  }
}

// Those of the other kernels: of a block's channels, or of each neuron. `shared`: the block's.
template <class Kernel>
__device__ void leave_sums(const LifArgs& a, const index::Tiles& t, int rows, const Slots<Kernel>& slots, int64_t n,
                           uint32_t* shared) {
  if ((a.norm_sums | a.gparams) == 0) return;
  clear_counters(a.counters, a.C);
  if (t.groups == 0) {
    if (n < a.N) store_sums(a, rows, n, slots);
  } else if (t.outputs() == 1) {
    block_sums<kNormSums + Kernel::kRows>(a, slots, rows, t.place(blockIdx.x, 0), t.segments() * t.C());
  } else {
    __syncthreads();
    const int outputs = t.outputs();
    const Slots<Kernel> first(shared, index::kThreads, slots.more);
    for (int i = threadIdx.x; i < rows * outputs; i += index::kThreads) {
      const int r = i / outputs, o = i - r * outputs;
      const int64_t at = index::offset(r, t.place(blockIdx.x, o), t.segments() * t.C());
      store_one(a.workspace, at, tile_sum(a, t, first, r, o));
    }
  }
}

template <class Kernel, int SURROGATE>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_backward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const Slots<Kernel> slots(shared + threadIdx.x, index::kThreads, 0);
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, Kernel::V);
  const bool learn = a.gparams != 0;
  if (learn) clear_sums(a, slots);
  if (n < a.N) backward_thread<SURROGATE>(a, n, slots);
  if (learn) leave_sums(a, slots, n);
}

template <class Kernel>
__global__ void __launch_bounds__(index::kThreads, kBlocks)
    lif_fused_backward(const __grid_constant__ LifArgs a, const __grid_constant__ index::Tiles t, int rows) {
  extern __shared__ uint32_t shared[];
  const Slots<Kernel> slots(shared + threadIdx.x, index::kThreads, Slots<Kernel>::more_rows(a));
  const int64_t n = t.groups != 0 ? t.first_neuron(blockIdx.x, threadIdx.x, 0)
                                  : index::first_neuron(blockIdx.x, threadIdx.x, Kernel::V);
  clear_sums(a, slots);
  if (n < a.N) backward_thread<kAnySurrogate>(a, n, slots);
  leave_sums(a, t, rows, slots, n, shared);
}

// Of the two kernels that read ahead there is one each.
template <class Kernel>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_ahead_forward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, Kernel::V);
  if (n >= a.N) return;
  const Words ring{shared + threadIdx.x, index::kThreads};
  if (!forward_ahead<Kernel>(a, n, ring) && a.flag != 0) *reinterpret_cast<int*>(a.flag) = 1;
}

template <class Kernel>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_ahead_backward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const RingOfSlots<Kernel> ring(a, shared + threadIdx.x, index::kThreads);
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, Kernel::V);
  ring.clear(a);
  if (n < a.N) backward_ahead(a, n, ring);
  if (a.gparams == 0) return;
  ring.add_up(a);
  leave_sums(a, ring.first, n);
}

// ---- launch ----

template <class E>
void start_forward(const LifArgs& a) {
  const int shared = shared_bytes<E>(a, false);
  if (ahead(a)) {
    const int64_t blocks = index::blocks(a.N, Ahead<E>::V);
    return launch(a, lif_ahead_forward<Ahead<E>>, blocks, index::kThreads, shared, a);
  }
  const auto start = [&a, shared](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t blocks = index::blocks(a.pool_row != 0 ? a.N / 4 : a.N, Kernel::V);
    launch(a, lif_forward<Kernel>, blocks, index::kThreads, shared, a);
  };
  fused(a) ? choose<E, true>(a, start) : choose<E, false>(a, start);
}

template <class Kernel, int SURROGATE = 0>
void start_plain_backward(const LifArgs& a) {
  if constexpr (SURROGATE < kSurrogates) {
    if (a.surrogate != SURROGATE) return start_plain_backward<Kernel, SURROGATE + 1>(a);
    const int shared = shared_bytes<typename Kernel::E>(a, true);
    launch(a, lif_backward<Kernel, SURROGATE>, index::blocks(a.N, Kernel::V), index::kThreads, shared, a);
  }
}

// Launches kernel(a, tiles, rows of sums), in as many blocks as the tiles are.
template <class Kernel, class Function>
void start_fused_backward(const LifArgs& a, Function kernel) {
  const index::Tiles t = tiles(a);
  const int64_t blocks = t.groups != 0 ? t.blocks() : index::blocks(a.N, Kernel::V);
  const int shared = shared_bytes<typename Kernel::E>(a, true);
  if (shared > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  launch(a, kernel, blocks, index::kThreads, shared, a, t, sum_rows(a));
}

template <class E>
void start_backward(const LifArgs& a) {
  if (ahead(a)) {
    const int64_t blocks = index::blocks(a.N, Ahead<E>::V);
    return launch(a, lif_ahead_backward<Ahead<E>>, blocks, index::kThreads, shared_bytes<E>(a, true), a);
  }
  if (fused(a)) {
    return choose<E, true>(
        a, [&a](auto kernel) { start_fused_backward<decltype(kernel)>(a, lif_fused_backward<decltype(kernel)>); });
  }
  choose<E, false>(a, [&a](auto kernel) { start_plain_backward<decltype(kernel)>(a); });
}

}  // namespace cuda
}  // namespace trtkern
