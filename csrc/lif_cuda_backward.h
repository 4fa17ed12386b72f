// What one thread of the LIF backward kernel does. E, V, K, LOOP, FUSED: see lif_cuda_body.h, which
// includes this.
#pragma once

namespace trtkern {
namespace cuda {

// Reads `count` steps of a tensor into the slots from `slot` on; absent: zeros.
template <class E, int V, int K, bool FUSED>
TK_INLINE void load_rows(uint64_t base, int64_t first, int64_t N, int count, const Slots<E, V, K, FUSED>& slots,
                         int slot) {
  Pack<E, V> rows[K];
  if (base != 0) load_steps<E>(base, first, N, count, rows);
  slots.set_packs(slot, rows);
}

// The gs of pooled spikes, but for the factor 1/4. Where a pack makes half as many averages, each of those stands for
// two neighbours.
template <class E, int V, int K>
TK_INLINE void load_pooled(const LifArgs& a, int64_t step, int64_t n, int count, const Slots<E, V, K, true>& slots) {
  using S = Slots<E, V, K, true>;
  const index::Pool pool{a.pool_row, a.pool_inner};
  const int64_t N = again(count, a.N / 4), first = index::offset(step, pool.pooled(n), N);
  if (pool.over(V)) return load_rows(a.gs, first, N, count, slots, S::kG);
  if constexpr (V > 1) {
    Pack<E, V / 2> half[K];
    if (a.gs != 0) load_steps<E>(a.gs, first, N, count, half);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      TK_UNROLL
      for (int w = 0; w < S::kRow; ++w) slots.word(S::kG + k * S::kRow + w) = E::twice(half[k].words[w / 2], w);
    }
  }
}

// Reads a chunk's x and gs: all loads first, so that all are in flight together. FUSED: one tensor after the other, for
// that is where registers are scarce.
template <class E, int V, int K, bool FUSED>
TK_INLINE void load_chunk(const LifArgs& a, int64_t step, int64_t n, int count, const Slots<E, V, K, FUSED>& slots) {
  using S = Slots<E, V, K, FUSED>;
  const int64_t N = again(count, a.N), first = index::offset(step, n, a.N);
  if constexpr (FUSED) {
    load_rows(a.x, index::offset(step, n, a.x_stride), again(count, a.x_stride), count, slots, S::kX);
    if (a.pool_row != 0) {
      load_pooled(a, step, n, count, slots);
    } else {
      load_rows(a.gs, first, N, count, slots, S::kG);
    }
    if (a.residual != 0) load_rows(a.residual, first, N, count, slots, S::kResidual);
    return;
  }
  Pack<E, V> x[K], g[K];
  load_steps<E>(a.x, first, N, count, x);
  if (a.gs != 0) load_steps<E>(a.gs, first, N, count, g);
  slots.set_packs(S::kX, x);
  slots.set_packs(S::kG, g);
}

template <class E, int V, int K, bool FUSED>
TK_INLINE void store_chunk(const LifArgs& a, int64_t first, int count, const Slots<E, V, K, FUSED>& slots) {
  using S = Slots<E, V, K, FUSED>;
  if (FUSED && a.gx == 0) return;
  const int64_t N = again(count, a.N);
  uint64_t at = address<E>(a.gx, first);
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    if (k >= count) break;
    slots.template pack<Pack<E, V>>(S::kG + k * S::kRow).store(at);
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

// The input current of step k for G of the V neurons, number `at` and its neighbours.
template <int G, class E, int V, int K, bool FUSED>
TK_INLINE void currents(const LifArgs& a, const Affine3 (&affine)[FUSED ? G : 1], int k, int at,
                        const Slots<E, V, K, FUSED>& slots, Real (&current)[G]) {
  using S = Slots<E, V, K, FUSED>;
  using Part = Pack<E, G>;
  const int word = k * S::kRow + at / Part::kPerWord;
  const Part x = slots.template pack<Part>(S::kX + word);
  TK_UNROLL
  for (int j = 0; j < G; ++j) current[j] = x.get(j);
  if constexpr (FUSED) {
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      const Real* of = affine[j].row;
      current[j] = current_of(current[j], of[kCenter], of[kScale], of[kShift]);
    }
    if (a.residual == 0) return;
    const Part residual = slots.template pack<Part>(S::kResidual + word);
    TK_UNROLL
    for (int j = 0; j < G; ++j) current[j] = current[j] + residual.get(j);
  }
}

// h of a chunk's steps.
template <int G, class E, int V, int K, bool FUSED>
TK_INLINE void recompute(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[FUSED ? G : 1], int at,
                         const Slots<E, V, K, FUSED>& slots, Real (&h)[K][G]) {
  using S = Slots<E, V, K, FUSED>;
  Real v[G];
  TK_UNROLL
  for (int j = 0; j < G; ++j) v[j] = slots.number(S::kStart + at + j);
  TK_UNROLL
  for (int k = 0; k < K; ++k) {
    Real current[G];
    currents(a, affine, k, at, slots, current);
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      h[k][j] = charge(p[j], v[j], current[j]);
      v[j] = reset_after_flat(p[j], h[k][j], a.reset == kHard);
    }
  }
}

// The surrogates of the steps from `first` on, chosen at run time, once for all of them.
template <int ID, int S, int K, int G>
TK_INLINE void slopes(const LifArgs& a, const Neuron<Real> (&p)[G], const Real (&h)[K][G], int first,
                      Real (&sg)[S][G]) {
  if constexpr (ID < kSurrogates) {
    if (a.surrogate != ID) return slopes<ID + 1>(a, p, h, first, sg);
    TK_UNROLL
    for (int k = 0; k < S; ++k) {
      TK_UNROLL
      for (int j = 0; j < G; ++j) sg[k][j] = surrogate<ID>(h[first + k][j] - p[j].threshold, lit<Real>(a.alpha));
    }
  }
}

// What is written for x, from the gradient of the input current.
TK_INLINE Real input_gradient(Real gx, Real x, const Affine3& affine, const Affine3& coef) {
  return fma_(coef.row[0], gx, fma_(coef.row[1], x - affine.row[kCenter], coef.row[2]));
}

// What a normalised x makes of a step's gx: its part of the sums, and what is written.
template <class P, int G>
TK_INLINE void normalized(const LifArgs& a, const Affine3 (&affine)[G], const Affine3 (&coef)[G], const P& x,
                          Real (&gx)[G], Real (&norm)[kNormSums][G]) {
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    const Real deviation = x.get(j) - affine[j].row[kCenter];
    norm[kNormGradient][j] += gx[j];
    norm[kNormProduct][j] = fma_(gx[j], deviation, norm[kNormProduct][j]);
  }
  if (a.coef == 0) return;
  TK_UNROLL
  for (int j = 0; j < G; ++j) gx[j] = input_gradient(gx[j], x.get(j), affine[j], coef[j]);
}

// The part of step k in the sums that are the parameters' gradients.
template <class E, int V, int K, bool FUSED, int G>
TK_INLINE void learned(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[FUSED ? G : 1], int k,
                       int count, int at, const Slots<E, V, K, FUSED>& slots, const Real (&h)[K][G],
                       const StepGradient<Real> (&g)[G], Real (&sum)[kSums][G]) {
  Real current[G];
  currents(a, affine, k, at, slots, current);
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    const Real v = k == 0 ? slots.number(slots.kStart + at + j)
                          : reset_after_flat(p[j], again(count, h[k == 0 ? 0 : k - 1][j]), a.reset == kHard);
    sum[kSumDecay][j] = fma_(g[j].h, v, sum[kSumDecay][j]);
    sum[kSumGain][j] = fma_(g[j].h, current[j], sum[kSumGain][j]);
    sum[kSumBias][j] += g[j].h;
    sum[kSumReset][j] += g[j].v_reset;
    sum[kSumThreshold][j] += g[j].threshold;
  }
}

// The same steps backward, gs replaced by gx. `first`: element of the chunk's first step.
template <int SURROGATE, int G, class E, int V, int K, bool FUSED>
TK_INLINE void group_back(const LifArgs& a, const Neuron<Real> (&p)[G], const Affine3 (&affine)[FUSED ? G : 1],
                          const Affine3 (&coef)[FUSED ? G : 1], int64_t first, int count, int at,
                          const Slots<E, V, K, FUSED>& slots) {
  using S = Slots<E, V, K, FUSED>;
  using Part = Pack<E, G>;
  const int word = at / Part::kPerWord;
  const bool hard = a.reset == kHard, attached = a.reset != kNone && a.detach == 0, learn = a.gparams != 0;
  const int64_t N = again(count, a.N);
  const Real share = FUSED && a.pool_row != 0 ? 0.25f : 1.0f;
  const S later(slots.words + (FUSED ? count >> 31 : 0), slots.stride);  // the same, read anew
  constexpr int kSlopes = K > 8 ? 8 : K;
  Real h[K][G], sg[kSlopes][G], gv[G], sum[kSums][G] = {}, norm[kNormSums][G] = {};
  recompute(a, p, affine, at, slots, h);
  TK_UNROLL
  for (int j = 0; j < G; ++j) gv[j] = slots.number(S::kGv + at + j);
  Part next = slots.template pack<Part>(S::kG + (K - 1) * S::kRow + word);
  TK_UNROLL
  for (int k = K - 1; k >= 0; --k) {
    const Part gs = next;
    if (k > 0) next = slots.template pack<Part>(S::kG + (k - 1) * S::kRow + word);  // before it is needed
    if (FUSED && (k + 1) % kSlopes == 0) slopes<0>(a, p, h, k + 1 - kSlopes, sg);
    if (k >= count) continue;
    if (a.gv != 0) add_gv<E>(address<E>(a.gv, first + index::offset(k, at, N)), gv);
    Real gx[G];
    StepGradient<Real> g[G];
    TK_UNROLL
    for (int j = 0; j < G; ++j) {
      Real slope, gradient = gs.get(j);
      if constexpr (FUSED) {
        slope = sg[k % kSlopes][j];
        gradient = share * gradient;
      } else {
        slope = surrogate<SURROGATE>(h[k][j] - p[j].threshold, lit<Real>(a.alpha));
      }
      g[j] = step_gradient_flat(p[j], h[k][j], slope, gradient, gv[j], hard, attached);
      gx[j] = p[j].gain * g[j].h;
      gv[j] = p[j].decay * g[j].h;
    }
    if (learn) learned(a, p, affine, k, count, at, later, h, g, sum);
    if constexpr (FUSED) normalized(a, affine, coef, later.template pack<Part>(S::kX + k * S::kRow + word), gx, norm);
    Part out;
    out.set(gx);
    slots.set_pack(S::kG + k * S::kRow + word, out);
  }
  TK_UNROLL
  for (int j = 0; j < G; ++j) {
    slots.set_number(S::kGv + at + j, gv[j]);
    if (learn) slots.add_sums(FUSED ? kNormSums : 0, at + j, sum, j);
    if (FUSED && a.norm_sums != 0) slots.add_sums(0, at + j, norm, j);
  }
}

// All steps of the neurons n .. n + V - 1, last first. Nothing but x (and the edges) was saved: h is recomputed, for a
// few neurons at a time, in a loop that stays one: all at once would not fit the registers (8 neurons of 16 steps), nor
// its code the instruction cache. FUSED: SURROGATE is not used.
template <class E, int V, int K, bool LOOP, int SURROGATE, bool FUSED>
TK_INLINE void backward_thread(const LifArgs& a, int64_t n, const Slots<E, V, K, FUSED>& slots) {
  using S = Slots<E, V, K, FUSED>;
  constexpr int kFit = K > (FUSED ? 4 : 8) ? 2 : 4;
  constexpr int G = V < kFit ? V : kFit, kAffines = FUSED ? G : 1;
  const Parameters<FUSED> all(a, n);
  slots.load_numbers(S::kGv, a.gv_final, n);
  for (int64_t c = LOOP ? index::chunks(a.T, K) - 1 : 0; c >= 0; --c) {
    const int count = steps(a, c * K, K);
    load_chunk(a, c * K, n, count, slots);
    if (LOOP && c > 0) {
      slots.load_numbers(S::kStart, a.edges, index::offset(c - 1, n, a.N));
    } else {
      slots.load_numbers(S::kStart, a.v0, n);
    }
    const int64_t first = index::offset(c * K, n, a.N);
    Parameters<FUSED> parameters = FUSED ? Parameters<FUSED>(a, again(count, n)) : all;
    TK_ROLLED
    for (int at = 0; at < V; at += G) {
      Neuron<Real> p[G];
      Affine3 affine[kAffines], coef[kAffines];
      if constexpr (FUSED) {
        parameters.next(a, p, affine, coef);
      } else {
        parameters.next(a, p);
      }
      group_back<SURROGATE, G>(a, p, affine, coef, first, count, at, slots);
    }
    store_chunk(a, first, count, slots);
  }
  slots.store_numbers(S::kGv, a.gv0, n);
}

}  // namespace cuda
}  // namespace trtkern
