#include "cpu/baseline.h"
#define TK_DELAY kDelayBaseline
#include "delay/cpu_kernels.h"
