// The plain struct that says what a convolution over packed spikes reads, writes and is (spike_conv/fields.h).
#pragma once
#include <cstdint>

namespace trtkern {

struct SpikeConvArgs {
#define TK_FIELD(type, name, value) type name = value
#include "spike_conv/fields.h"
};

// The ways to compute it; docs/kernels.md says what each of them does.
enum SpikeKernel : int { kLists, kTables, kRegisters, kTiles, kSpikeKernels };
constexpr const char* kSpikeKernelNames[kSpikeKernels] = {"lists", "tables", "registers", "tiles"};

}  // namespace trtkern
