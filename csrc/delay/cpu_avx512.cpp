#include "cpu/avx512.h"
#define TK_DELAY kDelayAvx512
#include "delay/cpu_kernels.h"
