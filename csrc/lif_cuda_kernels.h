// The LIF kernels and the choice among them, for one element type: included by lif_float32_cuda.cu and its likes, which
// nvcc compiles side by side.
//
// Of each element type there are: forward, three chunk classes (T up to 4, up to 8, and chunks of 16 steps); backward,
// the same three for each surrogate; and for rows that are not 16-byte aligned (N no multiple of the vector, or a
// tensor that starts in the middle of one) the last class again with one neuron a thread. Everything else is decided at
// run time, uniformly.
#pragma once
#include <cuda_runtime.h>

#include "lif_cuda.h"
#include "lif_cuda_dialect.h"

#include "lif_cuda_body.h"

namespace trtkern {
namespace cuda {

// Blocks that a multiprocessor's 65536 registers must hold: leaves each thread 168, which every kernel fits.
constexpr int kBlocks = 6;

template <class E, int V, int K, bool LOOP>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_forward(const __grid_constant__ LifArgs a) {
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, V);
  if (n >= a.N) return;
  // A plain store: whoever wins, the flag is 1.
  if (!forward_thread<E, V, K, LOOP>(a, n) && a.flag != 0) *reinterpret_cast<int*>(a.flag) = 1;
}

// The block's sums into its column of the workspace [kSums, blocks]: lanes by shuffle, then warps, in a fixed order.
template <class S>
__device__ void block_sums(const LifArgs& a, const S& slots) {
  constexpr int kWarps = index::kThreads / 32;
  __shared__ float warp_sums[kSums][kWarps];
  for (int r = 0; r < kSums; ++r) {
    float sum = sum_of(slots, r).value;
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % 32 == 0) warp_sums[r][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kSums) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[threadIdx.x][warp];
  reinterpret_cast<float*>(a.workspace)[index::offset(threadIdx.x, blockIdx.x, gridDim.x)] = sum;
}

template <class E, int V, int K, bool LOOP, int SURROGATE>
__global__ void __launch_bounds__(index::kThreads, kBlocks) lif_backward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const Slots<E, V, K> slots{shared + threadIdx.x, index::kThreads};
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, V);
  const bool learn = a.gparams != 0;
  if (learn) clear_sums(slots);
  if (n < a.N) backward_thread<E, V, K, LOOP, SURROGATE>(a, n, slots);
  if (!learn) return;
  if (a.C == 1) {
    block_sums(a, slots);
  } else if (n < a.N) {
    store_sums(a, n, slots);
  }
}

// ---- launch ----

inline cudaStream_t stream(const LifArgs& a) { return reinterpret_cast<cudaStream_t>(a.stream); }

template <class E>
void start_forward(const LifArgs& a) {
  choose<E>(a, [&a](auto c) {
    using C = decltype(c);
    const unsigned blocks = static_cast<unsigned>(index::blocks(a.N, C::V));
    lif_forward<E, C::V, C::K, C::LOOP><<<blocks, index::kThreads, 0, stream(a)>>>(a);
  });
}

template <class E, class C, int SURROGATE = 0>
void start_backward(const LifArgs& a) {
  if constexpr (SURROGATE < kSurrogates) {
    if (a.surrogate != SURROGATE) return start_backward<E, C, SURROGATE + 1>(a);
    using S = Slots<E, C::V, C::K>;
    static_assert(S::kEnd * sizeof(uint32_t) * index::kThreads < 48 * 1024, "more than a block has unasked");
    const unsigned blocks = static_cast<unsigned>(index::blocks(a.N, C::V));
    const size_t shared = (a.gparams == 0 ? S::kSum : S::kEnd) * sizeof(uint32_t) * index::kThreads;
    lif_backward<E, C::V, C::K, C::LOOP, SURROGATE><<<blocks, index::kThreads, shared, stream(a)>>>(a);
  }
}

template <class E>
void start_backward(const LifArgs& a) {
  choose<E>(a, [&a](auto c) { start_backward<E, decltype(c)>(a); });
}

}  // namespace cuda
}  // namespace trtkern
