#include "norm/cpu_finish.h"

#include <cmath>
#include <cstring>

#define TK_SPACE finish
#define TK_INLINE inline

namespace trtkern::finish {

template <class T>
TK_INLINE T load_as(uint64_t base, int64_t element) {
  return reinterpret_cast<const T*>(base)[element];
}
template <class T>
TK_INLINE void store_as(uint64_t base, int64_t element, T value) {
  reinterpret_cast<T*>(base)[element] = value;
}
TK_INLINE float load_float(uint64_t base, int64_t element) { return load_as<float>(base, element); }
TK_INLINE double load_double(uint64_t base, int64_t element) { return load_as<double>(base, element); }
TK_INLINE void store_float(uint64_t base, int64_t element, float value) { store_as(base, element, value); }
TK_INLINE void store_double(uint64_t base, int64_t element, double value) { store_as(base, element, value); }
TK_INLINE double reciprocal_root(double x) { return 1.0 / std::sqrt(x); }

TK_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
TK_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
// float16 by hand, for not every compiler and processor has it: exact one way, to the nearest (ties to even) the other.
TK_INLINE float from_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), float_of(sign | 0x3f800000u));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}
TK_INLINE uint16_t to_half(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u, bits = bits_of(value) & 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (bits < 113u << 23) {  // below 2^-14: adding 1/2 leaves the value in multiples of 2^-24
    half = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
  } else {
    half = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}
TK_INLINE uint16_t to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

TK_INLINE double load_number(uint64_t base, int64_t element, int type) {
  if (type == kFloat32) return static_cast<double>(load_float(base, element));
  if (type == kFloat64) return load_double(base, element);
  const uint32_t raw = load_as<uint16_t>(base, element);
  return static_cast<double>(type == kBFloat16 ? float_of(raw << 16) : from_half(raw));
}
TK_INLINE void store_number(uint64_t base, int64_t element, int type, double value) {
  if (type == kFloat64) return store_double(base, element, value);
  const float narrow = static_cast<float>(value);
  if (type == kFloat32) return store_float(base, element, narrow);
  store_as<uint16_t>(base, element, type == kBFloat16 ? to_bfloat(narrow) : to_half(narrow));
}

}  // namespace trtkern::finish

#include "norm/finish.h"

namespace trtkern {

void cpu_finish_forward(const NormArgs& n) {
  bool finite = true;
  for (int64_t c = 0; c < n.C; ++c) {
    const finish::ChannelStatistics of = finish::channel_statistics(n, c);
    finite = finite && of.finite();
    finish::finish_forward(n, c, of);
  }
  if (!n.running_mean || !n.count || !finite) return;
  const int64_t batches = ++*reinterpret_cast<int64_t*>(n.batches);
  for (int64_t c = 0; c < n.C; ++c) finish::move_running(n, c, finish::channel_statistics(n, c), batches);
}

void cpu_finish_backward(const NormArgs& n) {
  for (int64_t c = 0; c < n.C; ++c)
    finish::finish_backward(n, c, finish::load_double(n.sums, c), finish::load_double(n.sums, n.C + c));
}

}  // namespace trtkern
