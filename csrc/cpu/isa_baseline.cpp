#include "cpu/baseline.h"
#define TK_KERNELS kBaseline
#define TK_SPIKE_CONV &kSpikeConvBaseline
#include "cpu/isa_kernels.h"
