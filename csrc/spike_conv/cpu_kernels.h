// The kernels that an instruction set has, TK_SPIKE_CONV: all that its translation unit is compiled from.
#pragma once
#include "spike_conv/cpu_pass.h"

namespace trtkern {

extern const SpikeConvKernels TK_SPIKE_CONV = {
    .forward = {nullptr, nullptr, nullptr, nullptr},
    .weight_grad = {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace trtkern
