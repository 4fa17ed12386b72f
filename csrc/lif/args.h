// The one plain struct that crosses from Python to the LIF kernels, CPU and CUDA alike: addresses, sizes, scalars.
// trtkern/ops/checks.py has seen every tensor behind an address before it is taken; nothing here can check one.
#pragma once
#include <cstdint>

namespace trtkern {

constexpr int kChunk = 16;  // numbers of traces kept at once by a backward pass; trtkern/spec.py has the same number

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Reset : int { kHard = 0, kSoft = 1, kNone = 2 };

constexpr int kMostParams = 10;  // of any neuron (trtkern/neurons.py)

// Rows of `params`, of `scalars` and of the parameter gradients, of a LIF neuron.
enum Param : int { kDecay = 0, kGain = 1, kBias = 2, kResetAmount = 3, kThreshold = 4, kVReset = 5, kParams = 6 };

// Rows of `affine` and of `coef`.
enum Affine : int { kCenter = 0, kScale = 1, kShift = 2, kAffine = 3 };

// Shapes: [T, N] in x's dtype for x, residual, s, v, gs, gv, gx; [S, N] float32 for v0, v_final, gv_final, gv0, S being
// the numbers of a neuron's state; [P, C] float32 for params, P being its parameters; [3, C] float32 for affine and
// coef; [edges, S, N] float32 for edges, row j = the state after (j + 1) * kChunk / S steps; [ceil(T / 8), N] bytes for packed, bit t % 8 of row t / 8 being the spike of step t.
// An address of 0 means: absent (v0, residual: zeros; gradients: zeros; outputs: not wanted).
// Channel of neuron n: (n / inner) % C. With affine, params is absent or has the same C.
//
// With affine the input current is scale * (x - center) + shift (+ residual), in float32: fma(scale, x - center,
// shift), then the residual added. With coef, what is written as gx is coef[0] * gx + coef[1] * (x - center) + coef[2].
//
// With pool_row, s and gs are [T, N / 4]: averages of 2 x 2 neurons, and their gradients. Neurons are rows of pool_row,
// rows 2k and 2k + 1 make one row of pool_row / 2; pool_inner neurons lie side by side for each place in a row (1, or
// the number of channels where they come last), places 2j and 2j + 1 make one.
struct LifArgs {
  uint64_t x = 0, v0 = 0, params = 0;
  uint64_t affine = 0, residual = 0;
  uint64_t s = 0, v = 0, v_final = 0, edges = 0, packed = 0;  // forward writes
  uint64_t flag = 0;  // and this: int32, set to 1 if any h, or any v as it is written, is not finite
  uint64_t gs = 0, gv = 0, gv_final = 0, coef = 0;  // gradients that come in
  uint64_t gx = 0, gv0 = 0, gparams = 0;            // backward writes; gparams: see the launcher
  uint64_t norm_sums = 0;  // and this: double [2, C], sums over steps and neurons of gx and of gx * (x - center)
  uint64_t workspace = 0;  // CUDA, with sums: scratch (cuda/launch.h)
  int64_t T = 0, N = 0, C = 1, inner = 1;
  int64_t x_stride = 0;  // elements from one step of x to the next: N, or 0 where x is the same at every step
  int64_t pool_row = 0, pool_inner = 1;
  float scalars[kMostParams] = {};  // used when params is 0
  float alpha = 1.0f;
  int dtype = kFloat32, reset = kHard, detach = 0, surrogate = 0;
  int neuron = 0, P = kParams;  // its number in trtkern/neurons.py, and how many parameters it has
  int before = 0;       // v, and the v that gv is the gradient of, is h: the potential before the reset
  int threads = 1;      // CPU
  int device = 0;       // CUDA
  int processors = 0;   // CUDA: the device's multiprocessors, which N fills or not; 0: not known
  uint64_t stream = 0;  // CUDA
};

}  // namespace trtkern
