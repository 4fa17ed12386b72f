#include "cpu/wide.h"
#define TK_KERNELS kWide
#define TK_SPIKE_CONV nullptr
#define TK_DELAY &kDelayWide
#include "cpu/isa_kernels.h"
