// The CUDA launchers of the LIF, and the reduction of sums. The path of a call, a forward pass:
//
//   trtkern/ops/lif.py        has seen every tensor, and makes what the pass will write
//   trtkern/backends/cuda.py  fills a LifArgs by name (backends/_args.py; the fields: lif/fields.h)
//   cuda/bindings.cpp         the Python functions, which make a CUDA error an exception
//   lif/cuda.cu (here)        lif_forward: checks what is cheap to check, takes the device (cuda/device.h) and branches
//                             by element type
//   lif/cuda_float32.cu, ...  one translation unit an element type; lif/cuda_neurons.cu: the neurons that are not LIF
//   lif/cuda_kernels.h        start_forward: asks lif/cuda_choice.h for the kernel (ahead, fused, choose), launches it
//   lif/cuda_body.h           forward_thread: all steps of a thread's neurons, a chunk at a time; forward_chunk. What
//                             is fixed at compile time is its Traits (lif/cuda_traits.h)
//   lif/cuda_ahead.h          forward_ahead in its place, for long sequences of few neurons
//   lif/cuda_neurons.h        forward_neuron in its place, for a neuron that is not LIF: its Traits are General
//   lif/cuda_step.h           charge, fire and reset_after_flat, over the Real of cuda/dialect.h. The first two, and
//                             the other neurons, are printed from trtkern/neurons.py (trtkern_neurons.h)
//
// Which thread owns which neuron, and every offset: cuda/index.h. How it reads and writes them: cuda/pack.h.
//
// Backward, lif_backward: start_backward, backward_thread in lif/cuda_backward.h, or backward_neuron, with a thread's
// own words of shared memory (lif/cuda_slots.h); then, where there are sums, lif_add_up here adds up what the threads
// left in the workspace (lif/cuda_sums.h), and makes of it what the next pass of a norm takes (norm/finish.h): one
// launch, whose last blocks go on where all have come (cuda/last_block.h). norm/cuda.cu has the other launchers.
// tests/cuda_threads.cpp runs all of it but the launches on the CPU.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/dialect.h"

#include "lif/cuda_body.h"

#include "norm/cuda_finish.h"
#include "cuda/device.h"
#include "cuda/last_block.h"

namespace trtkern {
namespace cuda {

// A block adds up one segment of one row: 8 threads a lane in order, then, where the lanes share a channel, the lanes.
__device__ void add_segment(const LifArgs& a, const index::Reduction& r, int rows) {
  constexpr int kLanes = index::kReduceLanes;
  __shared__ float sums[index::kReduceThreads];
  sums[threadIdx.x] = segment_sum(r, rows, a.workspace, blockIdx.x, threadIdx.x).value;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < index::kReduceThreads; i += kLanes) sum += sums[i];
  if (!r.narrow()) {
    for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x != 0) return;
  }
  const index::Reduction::Place place = r.place(blockIdx.x, rows);
  const int64_t channel = r.channel(place.tile, threadIdx.x);
  if (channel >= r.C) return;
  store_float(a.workspace, rows * r.M + index::offset(place.segment * rows + place.row, channel, r.C), sum);
}

// Then the last block of a tile of channels adds up what all left of these, and finishes what a norm wants of them.
__global__ void __launch_bounds__(index::kReduceThreads)
    lif_add_up(const __grid_constant__ LifArgs a, const __grid_constant__ NormArgs n, index::Reduction r, int rows,
               int norm) {
  add_segment(a, r, rows);
  const int64_t tile = r.place(blockIdx.x, rows).tile;
  if (!last_block(a.counters, tile, r.segments() * rows)) return;
  const int64_t first = r.channel(tile, 0);
  const int channels = r.channels(tile);
  for (int i = threadIdx.x; i < rows * channels; i += index::kReduceThreads) {
    finish_sum(a, r, rows, norm, i / channels, first + i % channels);
  }
  if (n.C == 0) return;
  __syncthreads();  // the sums of a channel were written by several threads
  for (int i = threadIdx.x; i < channels; i += index::kReduceThreads) finish_sums(n, first + i);
}

int64_t workspace_floats(const LifArgs& a) { return index::workspace(reduction(a), sum_rows(a)) + a.C; }

int lif_shared_bytes(const LifArgs& a, bool backward) {
  if (a.dtype == kFloat32) return shared_bytes<Float32>(a, backward);
  return a.dtype == kBFloat16 ? shared_bytes<BFloat16>(a, backward) : shared_bytes<Float16>(a, backward);
}

int lif_forward(const LifArgs& a) {
  if (!valid(a)) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (general(a)) {
    start_forward_neurons(a);
  } else if (a.dtype == kFloat32) {
    start_forward_float32(a);
  } else {
    a.dtype == kBFloat16 ? start_forward_bfloat16(a) : start_forward_float16(a);
  }
  return cudaGetLastError();
}

int lif_backward(const LifArgs& given, const NormArgs* norm) {
  LifArgs a = given;
  if (!valid(a) || (a.T > span(a) && a.edges == 0) || (a.coef != 0 && a.gx == 0)) return cudaErrorInvalidValue;
  const bool sums = (a.gparams | a.norm_sums) != 0;
  if (((a.gx | a.gv0) == 0 && !sums) || (norm != nullptr && a.norm_sums == 0)) return cudaErrorInvalidValue;
  if (sums && (a.workspace == 0 || a.workspace % 16 != 0)) return cudaErrorInvalidValue;
  const index::Reduction r = reduction(a);
  const int rows = sum_rows(a);
  if (sums && r.blocks(rows) > index::kMaxBlocks) return cudaErrorInvalidValue;
  if (sums && tiles(a).groups != 0 && tiles(a).blocks() > index::kMaxBlocks) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  a.counters = a.workspace + 4 * index::workspace(r, rows);
  if (general(a)) {
    start_backward_neurons(a);
  } else if (a.dtype == kFloat32) {
    start_backward_float32(a);
  } else {
    a.dtype == kBFloat16 ? start_backward_bfloat16(a) : start_backward_float16(a);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || !sums) return error;
  const NormArgs n = norm == nullptr ? NormArgs{} : *norm;
  launch(a, lif_add_up, r.blocks(rows), index::kReduceThreads, 0, a, n, r, rows, norm_rows(a));
  return cudaGetLastError();
}

int64_t launches() { return launched; }

Error describe(int error) {
  const auto code = static_cast<cudaError_t>(error);
  return {cudaGetErrorName(code), cudaGetErrorString(code)};
}

}  // namespace cuda
}  // namespace trtkern
