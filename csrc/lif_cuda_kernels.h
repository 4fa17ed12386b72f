// The LIF kernels and the choice among them, for one element type: included by lif_float32_cuda.cu and its likes, which
// nvcc compiles side by side.
//
// Of each element type there are: forward, 4 chunk classes (T up to 4, 8, 16, and beyond); backward, the same 4 for each
// surrogate; and for rows that are not 16-byte aligned (N no multiple of the vector, or a tensor that starts in the
// middle of one) the last class again with one neuron a thread. Everything else is decided at run time, uniformly.
#pragma once
#include <cuda_runtime.h>

#include "lif_cuda.h"
#include "lif_cuda_dialect.h"

#include "lif_cuda_body.h"

namespace trtkern {
namespace cuda {

template <class E, int V, int K, bool LOOP>
__global__ void __launch_bounds__(index::kThreads, 6) lif_forward(const __grid_constant__ LifArgs a) {
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
__global__ void __launch_bounds__(index::kThreads, 6) lif_backward(const __grid_constant__ LifArgs a) {
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

template <class E, int V, int K, bool LOOP>
void start_forward(const LifArgs& a) {
  const unsigned blocks = static_cast<unsigned>(index::blocks(a.N, V));
  lif_forward<E, V, K, LOOP><<<blocks, index::kThreads, 0, reinterpret_cast<cudaStream_t>(a.stream)>>>(a);
}

template <class E, int V, int K, bool LOOP, int SURROGATE = 0>
void start_backward(const LifArgs& a) {
  if constexpr (SURROGATE < kSurrogates) {
    if (a.surrogate != SURROGATE) return start_backward<E, V, K, LOOP, SURROGATE + 1>(a);
    const unsigned blocks = static_cast<unsigned>(index::blocks(a.N, V));
    using S = Slots<E, V, K>;
    static_assert(S::kEnd * sizeof(uint32_t) * index::kThreads <= 46 * 1024, "48 KiB a block is what all devices have");
    const size_t shared = (a.gparams == 0 ? S::kSum : S::kEnd) * sizeof(uint32_t) * index::kThreads;
    lif_backward<E, V, K, LOOP, SURROGATE>
        <<<blocks, index::kThreads, shared, reinterpret_cast<cudaStream_t>(a.stream)>>>(a);
  }
}

template <class E>
void start_forward_any(const LifArgs& a, int vec) {
  constexpr int V = 16 / E::kBytes;
  if (vec == 1) return start_forward<E, 1, kChunk, true>(a);
  if (a.T <= 4) return start_forward<E, V, 4, false>(a);
  if (a.T <= 8) return start_forward<E, V, 8, false>(a);
  if (a.T <= kChunk) return start_forward<E, V, kChunk, false>(a);
  return start_forward<E, V, kChunk, true>(a);
}

template <class E>
void start_backward_any(const LifArgs& a, int vec) {
  constexpr int V = 16 / E::kBytes;
  if (vec == 1) return start_backward<E, 1, kChunk, true>(a);
  if (a.T <= 4) return start_backward<E, V, 4, false>(a);
  if (a.T <= 8) return start_backward<E, V, 8, false>(a);
  return start_backward<E, V, kChunk, true>(a);
}

}  // namespace cuda
}  // namespace trtkern
