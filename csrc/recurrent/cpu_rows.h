// What both directions of neurons that feed each other share on the CPU: a group of samples goes through the steps
// together. The neurons' rows are those of float32; the numbers of a half type pass through rows of floats.
#pragma once
#include "cpu/rows.h"
#include "recurrent/cpu_product.h"

namespace trtkern::TK_ISA {

constexpr int64_t kMostStates = 3;  // of any neuron

// f(D, from, to, i, n): a vector of a row at i, of which n numbers are there: those of `from` and `to` may be read and
// written as a whole. `from` may be null; `to` may be null.
template <class D, class F>
TK_INLINE void each_vector(const typename D::Raw* from, typename D::Raw* to, int64_t n, F f) {
  using Raw = typename D::Raw;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(from ? from + i : nullptr, to ? to + i : nullptr, i);
  if (i == n) return;
  Staged<Raw> some_from, some_to;
  f(from ? some_from.in(from + i, (int)(n - i)) : nullptr, some_to.out(to), i);
  if (to) some_to.back(to + i, (int)(n - i));
}

// n numbers of a tensor's type as floats, and back; up to a vector of floats behind them may be read and written.
// `watch` is NaN then where a number is not finite in that type.
TK_NOINLINE inline void to_floats(int dtype, const void* from, int64_t n, float* to) {
  for_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    each_vector<D>((const typename D::Raw*)from, nullptr, n,
                   [&](auto* in, auto*, int64_t i) { store(to + i, get<D>(in)); });
  });
}
TK_NOINLINE inline void from_floats(int dtype, const float* from, int64_t n, void* to, float* watch = nullptr) {
  for_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    vfloat watched{};
    each_vector<D>(nullptr, (typename D::Raw*)to, n, [&](auto*, auto* out, int64_t i) {
      vfloat value = load(from + i);
      if (n - i < kLanes) value = where_(lane_numbers() < (int32_t)(n - i), value, vfloat{});
      const typename D::Pack shown = D::pack(value);
      watched = fma_(D::unpack(shown), vfloat{}, watched);
      put<false>(out, shown);
    });
    if (watch) store(watch, load(watch) + watched);
  });
}

// The current of a sample: x + (what it is fed + bias), rounded to the tensor's type, there and as floats; each may be
// null. `fed` and `bias` may be null.
TK_NOINLINE inline void write_current(int dtype, const void* x, const float* fed, const float* bias, int64_t n,
                                      void* current, float* floats) {
  for_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    using Raw = typename D::Raw;
    each_vector<D>((const Raw*)x, (Raw*)current, n, [&](auto* in, auto* out, int64_t i) {
      vfloat value = get<D>(in);
      if (fed && bias)
        value = value + (load(fed + i) + load(bias + i));
      else if (fed || bias)
        value = value + load((fed ? fed : bias) + i);
      const typename D::Pack shown = D::pack(value);
      if (out) put<false>(out, shown);
      if (floats) store(floats + i, D::unpack(shown));
    });
  });
}

// The gradient of a sample's spikes as floats: what comes from outside and what they fed; both may be null.
TK_NOINLINE inline void write_gradient(int dtype, const void* gs, const float* fed, int64_t n, float* floats) {
  if (!gs) {
    for (int64_t i = 0; i < n; i += kLanes) store(floats + i, fed ? load(fed + i) : vfloat{});
    return;
  }
  for_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    each_vector<D>((const typename D::Raw*)gs, nullptr, n, [&](auto* in, auto*, int64_t i) {
      store(floats + i, fed ? get<D>(in) + load(fed + i) : get<D>(in));
    });
  });
}

// The neurons of a group of units, and the blocks of neurons that they are in.
struct Samples {
  int64_t rows, begin, end, unit;  // unit: neurons of a whole one

  Samples(const RecurrentArgs& a, int64_t first, int64_t units) {
    const int64_t left = a.samples - first * kSamples;
    rows = left < units * kSamples ? left : units * kSamples, unit = kSamples * a.width;
    begin = first * unit, end = begin + rows * a.width;
  }
  int64_t size() const { return end - begin; }

  // f(block of neurons, its number, its unit), one after the other.
  template <class F>
  TK_INLINE void each(const LifArgs& a, int64_t most, F f) const {
    int64_t number = 0;
    for (int64_t at = begin; at < end; at += unit) {
      const int64_t to = end - at < unit ? end : at + unit;
      Block b;
      for (int64_t n0 = at; n0 < to; n0 += b.size()) {
        b = block_at(a, n0, to, most);
        f(b, number++, at / unit);
      }
    }
  }
  int64_t count(const LifArgs& a, int64_t most) const {
    int64_t number = 0;
    each(a, most, [&](const Block&, int64_t, int64_t) { ++number; });
    return number;
  }
};

// A tensor [T, N] of which the rows of a group of samples lie in scratch memory from step t0 on, as an address of it.
inline uint64_t as_tensor(const float* rows, int64_t t0, int64_t stride, int64_t begin) {
  return (uint64_t)rows - (t0 * stride + begin) * sizeof(float);
}
// The row of step t of a tensor, at a group's first neuron; null where there is none.
inline char* row_at(const LifArgs& a, uint64_t tensor, int64_t t, int64_t begin) {
  return tensor ? (char*)tensor + (t * a.N + begin) * (a.dtype == kFloat32 ? 4 : 2) : nullptr;
}

// The product on scratch memory; where it refuses numbers that are not finite, one number after the other.
TK_NOINLINE inline void multiply_rows(const RecurrentArgs& a, const RecurrentMemory& memory, bool back,
                                      const float* from, int64_t rows, bool spikes, float* out, char* own) {
  const unsigned unusual =
      memory.product->multiply(memory.weights, from, rows, a.width, spikes && memory.finite, out, own);
  if (!unusual) return;
  const float* const weight = (const float*)a.weight;
  const int64_t width = a.width, of_j = back ? 1 : width, of_k = back ? width : 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; unusual >> r / kSamples & 1 && j < width; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < width; ++k) sum += from[r * width + k] * weight[j * of_j + k * of_k];
      out[r * product_pitch(width) + j] = sum;
    }
}

}  // namespace trtkern::TK_ISA
