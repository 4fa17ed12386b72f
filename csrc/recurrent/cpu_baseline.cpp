#define TK_WIDTH 4
#define TK_STREAM 16
#define TK_ISA baseline_recurrent
#define TK_RECURRENT kRecurrentBaseline
#include "recurrent/cpu_kernels.h"
