// AVX-512: vectors of 16 floats.
#define TK_WIDTH 16
#define TK_STREAM 64  // bytes of the widest streaming store
#define TK_ISA avx512
#define TK_KERNELS kAvx512
#include "cpu/isa_kernels.h"
