#include "lif/cuda_kernels.h"

namespace trtkern {
namespace cuda {

void start_forward_bfloat16(const LifArgs& a) { start_forward<BFloat16>(a); }
void start_backward_bfloat16(const LifArgs& a) { start_backward<BFloat16>(a); }

}  // namespace cuda
}  // namespace trtkern
