// The launchers of what computes on packed spikes.
#pragma once
#include "spike_conv/cpu_pass.h"

namespace trtkern {

// Whether the kernel, with the instruction set in use, takes these sizes.
bool cpu_spike_conv_takes(const SpikeConvArgs& args, SpikePass pass);
// Write y, gweight or gx. False: something that was read is not finite, and what was written means nothing.
bool cpu_spike_conv_forward(const SpikeConvArgs& args);
bool cpu_spike_conv_weight_grad(const SpikeConvArgs& args);
bool cpu_spike_conv_input_grad(const SpikeConvArgs& args);
// How many of these bits are 1.
int64_t cpu_spikes_count(uint64_t words, int64_t bytes, int threads);
// Whether n floats are 0 or 1, all of them.
bool cpu_all_spikes(uint64_t x, int64_t n, int threads);

}  // namespace trtkern
