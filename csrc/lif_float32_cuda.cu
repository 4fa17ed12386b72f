#include "lif_cuda_kernels.h"

namespace trtkern {
namespace cuda {

void start_forward_float32(const LifArgs& a, int vec) { start_forward_any<Float32>(a, vec); }
void start_backward_float32(const LifArgs& a, int vec) { start_backward_any<Float32>(a, vec); }

}  // namespace cuda
}  // namespace trtkern
