// What the launchers share: which arguments they take, on which device and stream they launch.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/launch.h"

namespace trtkern {
namespace cuda {

// Launches since the extension was loaded, on any thread.
inline std::atomic<int64_t> launched{0};

// The one place that launches a kernel: on the stream of the arguments of a pass, or of what stands between passes.
template <class Args, class... Parameters, class... Given>
void launch(const Args& on, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
            const Given&... given) {
  ++launched;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, reinterpret_cast<cudaStream_t>(on.stream)>>>(given...);
}

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
