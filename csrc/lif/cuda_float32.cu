#include "lif/cuda_kernels.h"

namespace trtkern {
namespace cuda {

void start_forward_float32(const LifArgs& a) { start_forward<Float32>(a); }
void start_backward_float32(const LifArgs& a) { start_backward<Float32>(a); }

}  // namespace cuda
}  // namespace trtkern
