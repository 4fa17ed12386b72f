#include "cpu/avx2.h"
#define TK_SPIKE_CONV kSpikeConvAvx2
#include "spike_conv/cpu_kernels.h"
