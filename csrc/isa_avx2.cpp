// AVX2: vectors of 8 floats.
#define TK_WIDTH 8
#define TK_STREAM 32  // bytes of the widest streaming store
#include "isa.h"

namespace trtkern {
namespace avx2 {
#include "simd.h"
#include "trtkern_surrogates.h"
#include "lif_math.h"
#include "lif_rows_cpu.h"
#include "lif_forward_cpu.h"
#include "lif_backward_cpu.h"
#include "regularizer_cpu.h"
}  // namespace avx2

extern const Kernels kAvx2 = {"avx2", avx2::lif_forward, avx2::lif_backward, avx2::regularizer};
}  // namespace trtkern
