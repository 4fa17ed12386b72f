// What one thread of the LIF backward kernel does. E, V, K, LOOP: see lif_cuda_body.h, which includes this.
#pragma once

namespace trtkern {
namespace cuda {

// What a thread keeps in its own words of shared memory: there, unlike in registers, a loop can index it. Word i of all
// threads lies together, so that no two lanes meet in a bank.
template <class E, int V, int K>
struct Slots {
  static constexpr int kWords = Pack<E, V>::kWords;
  static constexpr int kX = 0, kG = K * kWords;  // [K, words]: x; gs, then gx
  static constexpr int kStart = 2 * K * kWords;  // [V]: v before the chunk
  static constexpr int kGv = kStart + V;         // [V]: gradient of v, carried from step to step
  static constexpr int kSum = kGv + V;           // [kSums, V], where parameters have gradients
  static constexpr int kEnd = kSum + kSums * V;

  uint32_t* words;
  int stride;

  TK_INLINE uint32_t& word(int i) const { return words[i * stride]; }
  TK_INLINE Real number(int i) const { return Float32::unpack(word(i), 0); }
  TK_INLINE void set_number(int i, Real value) const { word(i) = Float32::pack(value, value); }
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
  TK_INLINE void load_numbers(int i, uint64_t base, int64_t element) const {
    Real from[V];
    load_floats(base, element, from);
    TK_UNROLL
    for (int j = 0; j < V; ++j) set_number(i + j, from[j]);
  }
  // Adds column j of `sum` to the sums of neuron number `at`.
  template <int G>
  TK_INLINE void add_sums(int at, const Real (&sum)[kSums][G], int j) const {
    TK_UNROLL
    for (int r = 0; r < kSums; ++r) set_number(kSum + r * V + at, number(kSum + r * V + at) + sum[r][j]);
  }
  TK_INLINE void store_numbers(int i, uint64_t base, int64_t element) const {
    Real to[V];
    TK_UNROLL
    for (int j = 0; j < V; ++j) to[j] = number(i + j);
    store_floats(base, element, to);
  }
};

// Reads a chunk's x and gs: all loads first, so that all are in flight together.
template <class E, int V, int K>
TK_INLINE void load_chunk(const LifArgs& a, int64_t first, int count, const Slots<E, V, K>& slots) {
  using S = Slots<E, V, K>;
  const int64_t N = again(count, a.N);
  Pack<E, V> x[K], g[K];
  load_steps<E>(a.x, first, N, count, x);
  if (a.gs != 0) load_steps<E>(a.gs, first, N, count, g);
  TK_UNROLL
  for (int k = 0; k < K; ++k) slots.set_pack(S::kX + k * S::kWords, x[k]);
  TK_UNROLL
  for (int k = 0; k < K; ++k) slots.set_pack(S::kG + k * S::kWords, g[k]);
}

template <class E, int V, int K>
TK_INLINE void store_chunk(const LifArgs& a, int64_t first, int count, const Slots<E, V, K>& slots) {
  using S = Slots<E, V, K>;
  const int64_t N = again(count, a.N);
  uint64_t at = address<E>(a.gx, first);
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    if (k >= count) break;
    slots.template pack<Pack<E, V>>(S::kG + k * S::kWords).store(at);
    at = address<E>(at, N);
  }
}

// Adds G neighbouring elements to gv: the only access that may be narrower than 16 bytes.
template <class E, int G>
TK_INLINE void add_gv(uint64_t address, Real (&gv)[G]) {
  Pack<E, G> more;
  more.load(address);
  TK_UNROLL
  for (int j = 0; j < G; ++j) gv[j] += more.get(j);
}

// h of a chunk's steps for G of the V neurons, number `at` and its neighbours.
template <int G, class E, int V, int K>
TK_INLINE void recompute(const LifArgs& a, const Neuron<Real> (&p)[G], int at, const Slots<E, V, K>& slots,
                         Real (&h)[K][G]) {
  using S = Slots<E, V, K>;
  using Part = Pack<E, G>;
  Real v[G];
  TK_UNROLL
  for (int j = 0; j < G; ++j) v[j] = slots.number(S::kStart + at + j);
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    const Part x = slots.template pack<Part>(S::kX + k * S::kWords + at / Part::kPerWord);
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      h[k][j] = charge(p[j], v[j], x.get(j));
      v[j] = reset_after_flat(p[j], h[k][j], a.reset == kHard);
    }
  }
}

// The same steps backward, gs replaced by gx. `first`: element of the chunk's first step.
template <int SURROGATE, int G, class E, int V, int K>
TK_INLINE void group_back(const LifArgs& a, const Neuron<Real> (&p)[G], int64_t first, int count, int at,
                          const Slots<E, V, K>& slots) {
  using S = Slots<E, V, K>;
  using Part = Pack<E, G>;
  const int word = at / Part::kPerWord;
  const bool hard = a.reset == kHard, attached = a.reset != kNone && a.detach == 0, learn = a.gparams != 0;
  const int64_t N = again(count, a.N);
  Real h[K][G], gv[G], sum[kSums][G] = {};
  recompute(a, p, at, slots, h);
  TK_UNROLL
  for (int j = 0; j < G; ++j) gv[j] = slots.number(S::kGv + at + j);
  Part next = slots.template pack<Part>(S::kG + (K - 1) * S::kWords + word);
  TK_UNROLL
  for (int k = K - 1; k >= 0; --k) {
    const Part gs = next;
    if (k > 0) next = slots.template pack<Part>(S::kG + (k - 1) * S::kWords + word);  // before it is needed
    if (k >= count) continue;
    if (a.gv != 0) add_gv<E>(address<E>(a.gv, first + index::offset(k, at, N)), gv);
    Real gx[G];
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      const StepGradient<Real> g =
          step_gradient_flat<SURROGATE>(p[j], h[k][j], gs.get(j), gv[j], lit<Real>(a.alpha), hard, attached);
      gx[j] = p[j].gain * g.h;
      gv[j] = p[j].decay * g.h;
      if (!learn) continue;
      const Part x = slots.template pack<Part>(S::kX + k * S::kWords + word);
      const Real v = k == 0 ? slots.number(S::kStart + at + j)
                            : reset_after_flat(p[j], again(count, h[k == 0 ? 0 : k - 1][j]), hard);
      sum[kSumDecay][j] = fma_(g.h, v, sum[kSumDecay][j]);
      sum[kSumGain][j] = fma_(g.h, x.get(j), sum[kSumGain][j]);
      sum[kSumBias][j] += g.h;
      sum[kSumReset][j] += g.v_reset;
      sum[kSumThreshold][j] += g.threshold;
    }
    Part out;
    out.set(gx);
    slots.set_pack(S::kG + k * S::kWords + word, out);
  }
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    slots.set_number(S::kGv + at + j, gv[j]);
    if (learn) slots.add_sums(at + j, sum, j);
  }
}

// All steps of the neurons n .. n + V - 1, last first. Nothing but x (and the edges) was saved: h is recomputed, for a
// few neurons at a time, in a loop that stays one: all at once would not fit the registers (8 neurons of 16 steps), nor
// its code the instruction cache.
template <class E, int V, int K, bool LOOP, int SURROGATE>
TK_INLINE void backward_thread(const LifArgs& a, int64_t n, const Slots<E, V, K>& slots) {
  using S = Slots<E, V, K>;
  constexpr int kFit = K > 8 ? 2 : 4;
  constexpr int G = V < kFit ? V : kFit;
  const Parameters all(a, n);
  slots.load_numbers(S::kGv, a.gv_final, n);
  for (int64_t c = LOOP ? index::chunks(a.T, K) - 1 : 0; c >= 0; --c) {
    const int64_t first = index::offset(c * K, n, a.N);
    const int count = steps(a, c * K, K);
    load_chunk(a, first, count, slots);
    if (LOOP && c > 0) {
      slots.load_numbers(S::kStart, a.edges, index::offset(c - 1, n, a.N));
    } else {
      slots.load_numbers(S::kStart, a.v0, n);
    }
    Parameters parameters = all;
    TK_ROLLED
    for (int at = 0; at < V; at += G) {
      Neuron<Real> p[G];
      parameters.next(a, p);
      group_back<SURROGATE, G>(a, p, first, count, at, slots);
    }
    store_chunk(a, first, count, slots);
  }
  slots.store_numbers(S::kGv, a.gv0, n);
}

// The thread's sums: zero before its steps, then one number of row r, or V columns of the workspace [kSums, N].
template <class E, int V, int K>
TK_INLINE void clear_sums(const Slots<E, V, K>& slots) {
  TK_UNROLL
  for (int i = 0; i < kSums * V; ++i) slots.set_number(Slots<E, V, K>::kSum + i, Real(0.0f));
}
template <class E, int V, int K>
TK_INLINE Real sum_of(const Slots<E, V, K>& slots, int r) {
  Real sum = 0.0f;
  TK_UNROLL
  for (int j = 0; j < V; ++j) sum += slots.number(Slots<E, V, K>::kSum + r * V + j);
  return sum;
}
template <class E, int V, int K>
TK_INLINE void store_sums(const LifArgs& a, int64_t n, const Slots<E, V, K>& slots) {
  TK_UNROLL
  for (int r = 0; r < kSums; ++r) {
    slots.store_numbers(Slots<E, V, K>::kSum + r * V, a.workspace, index::offset(r, n, a.N));
  }
}

}  // namespace cuda
}  // namespace trtkern
