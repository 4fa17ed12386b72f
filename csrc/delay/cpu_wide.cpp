#include "cpu/wide.h"
#define TK_DELAY kDelayWide
#include "delay/cpu_kernels.h"
