// The plain struct that says what a launch of delays reads, writes and is (delay/fields.h).
#pragma once
#include <cstdint>

namespace trtkern {

struct DelayArgs {
#define TK_FIELD(type, name, value) type name = value
#include "delay/fields.h"
};

// How a launch goes through memory: `neurons` of them together, and a ring of so many of the rows behind; both are
// powers of two, and their product is below 2^31.
struct DelayPlan {
  int64_t neurons = 0, ring = 0;
};

// What the translation unit of an instruction set offers (delay/cpu_kernels.h), on one thread: neurons [begin, end).
// `streaming`: outputs are too large for the caches. sums: double [N], what each neuron adds to the gradient of its
// delay, or null.
struct DelayKernels {
  void (*forward)(const DelayArgs&, const DelayPlan&, int64_t begin, int64_t end, float* scratch, bool streaming);
  void (*backward)(const DelayArgs&, const DelayPlan&, int64_t begin, int64_t end, float* scratch, bool streaming,
                   double* sums);
};

extern const DelayKernels kDelayBaseline, kDelayAvx2, kDelayAvx512, kDelayWide;  // those that are built

}  // namespace trtkern
