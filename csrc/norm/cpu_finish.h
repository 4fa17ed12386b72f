// The work between the passes of a BatchNorm + neuron on the CPU (norm/finish.h), over all channels.
#pragma once
#include "norm/args.h"

namespace trtkern {

// moments, affine, coef where asked for, and the running statistics, from n.mean and n.spread.
void cpu_finish_forward(const NormArgs& n);
// coef, gweight and gbias, each unless its address is 0, from n.sums.
void cpu_finish_backward(const NormArgs& n);

}  // namespace trtkern
