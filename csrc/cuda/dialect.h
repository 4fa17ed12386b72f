// What the LIF kernels are written in on CUDA: F = float, explicit roundings, typed memory access. Everything here is
// device code; tests/cuda_threads.cpp gives the same names to g++, which then runs the threads one by one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "lif/args.h"
#include "cuda/index.h"

#define TK_SPACE cuda
#define TK_INLINE __device__ __forceinline__
#define TK_UNROLL _Pragma("unroll")
#define TK_ROLLED _Pragma("unroll 1")

namespace trtkern {
namespace cuda {

// A float whose division has no slow path: within 2 ulp. Surrogates divide, and of the neurons EIF and CLIF.
struct Real {
  float value;
  Real() = default;
  TK_INLINE Real(float v) : value(v) {}
  TK_INLINE Real operator-() const { return -value; }
  TK_INLINE Real& operator+=(Real b) {
    value += b.value;
    return *this;
  }
};
TK_INLINE Real operator+(Real a, Real b) { return a.value + b.value; }
TK_INLINE Real operator-(Real a, Real b) { return a.value - b.value; }
TK_INLINE Real operator*(Real a, Real b) { return a.value * b.value; }
TK_INLINE Real operator/(Real a, Real b) {
  float q;
  asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(a.value), "f"(b.value));
  return q;
}
TK_INLINE bool operator>(Real a, Real b) { return a.value > b.value; }
TK_INLINE bool operator<(Real a, Real b) { return a.value < b.value; }
TK_INLINE bool operator==(Real a, Real b) { return a.value == b.value; }

template <class F>
TK_INLINE F lit(float value) {
  return value;
}
TK_INLINE Real fma_(Real a, Real b, Real c) { return __fmaf_rn(a.value, b.value, c.value); }
TK_INLINE Real abs_(Real a) { return fabsf(a.value); }
TK_INLINE Real exp_(Real a) { return expf(a.value); }
TK_INLINE Real where_(bool condition, Real a, Real b) { return condition ? a.value : b.value; }
TK_INLINE double widen(Real a) { return a.value; }
TK_INLINE Real maximum_(Real a, Real b) {
  float m;  // fmaxf drops a NaN
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a.value), "f"(b.value));
  return m;
}

// An element type: its bytes, the float at position `at` of a 32-bit word and back, and word `at` of a pack in which
// each element stands twice, of the word with them once.
struct Float32 {
  static constexpr int kBytes = 4;
  TK_INLINE static Real unpack(uint32_t word, int) { return __uint_as_float(word); }
  TK_INLINE static uint32_t pack(Real low, Real) { return __float_as_uint(low.value); }
  TK_INLINE static uint32_t twice(uint32_t word, int) { return word; }
};
struct Halves {
  static constexpr int kBytes = 2;
  TK_INLINE static uint32_t twice(uint32_t word, int at) { return __byte_perm(word, 0, at % 2 == 0 ? 0x1010 : 0x3232); }
};
struct BFloat16 : Halves {
  TK_INLINE static Real unpack(uint32_t word, int at) {
    return __uint_as_float(at == 0 ? word << 16 : word & 0xffff0000u);
  }
  TK_INLINE static uint32_t pack(Real low, Real high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low.value, high.value);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
struct Float16 : Halves {
  TK_INLINE static Real unpack(uint32_t word, int at) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(at == 0 ? word : word >> 16)));
  }
  TK_INLINE static uint32_t pack(Real low, Real high) {
    const __half2 pair = __floats2half2_rn(low.value, high.value);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// One access of 1 to 16 bytes. Reads take the read-only path, which is for what the kernel does not write.
template <int BYTES>
TK_INLINE void read(uint64_t address, uint32_t* words) {
  static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "no such access");
  if constexpr (BYTES == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(address));
    words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
  } else if constexpr (BYTES == 8) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(address));
    words[0] = raw.x, words[1] = raw.y;
  } else if constexpr (BYTES == 4) {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(address));
  } else {
    words[0] = __ldg(reinterpret_cast<const unsigned short*>(address));
  }
}
template <int BYTES>
TK_INLINE void write(uint64_t address, const uint32_t* words) {
  static_assert(BYTES == 1 || BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "no such access");
  if constexpr (BYTES == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3]));
  } else if constexpr (BYTES == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]));
  } else if constexpr (BYTES == 4) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(words[0]));
  } else if constexpr (BYTES == 2) {
    asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(static_cast<unsigned short>(words[0])));
  } else {
    asm volatile("st.global.b8 [%0], %1;" ::"l"(address), "r"(words[0]));
  }
}
// Reading ahead into shared memory: fetch() asks for a word (its address a multiple of 4), fetch_end() closes a group
// of them, fetched<N>() waits for all groups of this thread but its last N.
TK_INLINE void fetch(uint32_t* to, uint64_t address) {
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(address) : "memory");
}
TK_INLINE void fetch_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
TK_INLINE void fetched() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// A number each, also of what the kernel itself has written.
TK_INLINE double load_double(uint64_t base, int64_t element) { return reinterpret_cast<const double*>(base)[element]; }
TK_INLINE float load_float(uint64_t base, int64_t element) { return reinterpret_cast<const float*>(base)[element]; }
TK_INLINE uint32_t load_short(uint64_t base, int64_t element) {
  return reinterpret_cast<const unsigned short*>(base)[element];
}
TK_INLINE void store_double(uint64_t base, int64_t element, double value) {
  reinterpret_cast<double*>(base)[element] = value;
}
TK_INLINE void store_float(uint64_t base, int64_t element, float value) {
  reinterpret_cast<float*>(base)[element] = value;
}
TK_INLINE double reciprocal_root(double x) { return __ddiv_rn(1.0, __dsqrt_rn(x)); }

}  // namespace cuda
}  // namespace trtkern

// Over the names above.
#include "lif/math.h"
