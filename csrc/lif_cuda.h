// The CUDA launchers of LIF. No CUDA header is needed to call them: a result is a cudaError_t as an int, 0 is success.
// They launch on a.stream of a.device, leave the current device as it was, and never wait.
#pragma once
#include <cstdint>

#include "lif_args.h"

namespace trtkern {
namespace cuda {

// Needs edges if T exceeds a chunk and a backward pass will follow.
int lif_forward(const LifArgs& a);

// Needs edges if T exceeds a chunk; with gparams also `workspace`: workspace_floats(a) float32 numbers of scratch, on a
// multiple of 16 bytes.
int lif_backward(const LifArgs& a);

int64_t workspace_floats(const LifArgs& a);

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

}  // namespace cuda
}  // namespace trtkern
