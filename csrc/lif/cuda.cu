// The launchers: which class of kernel runs, on which device and stream, and the reduction of sums.
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
  if (a.dtype == kFloat32) start_forward_float32(a);
  if (a.dtype == kBFloat16) start_forward_bfloat16(a);
  if (a.dtype == kFloat16) start_forward_float16(a);
  return cudaGetLastError();
}

int lif_backward(const LifArgs& a) {
  if (!valid(a) || (a.T > kChunk && a.edges == 0) || (a.coef != 0 && a.gx == 0)) return cudaErrorInvalidValue;
  const bool sums = (a.gparams | a.norm_sums) != 0;
  if ((a.gx | a.gv0) == 0 && !sums) return cudaErrorInvalidValue;
  if (sums && (a.workspace == 0 || a.workspace % 16 != 0)) return cudaErrorInvalidValue;
  if (sums && reduction(a).blocks(sum_rows(a)) > index::kMaxBlocks) return cudaErrorInvalidValue;
  if (sums && tiles(a).groups != 0 && tiles(a).blocks() > index::kMaxBlocks) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (a.dtype == kFloat32) start_backward_float32(a);
  if (a.dtype == kBFloat16) start_backward_bfloat16(a);
  if (a.dtype == kFloat16) start_backward_float16(a);
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
