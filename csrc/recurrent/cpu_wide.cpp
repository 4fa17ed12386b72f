// As cpu/isa_wide.cpp.
#define TK_WIDTH 16
#define TK_STREAM 32
#define TK_ISA wide_recurrent
#define TK_RECURRENT kRecurrentWide
#include "recurrent/cpu_kernels.h"
