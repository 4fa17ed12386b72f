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

struct LifArgs {
#define TK_FIELD(type, name, value) type name = value
#define TK_FIELDS(type, name, count) type name[count] = {}
#include "lif/fields.h"
};

}  // namespace trtkern
