// Everything of an instruction set, in its namespace TK_ISA; TK_KERNELS is the name of its table.
//
// No include guard: each translation unit includes it once, after isa.h.
#define TK_TEXT_(text) #text
#define TK_TEXT(text) TK_TEXT_(text)

namespace trtkern {
namespace TK_ISA {
#include "simd.h"
#include "trtkern_surrogates.h"
#include "lif_math.h"
#include "lif_rows_cpu.h"
#include "pool_cpu.h"
#include "spikes_cpu.h"
#include "lif_forward_cpu.h"
#include "lif_recompute_cpu.h"
#include "lif_sums_cpu.h"
#include "lif_backward_row_cpu.h"
#include "lif_backward_cpu.h"
#include "batch_norm_cpu.h"
#include "regularizer_cpu.h"
}  // namespace TK_ISA

extern const Kernels TK_KERNELS = {
    TK_TEXT(TK_ISA),    TK_ISA::lif_forward, TK_ISA::lif_backward,  TK_ISA::run_moments, TK_ISA::column_moments,
    TK_ISA::input_grad, TK_ISA::spikes_pack, TK_ISA::spikes_unpack, TK_ISA::regularizer,
};
}  // namespace trtkern
