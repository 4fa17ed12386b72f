// AVX-512: vectors of 16 floats.
#pragma once
#define TK_WIDTH 16
#define TK_STREAM 64  // bytes of the widest streaming store
#define TK_ISA avx512
