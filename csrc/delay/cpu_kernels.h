// The table of an instruction set's delays, TK_DELAY: all that its translation unit is compiled from.
#pragma once
#include "delay/cpu.h"

namespace trtkern {

extern const DelayKernels TK_DELAY = {.forward = TK_ISA::delay_forward, .backward = TK_ISA::delay_backward};

}  // namespace trtkern
