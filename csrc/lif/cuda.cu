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
// own words of shared memory (lif/cuda_slots.h); then, where there are sums, lif_reduce and lif_finish here add up what
// the threads left in the workspace (lif/cuda_sums.h). norm/cuda.cu has the other two launchers. tests/cuda_threads.cpp
// runs all of it but the launches on the CPU.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/dialect.h"

#include "lif/cuda_body.h"

#include "cuda/device.h"

namespace trtkern {
namespace cuda {

// A block adds up one segment of one row: 8 threads a lane in order, then, where the lanes share a channel, the lanes.
__global__ void __launch_bounds__(index::kReduceThreads) lif_reduce(index::Reduction r, int rows, uint64_t workspace) {
  constexpr int kLanes = index::kReduceLanes;
  __shared__ float sums[index::kReduceThreads];
  sums[threadIdx.x] = segment_sum(r, rows, workspace, blockIdx.x, threadIdx.x).value;
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
  float* segments = reinterpret_cast<float*>(workspace) + rows * r.M;
  segments[index::offset(place.segment * rows + place.row, channel, r.C)] = sum;
}

__global__ void __launch_bounds__(index::kThreads)
    lif_finish(const __grid_constant__ LifArgs a, index::Reduction r, int rows, int norm) {
  const int64_t i = index::first_neuron(blockIdx.x, threadIdx.x, 1);
  if (i < rows * r.C) finish_sum(a, r, rows, norm, i);
}

namespace {

void start_reduction(const LifArgs& a) {
  const index::Reduction r = reduction(a);
  const int rows = sum_rows(a);
  const unsigned finish = static_cast<unsigned>(index::blocks(rows * r.C, 1));
  lif_reduce<<<static_cast<unsigned>(r.blocks(rows)), index::kReduceThreads, 0, stream(a)>>>(r, rows, a.workspace);
  lif_finish<<<finish, index::kThreads, 0, stream(a)>>>(a, r, rows, norm_rows(a));
}

}  // namespace

int64_t workspace_floats(const LifArgs& a) { return index::workspace(reduction(a), sum_rows(a)); }

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

int lif_backward(const LifArgs& a) {
  if (!valid(a) || (a.T > span(a) && a.edges == 0) || (a.coef != 0 && a.gx == 0)) return cudaErrorInvalidValue;
  const bool sums = (a.gparams | a.norm_sums) != 0;
  if ((a.gx | a.gv0) == 0 && !sums) return cudaErrorInvalidValue;
  if (sums && (a.workspace == 0 || a.workspace % 16 != 0)) return cudaErrorInvalidValue;
  if (sums && reduction(a).blocks(sum_rows(a)) > index::kMaxBlocks) return cudaErrorInvalidValue;
  if (sums && tiles(a).groups != 0 && tiles(a).blocks() > index::kMaxBlocks) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (general(a)) {
    start_backward_neurons(a);
  } else if (a.dtype == kFloat32) {
    start_backward_float32(a);
  } else {
    a.dtype == kBFloat16 ? start_backward_bfloat16(a) : start_backward_float16(a);
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && sums) start_reduction(a);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

Error describe(int error) {
  const auto code = static_cast<cudaError_t>(error);
  return {cudaGetErrorName(code), cudaGetErrorString(code)};
}

}  // namespace cuda
}  // namespace trtkern
