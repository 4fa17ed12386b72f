// What a thread keeps in its own words of shared memory. Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// Word i of all threads lies together, so that no two lanes meet in a bank.
struct Words {
  uint32_t* words;
  int stride;

  TK_INLINE uint32_t& word(int i) const { return words[i * stride]; }
  TK_INLINE Real number(int i) const { return Float32::unpack(word(i), 0); }
  TK_INLINE void set_number(int i, Real value) const { word(i) = Float32::pack(value, value); }
  template <int V>
  TK_INLINE void numbers(int i, Real (&to)[V]) const {
    TK_UNROLL
    for (int j = 0; j < V; ++j) to[j] = number(i + j);
  }
  template <int V>
  TK_INLINE void set_numbers(int i, const Real (&from)[V]) const {
    TK_UNROLL
    for (int j = 0; j < V; ++j) set_number(i + j, from[j]);
  }
};

// What a thread of the backward kernel keeps in shared memory: there, unlike in registers, a loop can index it. Of a
// plain LIF, a chunk is K steps. FUSED: where T exceeds K it is kSpan steps, of which registers hold K at a time.
template <class Kernel>
struct Slots : Words {
  static constexpr int V = Kernel::V, K = Kernel::K;
  static constexpr bool FUSED = Kernel::FUSED;
  static constexpr int kRow = Kernel::Row::kWords;
  static constexpr int S = Kernel::kStates;
  static constexpr int kStart = 0;                                    // [S, V]: the state before the chunk
  static constexpr int kCarry = S * V;                                // [S, V]: its gradient, carried from step to step
  static constexpr int kNorm = 2 * S * V;                             // [kNormSums, V], FUSED only
  static constexpr int kSteps = kNorm + (FUSED ? kNormSums * V : 0);  // [rows, 2, words]: x; gs, then gx
  static constexpr int kApart = 2 * kRow + Kernel::kKept;  // from one step to the next; its trace lies behind
  // Then [rows, words] of a residual, where there is one, and [kRows, V], where parameters have gradients.

  int more;  // FUSED: how many rows there are beyond K

  TK_INLINE Slots(uint32_t* first, int apart, int more_rows) : Words{first, apart}, more(more_rows) {}

  static TK_HD int more_rows(const LifArgs& a) { return FUSED && a.T > K ? Kernel::kSpan - K : 0; }
  // Words that a launch needs of this.
  static TK_HD int words_of(const LifArgs& a) {
    const int steps = (K + more_rows(a)) * (kApart + (a.residual != 0 ? kRow : 0));
    return kSteps + steps + (a.gparams != 0 ? Kernel::kRows * V : 0);
  }
  TK_INLINE int rows() const { return FUSED ? K + more : K; }
  TK_INLINE static int x(int k) { return kSteps + k * kApart; }
  TK_INLINE static int g(int k) { return kSteps + k * kApart + kRow; }
  TK_INLINE static int trace(int k) { return kSteps + k * kApart + 2 * kRow; }
  TK_INLINE int residual(int k) const { return kSteps + rows() * kApart + k * kRow; }
  // Where row r of the sums stands, [V].
  TK_INLINE int sum_at(const LifArgs& a, int r) const {
    if (FUSED && r < kNormSums) return kNorm + r * V;
    const int params = kSteps + rows() * (FUSED && a.residual != 0 ? kApart + kRow : kApart);
    return params + (FUSED ? r - kNormSums : r) * V;
  }
  template <class P>
  TK_INLINE P pack(int i) const {
    P out;
    TK_UNROLL
    for (int w = 0; w < P::kWords; ++w) out.words[w] = word(i + w);
    return out;
  }
  template <class P>
  TK_INLINE void set_pack(int i, const P& from) const {
    TK_UNROLL
    for (int w = 0; w < P::kWords; ++w) word(i + w) = from.words[w];
  }
  TK_INLINE void set_packs(int i, int apart, const typename Kernel::Row (&from)[K]) const {
    TK_UNROLL
    for (int k = 0; k < K; ++k) set_pack(i + k * apart, from[k]);
  }
  TK_INLINE void load_numbers(int i, uint64_t base, int64_t element) const {
    Real from[V];
    load_floats(base, element, from);
    set_numbers(i, from);
  }
  // Adds column j of `sum`, from row `first` of the sums on, to the sums of neuron number `at`.
  template <int ROWS, int G>
  TK_INLINE void add_sums(const LifArgs& a, int first, int at, const Real (&sum)[ROWS][G], int j) const {
    TK_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const int i = sum_at(a, first + r) + at;
      set_number(i, number(i) + sum[r][j]);
    }
  }
  TK_INLINE void store_numbers(int i, uint64_t base, int64_t element) const {
    Real to[V];
    numbers(i, to);
    store_floats(base, element, to);
  }
};

// The thread's sums: zero before its steps.
template <class Kernel>
TK_INLINE void clear_sums(const LifArgs& a, const Slots<Kernel>& slots) {
  constexpr int V = Kernel::V;
  constexpr bool FUSED = Kernel::FUSED;
  TK_UNROLL
  for (int i = 0; FUSED && i < kNormSums * V; ++i) slots.set_number(slots.sum_at(a, 0) + i, Real(0.0f));
  if (a.gparams == 0) return;
  TK_UNROLL
  for (int i = 0; i < Kernel::kRows * V; ++i) slots.set_number(slots.sum_at(a, FUSED ? kNormSums : 0) + i, Real(0.0f));
}

// Then one number of row r, or V columns of the workspace [rows, N].
template <class Kernel>
TK_INLINE Real sum_of(const LifArgs& a, const Slots<Kernel>& slots, int r) {
  Real sum = 0.0f;
  TK_UNROLL
  for (int j = 0; j < Kernel::V; ++j) sum += slots.number(slots.sum_at(a, r) + j);
  return sum;
}
template <class Kernel>
TK_INLINE void store_sums(const LifArgs& a, int rows, int64_t n, const Slots<Kernel>& slots) {
  constexpr bool FUSED = Kernel::FUSED;
  TK_UNROLL
  for (int r = 0; r < (FUSED ? kNormSums : 0) + Kernel::kRows; ++r) {
    if (!FUSED || r < rows) slots.store_numbers(slots.sum_at(a, r), a.workspace, index::offset(r, n, a.N));
  }
}

// Number o of a block's sums of row r (index::Tiles), once all its threads are through: what the threads of column o /
// lanes left for the numbers that share the channel. `slots`: those of the first thread.
template <class Kernel>
TK_INLINE Real tile_sum(const LifArgs& a, const index::Tiles& t, const Slots<Kernel>& slots, int r, int o) {
  const int first = slots.sum_at(a, r) + o % t.lanes, more = t.lanes == 1 ? Kernel::V : 1;
  Real sum = 0.0f;
  for (int thread = o / t.lanes; thread < t.threads; thread += 1 << t.shift) {
    for (int j = 0; j < more; ++j) sum += Float32::unpack(slots.words[(first + j) * slots.stride + thread], 0);
  }
  return sum;
}

}  // namespace cuda
}  // namespace trtkern
