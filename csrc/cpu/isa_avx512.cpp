#include "cpu/avx512.h"
#define TK_KERNELS kAvx512
#define TK_SPIKE_CONV &kSpikeConvAvx512
#define TK_DELAY &kDelayAvx512
#include "cpu/isa_kernels.h"
