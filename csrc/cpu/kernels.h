// What an instruction set's translation unit offers: plain functions over a range, on one thread. cpu/launch.cpp picks
// the set, splits the work and owns all memory.
#pragma once
#include <cstdint>

#include "delay/args.h"
#include "lif/args.h"
#include "spike_conv/cpu_pass.h"

namespace trtkern {

// Neurons that go through the steps together. Their state stays in L1, the h of a chunk in L2.
constexpr int64_t kForwardBlock = 4096;
constexpr int64_t kBackwardBlock = 2048;
constexpr int64_t kMixedBlock = 1024;  // ... where neighbours differ in their parameters
constexpr int64_t kLongRun = 512;      // neighbours of one channel that make blocks of their own
constexpr int64_t kPad = 16;           // floats beyond a row that a vector may read and write
constexpr int64_t kParameterStride = kForwardBlock + kPad;

// What a backward pass adds up: the gradients of the parameters, then the sums of the norm.
constexpr int kSums = kMostParams + 2;

// Floats of scratch memory that one thread needs, 64-byte aligned.
constexpr int64_t kConverted = 5 * 3 * (kForwardBlock + kPad) / 2 + 512;  // rows of a half type, in both
constexpr int64_t kForwardScratch = 4 * kForwardBlock + (kMostParams + kAffine) * kParameterStride + kConverted + 512;
constexpr int64_t kBackwardScratch = (kChunk + 6 + kSums + 2) * (kBackwardBlock + kPad) +
                                     (kMostParams + 2 * kAffine) * kParameterStride + kConverted + 512;

// Statistics of short channels: columns, C * inner of them, and rows that go through them together.
constexpr int64_t kColumnTile = 256, kRowTile = 32;
constexpr int64_t kColumnScratch = 3 * kColumnTile;

// The regulariser's constants, step by step (cpu/regularizer.h; cpu/launch.cpp works them out in double).
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
  // sums: double [kSums, C], added to, or null.
  void (*lif_backward)(const LifArgs&, int64_t begin, int64_t end, float* scratch, bool streaming, double* sums);
  // Elements [begin, end) of x as one row of T * N: count, mean and sum of squared deviations, [3, C], merged into.
  void (*run_moments)(const LifArgs&, int64_t begin, int64_t end, double* moments);
  // Rows [r0, r1) and columns [k0, k1) of x as [T * N / K, K], K = C * inner: their means [K] and sums of squared
  // deviations [K], written.
  void (*column_moments)(const LifArgs&, int64_t r0, int64_t r1, int64_t k0, int64_t k1, float* scratch,
                         double* moments);
  // gx from gs, the gradient of the input current; elementwise.
  void (*input_grad)(const LifArgs&, int64_t begin, int64_t end, float* scratch, bool streaming);
  void (*spikes_pack)(const LifArgs&, int64_t begin, int64_t end, float* scratch, bool streaming);
  void (*spikes_unpack)(const LifArgs&, int64_t first, int64_t begin, int64_t end, float* scratch, bool streaming);
  // At most kPiece parameters: their sum of w^2 sum_t q[t]; g may be null.
  double (*regularizer)(const RegularizerArgs&, const float* w, float* g, int64_t n, bool streaming);
  const DelayKernels* delay;
  // What computes on packed spikes; null: nothing does.
  const SpikeConvKernels* spike_conv;
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvx2;
#endif
#if defined(TRTKERN_CPU_WIDE)
extern const Kernels kWide;
#endif

// Of the instruction set in use (cpu/launch.cpp).
const Kernels& cpu_kernels();

}  // namespace trtkern
