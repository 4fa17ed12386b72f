// The table of an instruction set's kernels, TK_KERNELS: all that its translation unit is compiled from but for what
// computes on packed spikes, TK_SPIKE_CONV, and delays, TK_DELAY, which have units of their own (cpu_kernels.h of
// spike_conv and of delay).
#pragma once
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "lif/cpu_forward.h"
#include "lif/cpu_backward.h"
#include "norm/cpu.h"
#include "spikes/cpu.h"
#include "cpu/regularizer.h"

#define TK_TEXT_(text) #text
#define TK_TEXT(text) TK_TEXT_(text)

namespace trtkern {

extern const Kernels TK_KERNELS = {
    .name = TK_TEXT(TK_ISA),
    .lif_forward = TK_ISA::lif_forward,
    .lif_backward = TK_ISA::lif_backward,
    .run_moments = TK_ISA::run_moments,
    .column_moments = TK_ISA::column_moments,
    .input_grad = TK_ISA::input_grad,
    .spikes_pack = TK_ISA::spikes_pack,
    .spikes_unpack = TK_ISA::spikes_unpack,
    .regularizer = TK_ISA::regularizer,
    .delay = TK_DELAY,
    .spike_conv = TK_SPIKE_CONV,
};

}  // namespace trtkern
