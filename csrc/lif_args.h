// The one plain struct that crosses from Python to the LIF kernels, CPU and CUDA alike: addresses, sizes, scalars.
// trtkern/ops/_check.py has seen every tensor behind an address before it is taken; nothing here can check one.
#pragma once
#include <cstdint>

namespace trtkern {

constexpr int kChunk = 16;  // steps of h kept at once by a backward pass; trtkern/ops/lif.py has the same number

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Reset : int { kHard = 0, kSoft = 1, kNone = 2 };

// Rows of `params`, of `scalars` and of the parameter gradients.
enum Param : int { kDecay = 0, kGain = 1, kBias = 2, kResetAmount = 3, kThreshold = 4, kVReset = 5, kParams = 6 };

// Shapes: [T, N] in x's dtype for x, s, v, gs, gv, gx; [N] float32 for v0, v_final, gv_final, gv0;
// [6, C] float32 for params; [edges, N] float32 for edges, row j = v after step (j + 1) * kChunk - 1.
// An address of 0 means: absent (v0: zeros; gradients: zeros; outputs: not wanted).
// Channel of neuron n: (n / inner) % C.
struct LifArgs {
  uint64_t x = 0, v0 = 0, params = 0;
  uint64_t s = 0, v = 0, v_final = 0, edges = 0;  // forward writes
  uint64_t flag = 0;                              // and this: int32, set to 1 if any h is not finite
  uint64_t gs = 0, gv = 0, gv_final = 0;          // gradients that come in
  uint64_t gx = 0, gv0 = 0, gparams = 0;          // backward writes; gparams: see the launcher
  uint64_t workspace = 0;                         // CUDA, with gparams: scratch (lif_cuda.h)
  int64_t T = 0, N = 0, C = 1, inner = 1;
  float scalars[kParams] = {0, 0, 0, 0, 0, 0};  // used when params is 0
  float alpha = 1.0f;
  int dtype = kFloat32, reset = kHard, detach = 0, surrogate = 0;
  int threads = 1;      // CPU
  int device = 0;       // CUDA
  uint64_t stream = 0;  // CUDA
};

}  // namespace trtkern
