#include "lif/cuda_kernels.h"

namespace trtkern {
namespace cuda {

void start_forward_float16(const LifArgs& a) { start_forward<Float16>(a); }
void start_backward_float16(const LifArgs& a) { start_backward<Float16>(a); }

}  // namespace cuda
}  // namespace trtkern
