// AVX2: vectors of 8 floats.
#pragma once
#define TK_WIDTH 8
#define TK_STREAM 32  // bytes of the widest streaming store
#define TK_ISA avx2
