// Any processor: vectors of 4 floats, which SSE2 and NEON have.
#define TK_WIDTH 4
#define TK_STREAM 16  // bytes of the widest streaming store
#include "isa.h"

namespace trtkern {
namespace baseline {
#include "simd.h"
#include "trtkern_surrogates.h"
#include "lif_math.h"
#include "lif_rows_cpu.h"
#include "lif_forward_cpu.h"
#include "lif_backward_cpu.h"
#include "regularizer_cpu.h"
}  // namespace baseline

extern const Kernels kBaseline = {"baseline", baseline::lif_forward, baseline::lif_backward, baseline::regularizer};
}  // namespace trtkern
