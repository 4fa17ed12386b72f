// The code path for vectors of 16 floats on AVX2, so that tests run it without AVX-512.
#define TK_WIDTH 16
#define TK_STREAM 32  // bytes of the widest streaming store
#include "isa.h"

namespace trtkern {
namespace wide {
#include "simd.h"
#include "trtkern_surrogates.h"
#include "lif_math.h"
#include "lif_rows_cpu.h"
#include "lif_forward_cpu.h"
#include "lif_backward_cpu.h"
#include "regularizer_cpu.h"
}  // namespace wide

extern const Kernels kWide = {"wide", wide::lif_forward, wide::lif_backward, wide::regularizer};
}  // namespace trtkern
