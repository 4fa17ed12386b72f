// What an instruction set's translation unit offers: plain functions over a range, on one thread. launch_cpu.cpp picks
// the set, splits the work and owns all memory.
#pragma once
#include <cstdint>

#include "lif_args.h"

namespace trtkern {

// Neurons that go through the steps together. Their state stays in L1, the h of a chunk in L2.
constexpr int64_t kForwardBlock = 4096;
constexpr int64_t kBackwardBlock = 2048;
constexpr int64_t kMixedBlock = 1024;  // ... where neighbours differ in their parameters
constexpr int64_t kLongRun = 512;      // neighbours of one channel that make blocks of their own
constexpr int64_t kPad = 16;           // floats beyond a row that a vector may read and write
constexpr int64_t kParameterStride = kForwardBlock + kPad;

// Floats of scratch memory that one thread needs, 64-byte aligned.
constexpr int64_t kForwardScratch = kForwardBlock + kPad + kParams * kParameterStride;
constexpr int64_t kBackwardScratch = (kChunk + 3 + kParams) * (kBackwardBlock + kPad) + kParams * kParameterStride;

// The regulariser's constants, step by step (regularizer_cpu.h; launch_cpu.cpp works them out in double).
constexpr int kMaxFixedSteps = 10;  // T up to this is a template constant
constexpr int64_t kPiece = 16384;   // parameters that make one term of the value
struct RegularizerArgs {
  const float *slope = nullptr, *offset = nullptr, *root = nullptr;  // d = slope * (|w| * shift) + offset; 1 / sqrt(k)
  float shift = 1.0f;
  float factor = 0.0f;  // of the gradient: scale * lam / T
  int64_t T = 0;
  bool accumulate = false;  // add to the gradient that is there
};

struct Kernels {
  const char* name;
  // Neurons [begin, end). `streaming`: outputs are too large for the caches.
  void (*lif_forward)(const LifArgs&, int64_t begin, int64_t end, float* scratch, bool streaming);
  // sums: double [kParams, C], added to, or null.
  void (*lif_backward)(const LifArgs&, int64_t begin, int64_t end, float* scratch, bool streaming, double* sums);
  // At most kPiece parameters: their sum of w^2 sum_t q[t]; g may be null.
  double (*regularizer)(const RegularizerArgs&, const float* w, float* g, int64_t n, bool streaming);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvx2;
#endif
#if defined(TRTKERN_CPU_WIDE)
extern const Kernels kWide;
#endif

}  // namespace trtkern
