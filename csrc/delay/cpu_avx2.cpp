#include "cpu/avx2.h"
#define TK_DELAY kDelayAvx2
#include "delay/cpu_kernels.h"
