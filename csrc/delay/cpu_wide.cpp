// As cpu/isa_wide.cpp: vectors of 16 floats on AVX2, for tests.
#define TK_WIDTH 16
#define TK_STREAM 32  // bytes of the widest streaming store
#define TK_ISA wide
#define TK_DELAY kDelayWide
#include "delay/cpu_kernels.h"
