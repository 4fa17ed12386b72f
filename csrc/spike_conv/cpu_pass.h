// What a kernel that computes on packed spikes offers: a plan for its forward pass and one for the weight's gradient.
//
// A plan is a few phases that run one after the other, each a number of items. Any thread takes any item of a phase, in
// any order, so an item owns what it writes, and adds up in an order that follows from the sizes alone: the result is
// the same for any number of threads. spike_conv/cpu_launch.cpp runs the items and owns all memory.
#pragma once
#include "spike_conv/args.h"

namespace trtkern {

// The memory of an item, aligned to a page; what it holds before the first phase is not known.
// Forward, and the gradients of the weight and of the image.
enum SpikePass : int { kForwardPass, kWeightGradPass, kInputGradPass };

struct SpikeMemory {
  char* shared;    // of all items; what a phase wrote is there for the next
  char* own;       // of the thread that runs the item; nothing stays in it from one item to the next
  int* nonfinite;  // set to 1 by an item that saw a weight, or a gradient, that is not finite; never read by items
};

struct SpikePlan {
  int64_t shared = 0, own = 0;  // bytes: of all threads together, of each thread
  int64_t phases = 0;           // 0: the kernel does not take these sizes
  int64_t (*items)(const SpikeConvArgs&, int64_t phase) = nullptr;
  void (*run)(const SpikeConvArgs&, int64_t phase, int64_t item, const SpikeMemory&) = nullptr;
};

// A kernel that skips what is 0 cannot know that 0 * NaN is NaN. So every kernel looks at each weight, or each
// gradient, once where it reads it anyway, and says so (nonfinite): the caller then computes the whole in torch.
using SpikePlanner = SpikePlan (*)(const SpikeConvArgs&);

// Of an instruction set; null where it does not have the kernel.
struct SpikeConvKernels {
  SpikePlanner forward[kSpikeKernels];
  SpikePlanner weight_grad[kSpikeKernels];
  SpikePlanner input_grad[kSpikeKernels];  // of the image: its spikes are not looked at
};

extern const SpikeConvKernels kSpikeConvBaseline;
#if defined(__x86_64__)
extern const SpikeConvKernels kSpikeConvAvx2, kSpikeConvAvx512;
extern const SpikePlanner kTilesForward, kTilesWeightGrad, kTilesInputGrad;  // with AMX
#endif

}  // namespace trtkern
