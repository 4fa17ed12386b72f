// AVX-512: vectors of 16 floats.
#define TK_WIDTH 16
#define TK_STREAM 64  // bytes of the widest streaming store
#include "isa.h"

namespace trtkern {
namespace avx512 {
#include "simd.h"
#include "trtkern_surrogates.h"
#include "lif_math.h"
#include "lif_rows_cpu.h"
#include "lif_forward_cpu.h"
#include "lif_backward_cpu.h"
#include "regularizer_cpu.h"
}  // namespace avx512

extern const Kernels kAvx512 = {"avx512", avx512::lif_forward, avx512::lif_backward, avx512::regularizer};
}  // namespace trtkern
