#define TK_WIDTH 16
#define TK_STREAM 64
#define TK_ISA avx512_recurrent
#define TK_RECURRENT kRecurrentAvx512
#include "recurrent/cpu_kernels.h"
