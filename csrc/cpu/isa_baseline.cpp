#include "cpu/baseline.h"
#define TK_KERNELS kBaseline
#define TK_SPIKE_CONV &kSpikeConvBaseline
#define TK_DELAY &kDelayBaseline
#include "cpu/isa_kernels.h"
