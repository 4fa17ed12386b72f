// Which instruction set a translation unit is compiled for: its namespace TK_ISA, TK_WIDTH floats a vector, TK_STREAM
// bytes of the widest streaming store. The headers of the CPU kernels lie in that namespace, so that each unit has its
// own of every function. No header with inline functions outside it belongs here: the linker keeps one copy of those,
// and might keep one that needs AVX-512.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef TK_ISA  // a header that is read by itself
#define TK_ISA baseline
#define TK_WIDTH 4
#define TK_STREAM 16
#endif
#define TK_SPACE TK_ISA  // of lif/math.h
#define TK_INLINE inline __attribute__((always_inline))
#define TK_NOINLINE __attribute__((noinline))
