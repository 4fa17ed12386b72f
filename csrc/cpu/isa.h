// What every instruction set's translation unit includes first, outside its namespace. No header with inline functions
// of its own belongs here: the linker keeps one copy of those, and might keep one that needs AVX-512.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define TK_INLINE inline __attribute__((always_inline))
#define TK_NOINLINE __attribute__((noinline))
