// What one thread does where T is long and N does not fill the GPU: such a launch waits for memory, not on its
// bandwidth. The thread owns one 32-bit word of neurons instead of four, so that the work is spread over four times as
// many, and reads chunks ahead of the one that it works on, into a ring in its own words of shared memory. No other
// thread looks there, so that a block never waits for itself. The numbers of a neuron are those of the other kernels,
// bit for bit. Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

template <class E>
using Ahead = Traits<E, 4 / E::kBytes, kChunk, true, false>;
constexpr int kForwardRing = 6, kBackwardRing = 4;  // chunks: that in work, and those on their way

// Asks for `count` steps of a word, the first at element `first`, for word `at` of `to` and each `apart` after it.
template <class E>
TK_INLINE void fetch_steps(uint64_t base, int64_t first, int64_t N, int count, const Words& to, int at, int apart) {
  uint64_t from = address<E>(base, first);
  TK_UNROLL
  for (int k = 0; k < kChunk; ++k) {
    if (k < count) fetch(&to.word(at + k * apart), from);
    from = address<E>(from, N);
  }
}

// A place in a ring, and the one before it.
template <int RING>
TK_INLINE int next_in_ring(int slot) {
  return slot + 1 == RING ? 0 : slot + 1;
}
template <int RING>
TK_INLINE int previous_in_ring(int slot) {
  return slot == 0 ? RING - 1 : slot - 1;
}

// All steps of the neurons n .. n + V - 1; false if any h, or any v as it is written, was not finite. `ring`:
// kForwardRing * kChunk words.
template <class Kernel>
TK_INLINE bool forward_ahead(const LifArgs& a, int64_t n, const Words& ring) {
  using E = typename Kernel::E;
  constexpr int R = kForwardRing, V = Kernel::V;
  Neuron<Real> p[V];
  Real v[V], watch = Real(0.0f);
  Parameters<false>(a, n).next(a, p);
  load_floats(a.v0, n, v);
  Trains<Kernel> none;
  const Affine3 plain[1] = {};
  const int64_t chunks = index::chunks(a.T, kChunk);
  int slot = 0;
  TK_ROLLED
  for (int64_t c = 1 - R; c < chunks; ++c) {
    const int64_t far = c + R - 1;  // into the place of the chunk before this one
    const int before = previous_in_ring<R>(slot);
    if (far < chunks) {
      const int64_t step = far * kChunk;
      fetch_steps<E>(a.x, index::offset(step, n, a.N), a.N, steps(a, step, kChunk), ring, before * kChunk, 1);
    }
    fetch_end();
    const int here = slot * kChunk;
    slot = next_in_ring<R>(slot);
    if (c < 0) continue;
    fetched<R - 1>();
    const int count = steps(a, c * kChunk, kChunk);
    const auto load = [&](int) { return Input<Kernel, kChunk>(ring, here); };
    forward_chunk<Kernel, kChunk>(a, p, plain, c * kChunk, count, n, v, watch, none, load);
    if (c + 1 < chunks) store_floats(a.edges, index::offset(c, n, a.N), v);
  }
  store_state(a, n, v, watch);
  return watch == watch;
}

// What a thread of the backward kernel keeps: as many Slots as the ring has chunks. The gradient of v goes from each to
// the next; each adds up sums of its own.
template <class Kernel>
struct RingOfSlots {
  using S = Slots<Kernel>;
  S first;
  int words;  // of a Slots

  TK_INLINE RingOfSlots(const LifArgs& a, uint32_t* shared, int stride)
      : first(shared, stride, 0), words(S::words_of(a)) {}
  static int words_of(const LifArgs& a) { return kBackwardRing * S::words_of(a); }
  TK_INLINE S at(int slot) const { return S(first.words + slot * words * first.stride, first.stride, 0); }

  TK_INLINE void clear(const LifArgs& a) const {
    for (int slot = 0; slot < kBackwardRing; ++slot) clear_sums(a, at(slot));
  }
  // All sums into those of the first, in the order of the ring.
  TK_INLINE void add_up(const LifArgs& a) const {
    for (int slot = 1; slot < kBackwardRing; ++slot) {
      for (int i = first.sum_at(a, 0); i < first.sum_at(a, kSums); ++i) {
        first.set_number(i, first.number(i) + at(slot).number(i));
      }
    }
  }
};

// All that the steps of chunk c need, but the carry.
template <class Kernel>
TK_INLINE void fetch_chunk(const LifArgs& a, int64_t c, int64_t n, const Slots<Kernel>& to) {
  using E = typename Kernel::E;
  using S = Slots<Kernel>;
  const int count = steps(a, c * kChunk, kChunk);
  const int64_t first = index::offset(c * kChunk, n, a.N);
  fetch_steps<E>(a.x, first, a.N, count, to, S::x(0), S::kApart);
  if (a.gs != 0) {
    fetch_steps<E>(a.gs, first, a.N, count, to, S::g(0), S::kApart);
  } else {
    TK_UNROLL
    for (int k = 0; k < kChunk; ++k) to.word(S::g(k)) = 0;
  }
  if (c == 0) return to.load_numbers(S::kStart, a.v0, n);
  TK_UNROLL
  for (int j = 0; j < Kernel::V; ++j) {
    fetch(&to.word(S::kStart + j), address<Float32>(a.edges, index::offset(c - 1, n, a.N) + j));
  }
}

// All steps of the neurons n .. n + V - 1, last first.
template <class Kernel>
TK_INLINE void backward_ahead(const LifArgs& a, int64_t n, const RingOfSlots<Kernel>& ring) {
  using S = Slots<Kernel>;
  constexpr int R = kBackwardRing, V = Kernel::V;
  Neuron<Real> p[V];
  Parameters<false>(a, n).next(a, p);
  const Affine3 plain[1] = {};
  const int64_t chunks = index::chunks(a.T, kChunk);
  Real carry[V];
  load_floats(a.gv_final, n, carry);
  int slot = 0;
  TK_ROLLED
  for (int64_t c = chunks + R - 2; c >= 0; --c) {
    const int64_t far = c - (R - 1);
    const int before = previous_in_ring<R>(slot);
    if (far >= 0) fetch_chunk(a, far, n, ring.at(before));
    fetch_end();
    const S here = ring.at(slot);
    slot = next_in_ring<R>(slot);
    if (c >= chunks) continue;
    fetched<R - 1>();
    const int count = steps(a, c * kChunk, kChunk);
    const int64_t first = index::offset(c * kChunk, n, a.N);
    here.set_numbers(S::kCarry, carry);
    group_back<kAnySurrogate, V>(a, p, plain, plain, first, count, 0, here);
    store_chunk(a, first, count, here);
    here.numbers(S::kCarry, carry);
  }
  store_floats(a.gv0, n, carry);
}

}  // namespace cuda
}  // namespace trtkern
