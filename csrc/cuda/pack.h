// How a CUDA thread reads and writes its neurons: packed as they lie in memory, 16 bytes at a time where it owns
// several. E: element type; V: neighbouring neurons of a thread. Included by lif/cuda_traits.h.
#pragma once
#include "lif/cuda_step.h"

namespace trtkern {
namespace cuda {

// V neighbouring elements of one step, as they lie in memory.
template <class E, int V>
struct Pack {
  static constexpr int kWords = (V * E::kBytes + 3) / 4;
  static constexpr int kPerWord = 4 / E::kBytes;
  uint32_t words[kWords] = {};

  TK_INLINE Real get(int j) const { return E::unpack(words[j / kPerWord], j % kPerWord); }
  TK_INLINE void set(const Real (&from)[V]) {
    constexpr int kEach = kPerWord < V ? kPerWord : V;
    TK_UNROLL
    for (int w = 0; w < kWords; ++w) words[w] = E::pack(from[w * kEach], from[w * kEach + kEach - 1]);
  }
  TK_INLINE void load(uint64_t address) { read<V * E::kBytes>(address, words); }
  TK_INLINE void store(uint64_t address) const { write<V * E::kBytes>(address, words); }
};

// The address of an element.
template <class E>
TK_INLINE uint64_t address(uint64_t base, int64_t element) {
  return base + element * E::kBytes;
}

// V neighbouring float32 numbers; absent (address 0): zeros, and not stored.
template <int V>
TK_INLINE void load_floats(uint64_t base, int64_t element, Real (&to)[V]) {
  constexpr int kStep = V < 4 ? V : 4;
  TK_UNROLL
  for (int j = 0; j < V; j += kStep) {
    Pack<Float32, kStep> part;
    if (base != 0) part.load(address<Float32>(base, element + j));
    TK_UNROLL
    for (int i = 0; i < kStep; ++i) to[j + i] = part.get(i);
  }
}
template <int V>
TK_INLINE void store_floats(uint64_t base, int64_t element, const Real (&from)[V]) {
  constexpr int kStep = V < 4 ? V : 4;
  if (base == 0) return;
  TK_UNROLL
  for (int j = 0; j < V; j += kStep) {
    Pack<Float32, kStep> part;
    Real some[kStep];
    TK_UNROLL
    for (int i = 0; i < kStep; ++i) some[i] = from[j + i];
    part.set(some);
    part.store(address<Float32>(base, element + j));
  }
}

// The same number, in a way that no compiler sees through (a count is never negative): what follows from it is computed
// anew where it is used, instead of being kept in registers from an earlier use, or from before a loop.
TK_INLINE int64_t again(int count, int64_t value) { return value ^ (count >> 31); }
TK_INLINE Real again(int count, Real value) {
  return Float32::unpack(Float32::pack(value, value) ^ static_cast<uint32_t>(count >> 31), 0);
}

// Steps of the chunk that begins at step `first`.
TK_INLINE int steps(const LifArgs& a, int64_t first, int chunk) {
  return a.T - first < chunk ? static_cast<int>(a.T - first) : chunk;
}

// `count` steps of V neighbouring elements, the first at element `first`, a step `N` elements after the one before.
template <class E, int V, int K>
TK_INLINE void load_steps(uint64_t base, int64_t first, int64_t N, int count, Pack<E, V> (&to)[K]) {
  uint64_t at = address<E>(base, first);
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    if (k < count) to[k].load(at);
    at = address<E>(at, N);
  }
}

// The channels of one neuron after the other.
struct Channels {
  index::Channel at{0, 0};

  TK_INLINE Channels(const LifArgs& a, int64_t n) {
    if (a.C > 1) at = index::Channel::of(n, a.inner, a.C);
  }
  template <int G>
  TK_INLINE void next(const LifArgs& a, int64_t (&channel)[G]) {
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      channel[j] = at.channel;
      if (a.C > 1) at.step(a.inner, a.C);
    }
  }
};

// Row `row` of [rows, C].
TK_INLINE Real load_row(const LifArgs& a, uint64_t base, int row, int64_t channel) {
  Pack<Float32, 1> value;
  value.load(address<Float32>(base, index::offset(row, channel, a.C)));
  return value.get(0);
}

// The parameters of one neuron after the other. Only one of reset_amount and v_reset is ever used: both name one
// register, which is 0 where there is no reset. FUSED: the caller says of which channels, for it has more that has
// them.
template <bool FUSED>
struct Parameters {
  Neuron<Real> shared;
  index::Channel at{0, 0};
  bool per_channel;

  TK_INLINE Parameters(const LifArgs& a, int64_t n) : per_channel(a.params != 0 && a.C > 1) {
    if (per_channel) {
      if (!FUSED) at = index::Channel::of(n, a.inner, a.C);
    } else if (a.params != 0) {
      shared = load(a, 0);
    } else {
      const float reset = a.reset == kHard ? a.scalars[kVReset] : a.reset == kSoft ? a.scalars[kResetAmount] : 0.0f;
      shared = {a.scalars[kDecay], a.scalars[kGain], a.scalars[kBias], reset, a.scalars[kThreshold], reset};
    }
  }
  TK_INLINE static Neuron<Real> load(const LifArgs& a, int64_t c) {
    const auto row = [&a, c](int r) { return load_row(a, a.params, r, c); };
    Real reset = row(a.reset == kHard ? kVReset : kResetAmount);
    if (a.reset == kNone) reset = 0.0f;
    return {row(kDecay), row(kGain), row(kBias), reset, row(kThreshold), reset};
  }
  template <int G>
  TK_INLINE void next(const LifArgs& a, Neuron<Real> (&p)[G]) {
    TK_UNROLL
    for (int j = 0; j < G; ++j) p[j] = shared;
    if (!per_channel) return;
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      p[j] = load(a, at.channel);
      at.step(a.inner, a.C);
    }
  }
  template <int G>
  TK_INLINE void of(const LifArgs& a, const int64_t (&channel)[G], Neuron<Real> (&p)[G]) const {
    TK_UNROLL
    for (int j = 0; j < G; ++j) p[j] = shared;
    if (!per_channel) return;
    TK_UNROLL
    for (int j = 0; j < G; ++j) p[j] = load(a, channel[j]);
  }
};

// The three numbers of `affine` or of `coef` for a neuron.
struct Affine3 {
  Real row[kAffine];
};

// Those of G neurons. Absent: center 0, scale 1 and shift -0, which change no bit of x.
template <int G>
TK_INLINE void load_affine(const LifArgs& a, uint64_t base, const int64_t (&channel)[G], Affine3 (&to)[G]) {
  TK_UNROLL
  for (int j = 0; j < G; ++j) to[j] = {{0.0f, 1.0f, -0.0f}};
  if (base == 0) return;
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    TK_UNROLL
    for (int r = 0; r < kAffine; ++r) to[j].row[r] = load_row(a, base, r, channel[j]);
  }
}

}  // namespace cuda
}  // namespace trtkern
