#include "cpu/wide.h"
#define TK_KERNELS kWide
#define TK_SPIKE_CONV nullptr
#include "cpu/isa_kernels.h"
