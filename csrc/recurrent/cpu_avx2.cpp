#define TK_WIDTH 8
#define TK_STREAM 32
#define TK_ISA avx2_recurrent
#define TK_RECURRENT kRecurrentAvx2
#include "recurrent/cpu_kernels.h"
