// The kernels that an instruction set has, TK_RECURRENT: all that its translation unit is compiled from. Its namespace
// is its own, so that the neurons' rows in it may be those that do anything and no others: short to compile.
#pragma once
#define TK_GENERAL_ROWS
#include "recurrent/cpu_scratch.h"

namespace trtkern {

extern const RecurrentKernels TK_RECURRENT = {
    TK_ISA::recurrent_own, TK_ISA::recurrent_forward, TK_ISA::recurrent_backward, TK_ISA::kVectorsProduct, {}};

}  // namespace trtkern
