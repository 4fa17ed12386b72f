// What the CUDA kernels are written in, for g++ (csrc/cuda/dialect.h is nvcc's): a Real is a float, and every
// access to memory is checked against the tensors that were named and counted.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lif/args.h"
#include "cuda/index.h"

#define TK_SPACE cuda
#define TK_INLINE inline
#define TK_UNROLL
#define TK_ROLLED

namespace trtkern {
namespace cuda {

// ---- memory ----

struct Tensor {
  const char* name;
  uint64_t begin;
  int64_t bytes, loaded, stored;
};
static std::vector<Tensor> tensors;
static int64_t strays, misaligned;

static void touch(uint64_t address, int bytes, bool store) {
  misaligned += address % bytes != 0;
  for (Tensor& t : tensors) {
    if (address < t.begin || address + bytes > t.begin + t.bytes) continue;
    (store ? t.stored : t.loaded) += bytes;
    return;
  }
  ++strays;
}

template <int BYTES>
void read(uint64_t address, uint32_t* words) {
  touch(address, BYTES, false);
  if (strays == 0) std::memcpy(words, reinterpret_cast<const void*>(address), BYTES);
}
template <int BYTES>
void write(uint64_t address, const uint32_t* words) {
  touch(address, BYTES, true);
  if (strays == 0) std::memcpy(reinterpret_cast<void*>(address), words, BYTES);
}
// Reading ahead, at its worst: what was asked for arrives when it is waited for and not before, and what stood in its
// place is gone at once.
struct Fetch {
  uint32_t* to;
  uint64_t from;
};
static std::vector<std::vector<Fetch>> fetches(1);

inline void fetch(uint32_t* to, uint64_t address) {
  *to = 0x7fc00000u;
  fetches.back().push_back({to, address});
}
inline void fetch_end() { fetches.emplace_back(); }
template <int N>
void fetched() {
  while (fetches.size() > N + 1) {
    for (const Fetch& each : fetches.front()) read<4>(each.from, each.to);
    fetches.erase(fetches.begin());
  }
}
inline double load_double(uint64_t base, int64_t element) {
  uint32_t words[2];
  double value;
  read<8>(base + 8 * element, words);
  std::memcpy(&value, words, 8);
  return value;
}
inline void store_double(uint64_t base, int64_t element, double value) {
  uint32_t words[2];
  std::memcpy(words, &value, 8);
  write<8>(base + 8 * element, words);
}
inline float load_float(uint64_t base, int64_t element) {
  float value;
  read<4>(base + 4 * element, reinterpret_cast<uint32_t*>(&value));
  return value;
}
inline void store_float(uint64_t base, int64_t element, float value) {
  write<4>(base + 4 * element, reinterpret_cast<const uint32_t*>(&value));
}
inline uint32_t load_short(uint64_t base, int64_t element) {
  uint32_t word = 0;
  read<2>(base + 2 * element, &word);
  return word;
}
inline double reciprocal_root(double x) { return 1.0 / std::sqrt(x); }

// ---- the dialect ----

using Real = float;
template <class F>
F lit(float value) {
  return value;
}
inline double widen(float a) { return a; }
inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }
inline float abs_(float a) { return std::fabs(a); }
inline float exp_(float a) { return std::exp(a); }
inline float where_(bool condition, float a, float b) { return condition ? a : b; }
inline float maximum_(float a, float b) { return a != a || b != b ? a + b : a > b ? a : b; }

inline uint32_t bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float number(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
struct Float32 {
  static constexpr int kBytes = 4;
  static float unpack(uint32_t word, int) { return number(word); }
  static uint32_t pack(float low, float) { return bits(low); }
  static uint32_t twice(uint32_t word, int) { return word; }
};
template <class E>
struct Halves {
  static constexpr int kBytes = 2;
  static float unpack(uint32_t word, int at) { return E::widen(at == 0 ? word & 0xffff : word >> 16); }
  static uint32_t pack(float low, float high) { return E::narrow(low) | E::narrow(high) << 16; }
  static uint32_t twice(uint32_t word, int at) { return (at % 2 == 0 ? word & 0xffff : word >> 16) * 0x10001u; }
};
struct BFloat16 : Halves<BFloat16> {
  static float widen(uint32_t half) { return number(half << 16); }
  static uint32_t narrow(float value) {
    const uint32_t word = bits(value);
    return value != value ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};
struct Float16 : Halves<Float16> {
  static float widen(uint32_t half) {
    const float sign = half >> 15 ? -1.0f : 1.0f;
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa), (exponent ? exponent : 1) - 25);
  }
  static uint32_t narrow(float value) {
    if (value != value) return 0x7fff;
    const uint32_t sign = bits(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)));
    const uint32_t word = bits(size);
    return sign | (word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13;
  }
};

}  // namespace cuda
}  // namespace trtkern

#include "lif/math.h"
