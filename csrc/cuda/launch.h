// The CUDA launchers of LIF and of BatchNorm + LIF. No CUDA header is needed to call them: a result is a cudaError_t as
// an int, 0 is success. They launch on a.stream of a.device, leave the current device as it was, and never wait.
#pragma once
#include <cstdint>

#include "norm/args.h"

namespace trtkern {
namespace cuda {

// Needs edges if T exceeds a chunk (kChunk / S steps) and a backward pass will follow.
int lif_forward(const LifArgs& a);

// Needs edges if T exceeds a chunk; with gparams or norm_sums also `workspace`: workspace_floats(a) float32 numbers of
// scratch, on a multiple of 16 bytes. With `norm`, a.norm_sums are finished too: norm->coef, gweight and gbias.
int lif_backward(const LifArgs& a, const NormArgs* norm = nullptr);

int64_t workspace_floats(const LifArgs& a);

// Bytes of shared memory that a block of the pass is launched with.
int lif_shared_bytes(const LifArgs& a, bool backward);

// Of x [T, N]: stats, double [2, C], is the mean of each channel and the sum of squared deviations from it. Needs
// `workspace`: statistics_workspace_floats(a) numbers.
int batch_norm_lif_statistics(const LifArgs& a, uint64_t stats);

// The same statistics finished: norm.moments, norm.affine, and the running statistics (norm/fields.h).
int batch_norm_lif_affine(const LifArgs& a, const NormArgs& norm);

int64_t statistics_workspace_floats(const LifArgs& a);

// From statistics that are known, norm.mean and norm.spread; and from sums that are known, norm.sums: on norm.stream.
int batch_norm_lif_finish(const NormArgs& norm);
int batch_norm_lif_coefficients(const NormArgs& norm);

// gx = coef[0] * gs + coef[1] * (x - center) + coef[2], gs being the gradient of the input current.
int batch_norm_lif_input_grad(const LifArgs& a);

// Kernels launched since the extension was loaded.
int64_t launches();

struct Error {
  const char *name, *text;
};
Error describe(int error);

// One set of kernels an element type, each in a file of its own.
void start_forward_float32(const LifArgs& a);
void start_forward_bfloat16(const LifArgs& a);
void start_forward_float16(const LifArgs& a);
void start_backward_float32(const LifArgs& a);
void start_backward_bfloat16(const LifArgs& a);
void start_backward_float16(const LifArgs& a);
// The neurons that are not LIF, of any element type.
void start_forward_neurons(const LifArgs& a);
void start_backward_neurons(const LifArgs& a);

}  // namespace cuda
}  // namespace trtkern
