// The launchers: which class of kernel runs, on which device and stream, and the reduction of parameter gradients.
#include <cuda_runtime.h>

#include "lif_cuda.h"
#include "lif_cuda_dialect.h"

#include "lif_cuda_body.h"

namespace trtkern {
namespace cuda {

// A block adds up one segment of one row: 8 threads a lane in order, then, where the lanes share a channel, the lanes.
__global__ void __launch_bounds__(index::kReduceThreads) lif_reduce(index::Reduction r, uint64_t workspace) {
  constexpr int kLanes = index::kReduceLanes;
  __shared__ float sums[index::kReduceThreads];
  sums[threadIdx.x] = segment_sum(r, workspace, blockIdx.x, threadIdx.x).value;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < index::kReduceThreads; i += kLanes) sum += sums[i];
  if (!r.narrow()) {
    for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x != 0) return;
  }
  const index::Reduction::Place place = r.place(blockIdx.x, kSums);
  const int64_t channel = r.channel(place.tile, threadIdx.x);
  if (channel >= r.C) return;
  float* segments = reinterpret_cast<float*>(workspace) + kSums * r.M;
  segments[index::offset(place.segment * kSums + place.row, channel, r.C)] = sum;
}

__global__ void __launch_bounds__(index::kThreads) lif_finish(const __grid_constant__ LifArgs a, index::Reduction r) {
  const int64_t i = index::first_neuron(blockIdx.x, threadIdx.x, 1);
  if (i < kSums * r.C) finish_sum(a, r, i);
}

namespace {

bool valid(const LifArgs& a) {
  return a.T > 0 && a.N > 0 && a.C > 0 && a.inner > 0 && a.x != 0 && a.dtype >= kFloat32 && a.dtype <= kFloat16 &&
         a.surrogate >= 0 && a.surrogate < kSurrogates && index::blocks(a.N, vec(a)) <= index::kMaxBlocks;
}

// The tensor's device for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && device == before_) before_ = -1;
    if (before_ >= 0) error_ = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  cudaError_t error_;
};

void start_reduction(const LifArgs& a) {
  const index::Reduction r = reduction(a);
  const auto stream = reinterpret_cast<cudaStream_t>(a.stream);
  const unsigned finish = static_cast<unsigned>(index::blocks(kSums * r.C, 1));
  lif_reduce<<<static_cast<unsigned>(r.blocks(kSums)), index::kReduceThreads, 0, stream>>>(r, a.workspace);
  lif_finish<<<finish, index::kThreads, 0, stream>>>(a, r);
}

}  // namespace

int64_t workspace_floats(const LifArgs& a) { return index::workspace(reduction(a), kSums); }

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
  if (!valid(a) || a.gx == 0 || (a.T > kChunk && a.edges == 0)) return cudaErrorInvalidValue;
  const bool learn = a.gparams != 0;
  if (learn && (a.workspace == 0 || a.workspace % 16 != 0)) return cudaErrorInvalidValue;
  if (learn && reduction(a).blocks(kSums) > index::kMaxBlocks) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (a.dtype == kFloat32) start_backward_float32(a);
  if (a.dtype == kBFloat16) start_backward_bfloat16(a);
  if (a.dtype == kFloat16) start_backward_float16(a);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && learn) start_reduction(a);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

Error describe(int error) {
  const auto code = static_cast<cudaError_t>(error);
  return {cudaGetErrorName(code), cudaGetErrorString(code)};
}

}  // namespace cuda
}  // namespace trtkern
