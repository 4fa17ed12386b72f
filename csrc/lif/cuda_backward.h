// What one thread of the LIF backward kernel does. Included by lif/cuda_body.h.
#pragma once

namespace trtkern {
namespace cuda {

// Reads at most K steps of a tensor into the slots from `slot` on, `apart` from step to step; absent: zeros.
template <class Kernel>
TK_INLINE void load_rows(const LifArgs& a, uint64_t base, int64_t first, int64_t N, int count,
                         const Slots<Kernel>& slots, int slot, int apart) {
  typename Kernel::Row rows[Kernel::K];
  if (base != 0) load_rows<Kernel>(a, base, first, N, count, rows);
  slots.set_packs(slot, apart, rows);
}

// The gs of pooled spikes, but for 1/4. Where a pack makes half as many averages, each stands for two neighbours.
template <class Kernel>
TK_INLINE void load_pooled(const LifArgs& a, int64_t step, int64_t n, int count, const Slots<Kernel>& slots, int slot) {
  using E = typename Kernel::E;
  using S = Slots<Kernel>;
  constexpr int V = Kernel::V, K = Kernel::K;
  const index::Pool pool{a.pool_row, a.pool_side};
  const int64_t N = again(count, a.N / 4), first = index::offset(step, pool.pooled(n), N);
  if (pool.over(V)) return load_rows(a, a.gs, first, N, count, slots, slot, S::kApart);
  if constexpr (V > 1) {
    Pack<E, V / 2> half[K];
    if (a.gs != 0) load_steps<E>(a.gs, first, N, count, half);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      TK_UNROLL
      for (int w = 0; w < S::kRow; ++w) slots.word(slot + k * S::kApart + w) = E::twice(half[k].words[w / 2], w);
    }
  }
}

// Reads a chunk's x and gs: all loads first, so that all are in flight together. FUSED: K steps of one tensor after the
// other, for that is where registers are scarce.
template <class Kernel>
TK_INLINE void load_chunk(const LifArgs& a, int64_t step, int64_t n, int count, const Slots<Kernel>& slots) {
  using E = typename Kernel::E;
  using S = Slots<Kernel>;
  constexpr int K = Kernel::K;
  const int64_t N = again(count, a.N), first = index::offset(step, n, a.N);
  if constexpr (!Kernel::FUSED) {
    typename Kernel::Row x[K], g[K];
    load_steps<E>(a.x, first, N, count, x);
    if (a.gs != 0) load_steps<E>(a.gs, first, N, count, g);
    slots.set_packs(S::x(0), S::kApart, x);
    slots.set_packs(S::g(0), S::kApart, g);
  } else {
    TK_ROLLED
    for (int done = 0; done < count; done += K) {
      const int left = count - done;
      const int64_t here = first + done * N, stride = again(count, a.x_stride);
      load_rows(a, a.x, index::offset(step + done, n, stride), stride, left, slots, S::x(done), S::kApart);
      if (a.pool_row != 0) {
        load_pooled(a, step + done, n, left, slots, S::g(done));
      } else {
        load_rows(a, a.gs, here, N, left, slots, S::g(done), S::kApart);
      }
      if (a.residual != 0) load_rows(a, a.residual, here, N, left, slots, slots.residual(done), S::kRow);
    }
  }
}

template <class Kernel>
TK_INLINE void store_chunk(const LifArgs& a, int64_t first, int count, const Slots<Kernel>& slots) {
  using E = typename Kernel::E;
  using S = Slots<Kernel>;
  constexpr int K = Kernel::K;
  constexpr bool FUSED = Kernel::FUSED;
  if (FUSED && a.gx == 0) return;
  const int64_t N = again(count, a.N);
  uint64_t at = address<E>(a.gx, first);
  TK_ROLLED
  for (int done = 0; done < (FUSED ? count : K); done += K) {
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (done + k >= count) break;
      slots.template pack<typename Kernel::Row>(S::g(done + k)).store(at);
      at = address<E>(at, N);
    }
  }
}

// Adds G neighbouring elements of gv to the gradient of v, or of h: the only access that may be narrower than 16 bytes.
template <class E, int G>
TK_INLINE void add_gv(uint64_t address, Real (&to)[G]) {
  Pack<E, G> more;
  more.load(address);
  TK_UNROLL
  for (int j = 0; j < G; ++j) to[j] += more.get(j);
}

// The input current of step k for G of the V neurons, number `at` and its neighbours.
template <int G, class Kernel>
TK_INLINE void currents(const LifArgs& a, const Affine3 (&affine)[Kernel::FUSED ? G : 1], int k, int at,
                        const Slots<Kernel>& slots, Real (&current)[G]) {
  using Part = Pack<typename Kernel::E, G>;
  const int word = at / Part::kPerWord;
  const Part x = slots.template pack<Part>(slots.x(k) + word);
  TK_UNROLL
  for (int j = 0; j < G; ++j) current[j] = x.get(j);
  if constexpr (Kernel::FUSED) {
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      const Real* of = affine[j].row;
      current[j] = current_of(current[j], of[kCenter], of[kScale], of[kShift]);
    }
    if (a.residual == 0) return;
    const Part residual = slots.template pack<Part>(slots.residual(k) + word);
    TK_UNROLL
    for (int j = 0; j < G; ++j) current[j] = current[j] + residual.get(j);
  }
}

// h of the K steps from `first` on, v being that before them; it is that after them then.
template <int G, class Kernel>
TK_INLINE void recompute(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[Kernel::FUSED ? G : 1],
                         int first, int at, const Slots<Kernel>& slots, Real (&v)[G], Real (&h)[Kernel::K][G]) {
  TK_UNROLL
  for (int k = 0; k < Kernel::K; ++k) {
    Real current[G];
    currents(a, affine, first + k, at, slots, current);
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      h[k][j] = charge(p[j], v[j], current[j]);
      v[j] = reset_after_flat(p[j], h[k][j], a.reset == kHard);
    }
  }
}

constexpr int kAnySurrogate = -1;  // in place of one

// The surrogates of the K steps, chosen at run time, once for all of them.
template <int ID, int K, int G>
TK_INLINE void slopes(const LifArgs& a, const Neuron<Real> (&p)[G], const Real (&h)[K][G], Real (&sg)[K][G]) {
  if constexpr (ID < kSurrogates) {
    if (a.surrogate != ID) return slopes<ID + 1>(a, p, h, sg);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      TK_UNROLL
      for (int j = 0; j < G; ++j) sg[k][j] = surrogate<ID>(h[k][j] - p[j].threshold, lit<Real>(a.alpha));
    }
  }
}

// What is written for x, from the gradient of the input current and x - center.
TK_INLINE Real input_gradient(Real gx, Real deviation, const Affine3& coef) {
  return fma_(coef.row[0], gx, fma_(coef.row[1], deviation, coef.row[2]));
}

// What a normalised x makes of a step's gx: its part of the sums, and what is written.
template <class P, int G>
TK_INLINE void normalized(const LifArgs& a, const Affine3 (&affine)[G], const Affine3 (&coef)[G], const P& x,
                          Real (&gx)[G], Real (&norm)[kNormSums][G]) {
  Real deviation[G];
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    deviation[j] = x.get(j) - affine[j].row[kCenter];
    norm[kNormGradient][j] += gx[j];
    norm[kNormProduct][j] = fma_(gx[j], deviation[j], norm[kNormProduct][j]);
  }
  if (a.coef == 0) return;
  TK_UNROLL
  for (int j = 0; j < G; ++j) gx[j] = input_gradient(gx[j], deviation[j], coef[j]);
}

// The part of step k, whose v before it is `v`, in the sums that are the parameters' gradients.
template <int G>
TK_INLINE void learned(const Real (&current)[G], const Real (&v)[G], const StepGradient<Real> (&g)[G],
                       Real (&sum)[kSums][G]) {
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    sum[kSumDecay][j] = fma_(g[j].h, v[j], sum[kSumDecay][j]);
    sum[kSumGain][j] = fma_(g[j].h, current[j], sum[kSumGain][j]);
    sum[kSumBias][j] += g[j].h;
    sum[kSumReset][j] += g[j].v_reset;
    sum[kSumThreshold][j] += g[j].threshold;
  }
}

// The `count` steps from `first` of a chunk on backward, gs replaced by gx, at most K; h and start: of these steps.
// `element`: that of the chunk's first step.
template <int SURROGATE, int G, class Kernel>
TK_INLINE void steps_back(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[Kernel::FUSED ? G : 1],
                          const Affine3 (&coef)[Kernel::FUSED ? G : 1], int64_t element, int first, int count, int at,
                          const Slots<Kernel>& slots, const Real (&start)[G], const Real (&h)[Kernel::K][G]) {
  using E = typename Kernel::E;
  using S = Slots<Kernel>;
  constexpr int K = Kernel::K;
  constexpr bool FUSED = Kernel::FUSED;
  using Part = Pack<E, G>;
  const int word = at / Part::kPerWord;
  const bool hard = a.reset == kHard, attached = a.reset != kNone && a.detach == 0, learn = a.gparams != 0;
  const int64_t N = again(count, a.N);
  const Real share = FUSED && a.pool_row != 0 ? 0.25f : 1.0f;
  constexpr bool kAny = SURROGATE == kAnySurrogate;
  Real sg[kAny ? K : 1][G], carry[G], sum[kSums][G] = {}, norm[kNormSums][G] = {};
  if constexpr (kAny) slopes<0>(a, p, h, sg);
  TK_UNROLL
  for (int j = 0; j < G; ++j) carry[j] = slots.number(S::kCarry + at + j);
  Part next = slots.template pack<Part>(S::g(first + K - 1) + word);
  TK_UNROLL
  for (int k = K - 1; k >= 0; --k) {
    const Part gs = next;
    if (k > 0) next = slots.template pack<Part>(S::g(first + k - 1) + word);  // before it is needed
    if (k >= count) continue;
    if (a.gv != 0 && a.before == 0) add_gv<E>(address<E>(a.gv, element + index::offset(first + k, at, N)), carry);
    Real gx[G], gh[G];
    StepGradient<Real> g[G];
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      Real slope, gradient = gs.get(j);
      if constexpr (FUSED) gradient = share * gradient;
      if constexpr (kAny) {
        slope = sg[k][j];
      } else {
        slope = surrogate<SURROGATE>(h[k][j] - p[j].threshold, lit<Real>(a.alpha));
      }
      g[j] = step_gradient_flat(p[j], h[k][j], slope, gradient, carry[j], hard, attached);
      gh[j] = g[j].h;
    }
    if (a.before != 0) add_gv<E>(address<E>(a.gv, element + index::offset(first + k, at, N)), gh);
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      g[j].h = gh[j];
      gx[j] = p[j].gain * gh[j];
      carry[j] = p[j].decay * gh[j];
    }
    if (learn) {
      Real current[G], v[G];
      currents(a, affine, first + k, at, slots, current);
      TK_UNROLL
      for (int j = 0; j < G; ++j) {
        v[j] = k == 0 ? start[j] : reset_after_flat(p[j], again(count, h[k == 0 ? 0 : k - 1][j]), hard);
      }
      learned(current, v, g, sum);
    }
    if constexpr (FUSED) normalized(a, affine, coef, slots.template pack<Part>(S::x(first + k) + word), gx, norm);
    Part out;
    out.set(gx);
    slots.set_pack(S::g(first + k) + word, out);
  }
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    slots.set_number(S::kCarry + at + j, carry[j]);
    if (learn) slots.add_sums(a, FUSED ? kNormSums : 0, at + j, sum, j);
    if (FUSED && a.norm_sums != 0) slots.add_sums(a, 0, at + j, norm, j);
  }
}

// All steps of a chunk backward, for G of the V neurons. FUSED: the last K first; their h comes of running through all
// before them.
template <int SURROGATE, int G, class Kernel>
TK_INLINE void group_back(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[Kernel::FUSED ? G : 1],
                          const Affine3 (&coef)[Kernel::FUSED ? G : 1], int64_t element, int count, int at,
                          const Slots<Kernel>& slots) {
  constexpr int K = Kernel::K;
  constexpr bool FUSED = Kernel::FUSED;
  TK_ROLLED
  for (int last = FUSED ? (count - 1) / K : 0; last >= 0; --last) {
    Real v[G], start[G], h[K][G];
    slots.numbers(slots.kStart + at, v);
    TK_ROLLED
    for (int part = 0; part <= (FUSED ? last : 0); ++part) {
      TK_UNROLL
      for (int j = 0; j < G; ++j) start[j] = v[j];
      recompute(a, p, affine, part * K, at, slots, v, h);
    }
    steps_back<SURROGATE>(a, p, affine, coef, element, last * K, count - last * K, at, slots, start, h);
  }
}

// All steps of the neurons n .. n + V - 1, last first. Nothing but x (and the edges) was saved: h is recomputed, for a
// few neurons at a time, in a loop that stays one: all at once would not fit the registers (8 neurons of 16 steps), nor
// its code the instruction cache.
template <int SURROGATE, class Kernel>
TK_INLINE void backward_thread(const LifArgs& a, int64_t n, const Slots<Kernel>& slots) {
  using S = Slots<Kernel>;
  constexpr int V = Kernel::V, K = Kernel::K;
  constexpr bool LOOP = Kernel::LOOP, FUSED = Kernel::FUSED;
  constexpr int kFit = FUSED || K > 8 ? 2 : 4, kSpan = LOOP ? kChunk : K;
  constexpr int G = V < kFit ? V : kFit, kAffines = FUSED ? G : 1;
  const Parameters<FUSED> all(a, n);
  slots.load_numbers(S::kCarry, a.gv_final, n);
  for (int64_t c = LOOP ? index::chunks(a.T, kSpan) - 1 : 0; c >= 0; --c) {
    const int count = steps(a, c * kSpan, kSpan);
    load_chunk(a, c * kSpan, n, count, slots);
    if (LOOP && c > 0) {
      slots.load_numbers(S::kStart, a.edges, index::offset(c - 1, n, a.N));
    } else {
      slots.load_numbers(S::kStart, a.v0, n);
    }
    const int64_t first = index::offset(c * kSpan, n, a.N);
    Parameters<FUSED> parameters = all;
    Channels channels(a, FUSED ? again(count, n) : 0);
    TK_ROLLED
    for (int at = 0; at < V; at += G) {
      Neuron<Real> p[G];
      Affine3 affine[kAffines], coef[kAffines];
      if constexpr (FUSED) {
        int64_t channel[G];
        channels.next(a, channel);
        parameters.of(a, channel, p);
        load_affine(a, a.affine, channel, affine);
        load_affine(a, a.coef, channel, coef);
      } else {
        parameters.next(a, p);
      }
      group_back<SURROGATE, G>(a, p, affine, coef, first, count, at, slots);
    }
    store_chunk(a, first, count, slots);
  }
  slots.store_numbers(S::kCarry, a.gv0, n);
}

}  // namespace cuda
}  // namespace trtkern
