// What becomes of the spikes of a fused forward kernel besides the dense tensor: bits, and averages of 2 x 2 neurons.
// Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// The spikes of a chunk of at most 8 steps of V neurons: a byte a neuron, bit k for step k. With pooling, those of the
// four packs are added up in words of `kept`, 4 bits a step of each average.
template <class Kernel>
struct Trains {
  using E = typename Kernel::E;
  static constexpr int V = Kernel::V, K = Kernel::K;
  static constexpr int kCounts = 4 * Kernel::kStates * V, kKept = kCounts + V;  // after the states of the four packs

  uint32_t bits[(V + 3) / 4] = {};

  TK_INLINE void take(int k, int j, bool fired) { bits[j / 4] |= fired ? 1u << (j % 4 * 8 + k % 8) : 0u; }

  // After pack number q of the four (0 without pooling), of the neurons n .. n + V - 1 from step `step` on.
  TK_INLINE void finish(const LifArgs& a, int64_t step, int64_t n, int q, const Words& kept) {
    static_assert(K <= 8, "a byte has 8 bits");
    if (a.packed != 0) write<V>(a.packed + index::offset(step / 8, n, a.N), bits);
    if (a.pool_row != 0) add(index::Pool{a.pool_row, a.pool_side}.over(V), q, kept);
    TK_UNROLL
    for (uint32_t& word : bits) word = 0;
  }

  // Each neuron to an average of its own (over), or two neighbours to one: the first half of the averages for the packs
  // at even q, the second for those at odd q.
  TK_INLINE void add(bool over, int q, const Words& kept) const {
    uint32_t spread[V];
    TK_UNROLL
    for (int j = 0; j < V; ++j) spread[j] = spread_bits(bits[j / 4] >> (j % 4 * 8) & 0xff);
    TK_UNROLL
    for (int j = 0; j < V; ++j) {
      uint32_t more = spread[j];
      if constexpr (V > 1) {
        const bool mine = j < V / 2 ? q % 2 == 0 : q % 2 != 0;
        if (!over) more = mine ? spread[2 * j % V] + spread[2 * j % V + 1] : 0;
      }
      kept.word(kCounts + j) = q == 0 ? more : kept.word(kCounts + j) + more;
    }
  }

  // Bit k of a byte moves to bit 4 k.
  TK_INLINE static uint32_t spread_bits(uint32_t byte) {
    uint32_t word = (byte | byte << 12) & 0x000f000fu;
    word = (word | word << 6) & 0x03030303u;
    return (word | word << 3) & 0x11111111u;
  }

  // The averages m .. m + V - 1 of `count` steps: exact in every element type.
  TK_INLINE void store_averages(const LifArgs& a, int64_t step, int count, int64_t m, const Words& kept) const {
    if (a.s == 0) return;
    const int64_t N = again(count, a.N / 4);
    uint64_t at = address<E>(a.s, index::offset(step, m, N));
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      Real s[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) s[j] = Real(0.25f) * Real(static_cast<float>(kept.word(kCounts + j) >> 4 * k & 15));
      if constexpr (Kernel::ANY_ELEMENT) {
        store_element(a, a.s, index::offset(step + k, m, N), s[0]);
      } else {
        typename Kernel::Row out;
        out.set(s);
        out.store(at);
        at = address<E>(at, N);
      }
    }
  }
};

}  // namespace cuda
}  // namespace trtkern
