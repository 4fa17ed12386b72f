// The kernels that an instruction set has, TK_RECURRENT: all that its translation unit is compiled from. Its namespace
// is its own, so that the neurons' rows in it may be those that do anything and no others: short to compile.
#pragma once
#define TK_GENERAL_ROWS
#include "recurrent/cpu_backward.h"
#include "recurrent/cpu_forward.h"

namespace trtkern::TK_ISA {

constexpr uint64_t kScratchAlign = 4096;

// Bytes of scratch memory for a group.
inline int64_t recurrent_own(const RecurrentArgs& a, bool back, int64_t units) {
  float* const from = (float*)kScratchAlign;  // nothing is read or written
  const float* const end =
      back ? RecurrentBackwardMemory(a, units, from).end : RecurrentForwardMemory(a, units, from).end;
  return (int64_t)((uint64_t)end - kScratchAlign);
}

}  // namespace trtkern::TK_ISA

namespace trtkern {

extern const RecurrentKernels TK_RECURRENT = {
    TK_ISA::recurrent_own, TK_ISA::recurrent_forward, TK_ISA::recurrent_backward, TK_ISA::kVectorsProduct, {}};

}  // namespace trtkern
