#include "cpu/avx2.h"
#define TK_KERNELS kAvx2
#define TK_SPIKE_CONV &kSpikeConvAvx2
#define TK_DELAY &kDelayAvx2
#include "cpu/isa_kernels.h"
