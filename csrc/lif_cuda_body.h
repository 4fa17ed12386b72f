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
    const int64_t first = index::offset(c * K, n, a.N);
    Pack<E, V> x[K];
    load_steps<E>(a.x, first, a.N, count, x);
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
      const int64_t here = first + index::offset(k, 0, a.N);
      Pack<E, V> out;
      if (a.s != 0) {
        out.set(0, s);
        out.store(address<E>(a.s, here));
      }
      if (a.v != 0) {
        out.set(0, v);
        out.store(address<E>(a.v, here));
      }
    }
    if (LOOP && c + 1 < chunks) store_floats(a.edges, index::offset(c, n, a.N), v);
  }
  store_floats(a.v_final, n, v);
  return watch == watch;
}

// ---- backward ----

// Where a thread adds up its parameter gradients over the steps: neuron j's number of row r is (r * V + j) * stride on.
// The row `reset` serves whichever of reset_amount and v_reset is in use.
enum Sum : int { kSumDecay, kSumGain, kSumBias, kSumReset, kSumThreshold, kSums };
struct Sums {
  Real* at;
  int stride;
};
template <int V>
TK_INLINE void clear_sums(const Sums& sums) {
  TK_UNROLL
  for (int i = 0; i < kSums * V; ++i) sums.at[i * sums.stride] = 0.0f;
}
// As columns n .. n + V - 1 of the workspace [kSums, N].
template <int V>
TK_INLINE void store_sums(const LifArgs& a, int64_t n, const Sums& sums) {
  TK_UNROLL
  for (int r = 0; r < kSums; ++r) {
    Real row[V];
    TK_UNROLL
    for (int j = 0; j < V; ++j) row[j] = sums.at[(r * V + j) * sums.stride];
    store_floats(a.workspace, index::offset(r, n, a.N), row);
  }
}

// A chunk of steps of V neurons, in registers.
template <class E, int V, int K>
struct Chunk {
  int64_t first;    // element of the first step
  int count;        // steps that exist, K at most
  Pack<E, V> x[K];
  Pack<E, V> g[K];  // gs, then gx
  Real start[V];    // v before the first step

  TK_INLINE Chunk(const LifArgs& a, int64_t n, int64_t step)
      : first(index::offset(step, n, a.N)), count(steps(a, step, K)) {
    load_steps<E>(a.x, first, a.N, count, x);
    if (a.gs != 0) load_steps<E>(a.gs, first, a.N, count, g);
  }
  TK_INLINE void store(const LifArgs& a) const {
    uint64_t at = address<E>(a.gx, first);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k < count) g[k].store(at);
      at = address<E>(at, a.N);
    }
  }
};

// Adds gv of step k, where it came, for the G neurons from number `at` on.
template <class E, int V, int K, int G>
TK_INLINE void add_gv(const LifArgs& a, const Chunk<E, V, K>& chunk, int k, int at, Real (&gv)[V], Pack<E, G> more) {
  more.load(address<E>(a.gv, chunk.first + index::offset(k, at, a.N)));
  TK_UNROLL
  for (int j = 0; j < G; ++j) gv[at + j] += more.get(j);
}

// The chunk's steps for G of its V neurons, from number `at` on: h forward out of x, then backward, g from gs to gx.
template <int SURROGATE, class E, int V, int K, int G>
TK_INLINE void group_back(const LifArgs& a, const Neuron<Real> (&p)[G], int at, Chunk<E, V, K>& chunk, Real (&gv)[V],
                          const Sums& sums) {
  const bool hard = a.reset == kHard;
  const bool attached = a.reset != kNone && a.detach == 0;
  const bool learn = a.gparams != 0;
  Real h[K][G];
  Real sum[kSums][G] = {};
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    Real v = chunk.start[at + j];
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      h[k][j] = charge(p[j], v, chunk.x[k].get(at + j));
      v = reset_after_flat(p[j], h[k][j], hard);
    }
  }
  TK_UNROLL
  for (int k = K - 1; k >= 0; --k) {
    if (k >= chunk.count) continue;
    if (a.gv != 0) add_gv(a, chunk, k, at, gv, Pack<E, G>());
    Real gx[G];
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      const StepGradient<Real> g = step_gradient_flat<SURROGATE>(
          p[j], h[k][j], chunk.g[k].get(at + j), gv[at + j], lit<Real>(a.alpha), hard, attached);
      gx[j] = p[j].gain * g.h;
      gv[at + j] = p[j].decay * g.h;
      if (!learn) continue;
      const Real v = k == 0 ? chunk.start[at + j] : reset_after_flat(p[j], again(a, h[k == 0 ? 0 : k - 1][j]), hard);
      sum[kSumDecay][j] = fma_(g.h, v, sum[kSumDecay][j]);
      sum[kSumGain][j] = fma_(g.h, chunk.x[k].get(at + j), sum[kSumGain][j]);
      sum[kSumBias][j] += g.h;
      sum[kSumReset][j] += g.v_reset;
      sum[kSumThreshold][j] += g.threshold;
    }
    chunk.g[k].set(at, gx);
  }
  if (!learn) return;
  TK_UNROLL
  for (int r = 0; r < kSums; ++r) {
    TK_UNROLL
    for (int j = 0; j < G; ++j) sums.at[(r * V + at + j) * sums.stride] += sum[r][j];
  }
}

// All steps of the neurons n .. n + V - 1, last first. Nothing but x (and the edges) was saved: h is recomputed, for a few
// neurons at a time, so that of a chunk of 16 steps of 8 neurons only x and gs fill registers, packed as they came.
template <class E, int V, int K, bool LOOP, int SURROGATE>
TK_INLINE void backward_thread(const LifArgs& a, int64_t n, const Sums& sums) {
  constexpr int kFit = K > 8 ? 2 : 4;  // neurons whose h fits
  constexpr int G = V < kFit ? V : kFit;
  Real gv[V];
  const Parameters first(a, n);
  load_floats(a.gv_final, n, gv);
  for (int64_t c = LOOP ? index::chunks(a.T, K) - 1 : 0; c >= 0; --c) {
    Chunk<E, V, K> chunk(a, n, c * K);
    if (LOOP && c > 0) {
      load_floats(a.edges, index::offset(c - 1, n, a.N), chunk.start);
    } else {
      load_floats(a.v0, n, chunk.start);
    }
    Parameters parameters = first;
    TK_UNROLL
    for (int at = 0; at < V; at += G) {
      Neuron<Real> p[G];
      parameters.next(a, p);
      group_back<SURROGATE>(a, p, at, chunk, gv, sums);
    }
    chunk.store(a);
  }
  store_floats(a.gv0, n, gv);
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
  const Real out[1] = {sum}, negative[1] = {-sum}, zero[1] = {0.0f};
  if (row != kSumReset) {
    store_floats(a.gparams, index::offset(row, channel, r.C), out);
    return;
  }
  store_floats(a.gparams, index::offset(kResetAmount, channel, r.C), a.reset == kSoft ? negative : zero);
  store_floats(a.gparams, index::offset(kVReset, channel, r.C), a.reset == kHard ? out : zero);
}

}  // namespace cuda
}  // namespace trtkern
