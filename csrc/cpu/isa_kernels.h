// Everything of an instruction set, in its namespace TK_ISA; TK_KERNELS is the name of its table.
//
// No include guard: each translation unit includes it once, after cpu/isa.h.
#define TK_TEXT_(text) #text
#define TK_TEXT(text) TK_TEXT_(text)

namespace trtkern {
namespace TK_ISA {
#include "cpu/simd.h"
#include "trtkern_surrogates.h"
#include "lif/math.h"
#include "cpu/rows.h"
#include "spikes/cpu_pool.h"
#include "spikes/cpu.h"
#include "lif/cpu_forward.h"
#include "lif/cpu_backward.h"
#include "norm/cpu.h"
#include "cpu/regularizer.h"
}  // namespace TK_ISA

extern const Kernels TK_KERNELS = {
    TK_TEXT(TK_ISA),    TK_ISA::lif_forward, TK_ISA::lif_backward,  TK_ISA::run_moments, TK_ISA::column_moments,
    TK_ISA::input_grad, TK_ISA::spikes_pack, TK_ISA::spikes_unpack, TK_ISA::regularizer,
};
}  // namespace trtkern
