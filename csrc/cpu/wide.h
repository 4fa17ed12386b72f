// The code path for vectors of 16 floats on AVX2, so that tests run it without AVX-512. Built for float32 alone:
// AVX-512 packs the half types by instructions of its own.
#pragma once
#define TK_WIDTH 16
#define TK_STREAM 32  // bytes of the widest streaming store
#define TK_ISA wide
