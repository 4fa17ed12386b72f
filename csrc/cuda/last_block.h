// How blocks hand over what they have written to the last of them, without a launch of its own.
#pragma once
#include <cstdint>

namespace trtkern {
namespace cuda {

// Whether this block is the last of `blocks` that come here: it then sees all that they wrote before. Every thread of a
// block comes here. `counter`: uint32 numbers, of which number `at` is 0 before the first of them comes.
__device__ inline bool last_block(uint64_t counter, int64_t at, int64_t blocks) {
  bool last = false;
  __threadfence();  // each thread's own
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(reinterpret_cast<unsigned*>(counter) + at, 1u) + 1 == blocks;
    __threadfence();
  }
  return __syncthreads_or(last);
}

// Sets them to 0 for the kernel that follows on the stream: called by all threads of all blocks.
__device__ inline void clear_counters(uint64_t counters, int64_t count) {
  if (blockIdx.x != 0) return;
  TK_ROLLED
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) reinterpret_cast<unsigned*>(counters)[i] = 0;
}

}  // namespace cuda
}  // namespace trtkern
