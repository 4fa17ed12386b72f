#include "cpu/avx512.h"
#define TK_SPIKE_CONV kSpikeConvAvx512
#include "spike_conv/cpu_kernels.h"
