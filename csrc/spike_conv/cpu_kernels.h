// The kernels that an instruction set has, TK_SPIKE_CONV: all that its translation unit is compiled from.
#pragma once
#include "spike_conv/cpu_lists_forward.h"
#include "spike_conv/cpu_lists_weight_grad.h"
#include "spike_conv/cpu_pass.h"

namespace trtkern {

extern const SpikeConvKernels TK_SPIKE_CONV = {
    .forward = {TK_ISA::lists_forward, nullptr, nullptr, nullptr},
    .weight_grad = {TK_ISA::lists_weight_grad, nullptr, nullptr, nullptr},
};

}  // namespace trtkern
