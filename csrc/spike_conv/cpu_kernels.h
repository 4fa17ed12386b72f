// The kernels that an instruction set has, TK_SPIKE_CONV: all that its translation unit is compiled from.
#pragma once
#include "spike_conv/cpu_lists_forward.h"
#include "spike_conv/cpu_lists_weight_grad.h"
#include "spike_conv/cpu_pass.h"
#if defined(__AVX2__)
#include "spike_conv/cpu_tables_forward.h"
#include "spike_conv/cpu_tables_weight_grad.h"
#endif
#if defined(__AVX512F__)
#include "spike_conv/cpu_registers_forward.h"
#include "spike_conv/cpu_registers_weight_grad.h"
#endif

namespace trtkern {

#if defined(__AVX2__)
constexpr SpikePlanner kTablesForward = TK_ISA::TablesForward::plan;
constexpr SpikePlanner kTablesWeightGrad = TK_ISA::TablesWeightGrad::plan;
#else
constexpr SpikePlanner kTablesForward = nullptr, kTablesWeightGrad = nullptr;
#endif
#if defined(__AVX512F__)
constexpr SpikePlanner kRegistersForward = TK_ISA::RegistersForward::plan;
constexpr SpikePlanner kRegistersWeightGrad = TK_ISA::RegistersWeightGrad::plan;
#else
constexpr SpikePlanner kRegistersForward = nullptr, kRegistersWeightGrad = nullptr;
#endif

extern const SpikeConvKernels TK_SPIKE_CONV = {
    .forward = {TK_ISA::lists_forward, kTablesForward, kRegistersForward, nullptr},
    .weight_grad = {TK_ISA::lists_weight_grad, kTablesWeightGrad, kRegistersWeightGrad, nullptr},
    .input_grad = {},
};

}  // namespace trtkern
