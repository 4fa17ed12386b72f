#include "cpu/baseline.h"
#define TK_SPIKE_CONV kSpikeConvBaseline
#include "spike_conv/cpu_kernels.h"
