// A vector of TK_WIDTH floats and what the kernels need of it, on GCC's vector extensions: one source for every
// instruction set, with the same answer, bit for bit, on each. Intrinsics stand where the extensions have no word.
#pragma once
#include "cpu/isa.h"

namespace trtkern::TK_ISA {

constexpr int kLanes = TK_WIDTH;
typedef float vfloat __attribute__((vector_size(4 * TK_WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * TK_WIDTH)));
typedef uint32_t vuint __attribute__((vector_size(4 * TK_WIDTH)));
typedef uint16_t vshort __attribute__((vector_size(2 * TK_WIDTH)));

template <class F>
TK_INLINE F lit(float value) {
  return value - F{};  // x - 0 is x, bit for bit, and folds to a broadcast; x + 0 does not
}
template <>
TK_INLINE float lit<float>(float value) {
  return value;
}

// Lane numbers 0, 1, 2, ...
TK_INLINE vint lane_numbers() {
#if TK_WIDTH == 16
  return vint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif TK_WIDTH == 8
  return vint{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vint{0, 1, 2, 3};
#endif
}

template <class V>
TK_INLINE V load_as(const void* address) {
  V value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}
TK_INLINE vfloat load(const float* address) { return load_as<vfloat>(address); }
TK_INLINE void store(float* address, vfloat value) { __builtin_memcpy(address, &value, sizeof value); }

TK_INLINE vfloat where_(vint condition, vfloat a, vfloat b) { return condition ? a : b; }
TK_INLINE vfloat abs_(vfloat a) { return (vfloat)((vuint)a & 0x7fffffffu); }

// a < b ? a : b and a > b ? a : b: b where either is NaN, as the instructions have it.
TK_INLINE vfloat least_(vfloat a, vfloat b) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif TK_WIDTH == 8 && defined(__AVX__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return where_(a < b, a, b);
#endif
}
TK_INLINE vfloat greatest_(vfloat a, vfloat b) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif TK_WIDTH == 8 && defined(__AVX__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return where_(a > b, a, b);
#endif
}

// The larger; NaN if either is NaN.
TK_INLINE vfloat maximum_(vfloat a, vfloat b) { return where_(b != b, b, greatest_(b, a)); }

#if !defined(__FMA__)
// One fma a lane: a library call where the processor has none. Out of line, for there are many.
TK_NOINLINE inline void fma_lanes(const float* a, const float* b, float* c) {
  for (int i = 0; i < TK_WIDTH; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
}
#endif

TK_INLINE vfloat fma_(vfloat a, vfloat b, vfloat c) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif TK_WIDTH == 8 && defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
  vfloat r;
  for (int i = 0; i < TK_WIDTH; i += 8) {
    const __m256 h = _mm256_fmadd_ps(_mm256_loadu_ps((const float*)&a + i), _mm256_loadu_ps((const float*)&b + i),
                                     _mm256_loadu_ps((const float*)&c + i));
    _mm256_storeu_ps((float*)&r + i, h);
  }
  return r;
#else
  fma_lanes((const float*)&a, (const float*)&b, (float*)&c);
  return c;
#endif
}

// e^x to 1 ulp; inf and 0 beyond the range, NaN for NaN. x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial for e^r.
TK_INLINE vfloat exp_(vfloat x) {
  // e^x is inf at the one end and 0 at the other; x comes second, so that NaN stays.
  x = greatest_(lit<vfloat>(-104.0f), least_(lit<vfloat>(89.0f), x));
  const vfloat shift = lit<vfloat>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const vfloat shifted = fma_(x, lit<vfloat>(1.44269502f), shift);
  const vfloat n = shifted - shift;
  vfloat r = fma_(n, lit<vfloat>(-0.693145752f), x);  // ln 2 in two parts; the first has trailing zeros
  r = fma_(n, lit<vfloat>(-1.42860677e-06f), r);
  // In pairs (Estrin), so that the chain is short.
  const vfloat r2 = r * r;
  const vfloat p01 = lit<vfloat>(1.0f) + r;
  const vfloat p23 = fma_(r, lit<vfloat>(1.66666667e-01f), lit<vfloat>(0.5f));
  const vfloat p45 = fma_(r, lit<vfloat>(8.33333333e-03f), lit<vfloat>(4.16666667e-02f));
  const vfloat p67 = fma_(r, lit<vfloat>(1.98412698e-04f), lit<vfloat>(1.38888889e-03f));
  const vfloat high = fma_(r2, fma_(r2, p67, p45), p23);
  const vfloat p = fma_(r2, high, p01);
  // 2^n in two factors: n reaches 128 and -150, where one factor would be inf or denormal.
  const vint whole = (vint)shifted - 0x4b400000;
  const vint half = whole >> 1;
  const vfloat first = (vfloat)((half + 127) << 23), second = (vfloat)((whole - half + 127) << 23);
  return p * first * second;
}

// Streaming (non-temporal) stores of whole vectors: the line is not read first, and not kept. They need an address
// that is a multiple of kStreamAlign<V>; a fence() ends each thread's part.
template <class V>
constexpr int kStreamAlign = sizeof(V) < TK_STREAM ? sizeof(V) : TK_STREAM;

template <class V>
TK_INLINE void stream(void* address, V value) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 8) {
    _mm_stream_si64((long long*)address, load_as<long long>(&value));
#if defined(__AVX512F__)
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512((__m512i*)address, (__m512i)value);
#endif
#if defined(__AVX__)
  } else if constexpr (sizeof(V) % 32 == 0) {
    for (unsigned i = 0; i < sizeof(V) / 32; ++i)
      _mm256_stream_si256((__m256i*)address + i, _mm256_loadu_si256((const __m256i*)&value + i));
#endif
  } else {
    for (unsigned i = 0; i < sizeof(V) / 16; ++i)
      _mm_stream_si128((__m128i*)address + i, _mm_loadu_si128((const __m128i*)&value + i));
  }
#else
  __builtin_memcpy(address, &value, sizeof value);
#endif
}
TK_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
TK_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Elements from `address` to the next at which a V may be streamed, at most `count`.
template <class V, class T>
TK_INLINE int64_t to_aligned(const T* address, int64_t count) {
  const int64_t n = (int64_t)((-(uintptr_t)address & (kStreamAlign<V> - 1)) / sizeof(T));
  return n < count ? n : count;
}

TK_INLINE vuint widen(vshort a) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vuint)_mm512_cvtepu16_epi32((__m256i)a);
#elif TK_WIDTH == 8 && defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)a);
#else
  return __builtin_convertvector(a, vuint);
#endif
}
TK_INLINE vshort narrow(vuint a) {  // lanes below 65536
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vshort)_mm512_cvtepi32_epi16((__m512i)a);
#elif TK_WIDTH == 8 && defined(__AVX2__)
  const __m256i v = (__m256i)a;
  return (vshort)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
  return __builtin_convertvector(a, vshort);
#endif
}

// An element type: what lies in memory (Raw, a vector of it Pack) and its floats. pack_exact takes a value that the
// type holds exactly, such as a spike.
struct Float32 {
  using Raw = float;
  using Pack = vfloat;
  TK_INLINE static vfloat unpack(vfloat raw) { return raw; }
  TK_INLINE static vfloat pack(vfloat value) { return value; }
  TK_INLINE static vfloat pack_exact(vfloat value) { return value; }
};

struct BFloat16 {
  using Raw = uint16_t;
  using Pack = vshort;
  TK_INLINE static vfloat unpack(vshort raw) { return (vfloat)(widen(raw) << 16); }
  // To the nearest, ties to even; NaN stays NaN.
  TK_INLINE static vshort pack(vfloat value) {
    const vuint bits = (vuint)value;
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return narrow((vuint)where_(value != value, (vfloat)(vuint{} + 0x7fc0u), (vfloat)rounded));
  }
  TK_INLINE static vshort pack_exact(vfloat value) { return narrow((vuint)value >> 16); }
};

struct Float16 {
  using Raw = uint16_t;
  using Pack = vshort;
  TK_INLINE static vfloat unpack(vshort raw) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
    return (vfloat)_mm512_cvtph_ps((__m256i)raw);
#elif TK_WIDTH == 8 && defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps((__m128i)raw);
#else
    const vuint wide = widen(raw);
    const vuint magnitude = (wide & 0x7fffu) << 13;  // exponent and mantissa where a float has them
    const vuint normal = magnitude + (112u << 23);
    // A denormal is its mantissa times 2^-24: put it behind the exponent of 2^-14 and take 2^-14 away.
    const vfloat denormal = (vfloat)(magnitude + (113u << 23)) - lit<vfloat>(6.103515625e-05f);
    const vuint special = magnitude | 0x7f800000u | (vuint)((vint)((wide & 0x3ffu) != 0u) & 0x400000);
    const vint exponent = (vint)(wide & 0x7c00u);
    const vfloat finite = where_(exponent == 0, denormal, (vfloat)normal);
    return (vfloat)((vuint)where_(exponent == 0x7c00, (vfloat)special, finite) | ((wide & 0x8000u) << 16));
#endif
  }
  TK_INLINE static vshort pack(vfloat value) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
    return (vshort)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif TK_WIDTH == 8 && defined(__F16C__)
    return (vshort)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
    const vuint sign = ((vuint)value >> 16) & 0x8000u;
    const vuint bits = (vuint)value & 0x7fffffffu;
    const vint order = (vint)bits;  // magnitudes compare as integers
    const vuint normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 leaves the value, rounded to multiples of 2^-24, in the low bits.
    const vuint denormal = (vuint)((vfloat)bits + lit<vfloat>(0.5f)) - 0x3f000000u;
    const vuint nan = 0x7e00u | ((bits >> 13) & 0x1ffu);
    vfloat r = where_(order < (113 << 23), (vfloat)denormal, (vfloat)normal);
    r = where_(order >= 0x477ff000, (vfloat)(vuint{} + 0x7c00u), r);  // 65520 and more round to infinity
    r = where_(order > 0x7f800000, (vfloat)nan, r);
    return narrow((vuint)r | sign);
#endif
  }
  TK_INLINE static vshort pack_exact(vfloat value) { return pack(value); }
};

}  // namespace trtkern::TK_ISA
