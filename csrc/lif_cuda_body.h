// What one thread of the LIF kernels does, from its first neuron on: all of it but the launch and the sums over a
// block, so that g++ can run it thread by thread too (tests/test_cuda_build.py).
//
// E: element type; V: neighbouring neurons a thread owns (one 16-byte access of E, or 1); K: steps of a chunk, which
// live in registers, so every array is indexed by constants; LOOP: T may exceed K. Include after a dialect.
#pragma once

namespace trtkern {
namespace cuda {

// V neighbouring elements of one step, as they lie in memory.
template <class E, int V>
struct Pack {
  static constexpr int kWords = (V * E::kBytes + 3) / 4;
  static constexpr int kPerWord = 4 / E::kBytes;
  uint32_t words[kWords] = {};

  TK_INLINE Real get(int j) const { return E::unpack(words[j / kPerWord], j % kPerWord); }
  // Elements j, j + 1, ... j + G - 1; G is V, or a whole word.
  template <int G>
  TK_INLINE void set(int j, const Real (&from)[G]) {
    constexpr int kEach = kPerWord < G ? kPerWord : G;
    TK_UNROLL
    for (int i = 0; i < G; i += kEach) words[(j + i) / kPerWord] = E::pack(from[i], kEach > 1 ? from[i + kEach - 1] : Real(0.0f));
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
    part.set(0, some);
    part.store(address<Float32>(base, element + j));
  }
}

// The parameters of one neuron after the other. Only one of reset_amount and v_reset is ever used: both name one
// register, which is 0 where there is no reset.
struct Parameters {
  Neuron<Real> shared;
  index::Channel at{0, 0};
  bool per_channel;

  TK_INLINE Parameters(const LifArgs& a, int64_t n) : per_channel(a.params != 0 && a.C > 1) {
    if (per_channel) {
      at = index::Channel::of(n, a.inner, a.C);
    } else if (a.params != 0) {
      shared = load(a, 0);
    } else {
      const float reset = a.reset == kHard ? a.scalars[kVReset] : a.reset == kSoft ? a.scalars[kResetAmount] : 0.0f;
      shared = {a.scalars[kDecay], a.scalars[kGain], a.scalars[kBias], reset, a.scalars[kThreshold], reset};
    }
  }
  TK_INLINE static Real row(const LifArgs& a, int row, int64_t channel) {
    Pack<Float32, 1> value;
    value.load(address<Float32>(a.params, index::offset(row, channel, a.C)));
    return value.get(0);
  }
  TK_INLINE static Neuron<Real> load(const LifArgs& a, int64_t c) {
    Real reset = row(a, a.reset == kHard ? kVReset : kResetAmount, c);
    if (a.reset == kNone) reset = 0.0f;
    return {row(a, kDecay, c), row(a, kGain, c), row(a, kBias, c), reset, row(a, kThreshold, c), reset};
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
};

// The same number, in a way that no compiler sees through (a count is never negative): what follows from it is computed
// anew where it is used, instead of being kept in registers from an earlier use, or from before a loop.
TK_INLINE int64_t again(int count, int64_t value) { return value ^ (count >> 31); }
TK_INLINE Real again(int count, Real value) {
  return Float32::unpack(Float32::pack(value, value) ^ static_cast<uint32_t>(count >> 31), 0);
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

// ---- forward ----

// Steps of the chunk that begins at step `first`.
TK_INLINE int steps(const LifArgs& a, int64_t first, int chunk) {
  return a.T - first < chunk ? static_cast<int>(a.T - first) : chunk;
}

// Runs all steps of the neurons n .. n + V - 1; false if any h was not finite.
template <class E, int V, int K, bool LOOP>
TK_INLINE bool forward_thread(const LifArgs& a, int64_t n) {
  Neuron<Real> p[V];
  Real v[V];
  Parameters(a, n).next(a, p);
  load_floats(a.v0, n, v);
  const bool hard = a.reset == kHard;
  Real watch = Real(0.0f);  // h * 0 added up: NaN as soon as one h is NaN or infinite
  const int64_t chunks = LOOP ? index::chunks(a.T, K) : 1;
  for (int64_t c = 0; c < chunks; ++c) {
    const int count = steps(a, c * K, K);
    const int64_t N = again(count, a.N);
    int64_t here = index::offset(c * K, n, a.N);
    Pack<E, V> x[K];
    load_steps<E>(a.x, here, N, count, x);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      Real s[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) {
        const Real h = charge(p[j], v[j], x[k].get(j));
        watch = fma_(h, 0.0f, watch);
        s[j] = fire(p[j], h);
        v[j] = reset_after_flat(p[j], h, hard);
      }
      Pack<E, V> out;
      if (a.s != 0) {
        out.set(0, s);
        out.store(address<E>(a.s, here));
      }
      if (a.v != 0) {
        out.set(0, v);
        out.store(address<E>(a.v, here));
      }
      here += N;
    }
    if (LOOP && c + 1 < chunks) store_floats(a.edges, index::offset(c, n, a.N), v);
  }
  store_floats(a.v_final, n, v);
  return watch == watch;
}

// ---- backward ----

// Rows of the parameter gradients' sums: `reset` serves whichever of reset_amount and v_reset is in use.
enum Sum : int { kSumDecay, kSumGain, kSumBias, kSumReset, kSumThreshold, kSums };

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

// A chunk's steps for G of the V neurons, number `at` and its neighbours: h forward out of x, into registers, then
// backward, gs replaced by gx. `first`: element of the chunk's first step.
template <int SURROGATE, int G, class E, int V, int K>
TK_INLINE void group_back(const LifArgs& a, const Neuron<Real> (&p)[G], int64_t first, int count, int at,
                          const Slots<E, V, K>& slots) {
  using S = Slots<E, V, K>;
  using Part = Pack<E, G>;
  const int x = S::kX + at / Part::kPerWord, g = S::kG + at / Part::kPerWord;  // word of step 0
  const bool hard = a.reset == kHard;
  const bool attached = a.reset != kNone && a.detach == 0;
  const bool learn = a.gparams != 0;
  const int64_t N = again(count, a.N);
  Real h[K][G];
  Real gv[G];
  Real sum[kSums][G] = {};
  Real v[G];
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    v[j] = slots.number(S::kStart + at + j);
    gv[j] = slots.number(S::kGv + at + j);
  }
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    const Part part = slots.template pack<Part>(x + k * S::kWords);
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      h[k][j] = charge(p[j], v[j], part.get(j));
      v[j] = reset_after_flat(p[j], h[k][j], hard);
    }
  }
  Part gs = slots.template pack<Part>(g + (K - 1) * S::kWords);
  TK_UNROLL
  for (int k = K - 1; k >= 0; --k) {
    const Part now = gs;
    if (k > 0) gs = slots.template pack<Part>(g + (k - 1) * S::kWords);  // before it is needed
    if (k >= count) continue;
    if (a.gv != 0) add_gv<E>(address<E>(a.gv, first + index::offset(k, at, N)), gv);
    Real gx[G];
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      const StepGradient<Real> step = step_gradient_flat<SURROGATE>(p[j], h[k][j], now.get(j), gv[j],
                                                                    lit<Real>(a.alpha), hard, attached);
      gx[j] = p[j].gain * step.h;
      gv[j] = p[j].decay * step.h;
      if (!learn) continue;
      const Real before =
          k == 0 ? slots.number(S::kStart + at + j) : reset_after_flat(p[j], again(count, h[k == 0 ? 0 : k - 1][j]), hard);
      sum[kSumDecay][j] = fma_(step.h, before, sum[kSumDecay][j]);
      sum[kSumGain][j] = fma_(step.h, slots.template pack<Part>(x + k * S::kWords).get(j), sum[kSumGain][j]);
      sum[kSumBias][j] += step.h;
      sum[kSumReset][j] += step.v_reset;
      sum[kSumThreshold][j] += step.threshold;
    }
    Part out;
    out.set(0, gx);
    slots.set_pack(g + k * S::kWords, out);
  }
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    slots.set_number(S::kGv + at + j, gv[j]);
    if (!learn) continue;
    TK_UNROLL
    for (int r = 0; r < kSums; ++r) {
      const int i = S::kSum + r * V + at + j;
      slots.set_number(i, slots.number(i) + sum[r][j]);
    }
  }
}

// All steps of the neurons n .. n + V - 1, last first. Nothing but x (and the edges) was saved: h is recomputed, for a few
// neurons at a time, in a loop that stays one: all at once would not fit the registers (8 neurons of 16 steps), nor its
// code the instruction cache.
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

// ---- sums over neurons ----

// What one thread of the reduction adds up of its segment of a row of the workspace.
TK_INLINE Real segment_sum(const index::Reduction& r, uint64_t workspace, int64_t block, int thread) {
  const index::Reduction::Place place = r.place(block, kSums);
  const int64_t channel = r.channel(place.tile, thread);
  Real sum = 0.0f;
  if (channel >= r.C) return sum;
  int64_t end = (place.segment + 1) * r.span();
  if (end > r.members()) end = r.members();
  for (int64_t k = place.segment * r.span() + r.start(thread); k < end; k += r.stride()) {
    const int64_t m = r.member(k, channel);
    if (m >= r.M) break;
    Pack<Float32, 1> value;
    value.load(address<Float32>(workspace, index::offset(place.row, m, r.M)));
    sum += value.get(0);
  }
  return sum;
}

TK_INLINE void store_one(uint64_t base, int64_t element, Real value) {
  Pack<Float32, 1> out;
  const Real one[1] = {value};
  out.set(0, one);
  out.store(address<Float32>(base, element));
}

// Adds up the segments [segments, kSums, C] of number i of [kSums, C], and writes the gradient [kParams, C].
TK_INLINE void finish_sum(const LifArgs& a, const index::Reduction& r, int64_t i) {
  const uint64_t segments = address<Float32>(a.workspace, kSums * r.M);
  Pack<Float32, 1> part;
  Real sum = 0.0f;
  for (int64_t segment = 0; segment < r.segments(); ++segment) {
    part.load(address<Float32>(segments, index::offset(segment, i, kSums * r.C)));
    sum += part.get(0);
  }
  const int row = static_cast<int>(index::divide(i, r.C));
  const int64_t channel = i - row * r.C;
  if (row != kSumReset) return store_one(a.gparams, index::offset(row, channel, r.C), sum);
  const Real zero = 0.0f;
  store_one(a.gparams, index::offset(kResetAmount, channel, r.C), where_(a.reset == kSoft, -sum, zero));
  store_one(a.gparams, index::offset(kVReset, channel, r.C), where_(a.reset == kHard, sum, zero));
}

}  // namespace cuda
}  // namespace trtkern
