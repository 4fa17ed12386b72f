// What the launchers share: which arguments they take, on which device and stream they launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace trtkern {
namespace cuda {

inline cudaStream_t stream(const LifArgs& a) { return reinterpret_cast<cudaStream_t>(a.stream); }

inline bool valid(const LifArgs& a) {
  const bool pool = a.pool_row == 0 || (a.pool_side > 0 && a.pool_row % (2 * a.pool_side) == 0 && a.N % 4 == 0);
  return a.T > 0 && a.N > 0 && a.C > 0 && a.inner > 0 && a.x != 0 && a.dtype >= kFloat32 && a.dtype <= kFloat16 &&
         a.surrogate >= 0 && a.surrogate < kSurrogates && span(a) > 0 && pool &&
         index::blocks(a.N, vec(a)) <= index::kMaxBlocks;
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

}  // namespace cuda
}  // namespace trtkern
