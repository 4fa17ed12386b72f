// The scratch memory that either direction takes of neurons that feed each other.
#pragma once
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
