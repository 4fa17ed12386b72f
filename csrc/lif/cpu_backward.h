// LIF backward on the CPU: h of a chunk is computed again, then its steps run backwards, and their sums over steps and
// neurons are added up. Sums of a few numbers are in float, those of many in double, in an order that the width of a
// vector does not change.
#pragma once
#include "cpu/rows.h"
#include "lif/cpu_short.h"
#include "lif/cpu_slopes.h"
#include "lif/cpu_sums.h"
#include "spikes/cpu_pool.h"

namespace trtkern::TK_ISA {

constexpr int kHeld = 3;  // in place of a reset: what is read is the state itself

// The state before a step: `from` holds the trace of the step before, or that state itself where `reset` is kHeld.
template <class N>
TK_INLINE void state_before(const vfloat* p, const float* from, int64_t i, int reset, vfloat* state) {
  static_assert(N::kStates == N::kTraces, "the rows before a chunk are a state in place of a trace");
  load_numbers<N::kStates>(from, kStride, i, state);
  if (reset == kHeld) return;
  vfloat trace[N::kTraces];
  for (int k = 0; k < N::kTraces; ++k) trace[k] = state[k];
  settle<N>(p, trace, reset, state);
}

// The trace of one step from x and the rows before it.
template <class D, class N>
struct RecomputeRow {
  using Raw = typename D::Raw;
  Rows params;
  Current<Raw> in;
  const float* before;
  int before_reset;
  float* trace;
  const Raw* ahead;

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    const bool normed = in.affine.base;
    if constexpr (!kPlainRows<N>) {
      if (kGeneralRows || normed || params.each) return run<false, kEach, -1>(from, n);
      return with_reset<false, kShared>(from, n);
    }
    if (params.each) return normed ? with_reset<true, kEach>(from, n) : with_reset<false, kEach>(from, n);
    if (!normed) return with_reset<false, kShared>(from, n);
    in.affine.each ? with_reset<true, kSharedNeuron>(from, n) : with_reset<true, kShared>(from, n);
  }
  template <bool NORM, int LAYOUT>
  TK_INLINE void with_reset(int64_t from, int64_t n) const {
    if (before_reset == kHard) return run<NORM, LAYOUT, kHard>(from, n);
    if (before_reset == kSoft) return run<NORM, LAYOUT, kSoft>(from, n);
    if constexpr (N::kStates > 1)
      if (before_reset == kNone) return run<NORM, LAYOUT, kNone>(from, n);
    run<NORM, LAYOUT, kHeld>(from, n);  // of one state no reset, too, leaves what is there
  }
  // RESET: -1 where it is a member's, and whether there is a norm is asked at run time.
  template <bool NORM, int LAYOUT, int RESET>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    const RecomputeRow r = *this;
    const Params<N> same = params_of<N>(r.params, 0);
    const Rows rows = LAYOUT == kSharedNeuron ? r.in.affine.known_each() : r.in.affine;
    const Triple affine = NORM ? triple(rows, 0) : Triple{};
    for (int64_t span = from; span < from + n; span += kSpan) {
      prefetch(r.ahead + span);
#pragma GCC unroll 4
      for (int k = 0; k < kSpanVectors; ++k) {
        const int64_t i = span + k * kLanes;
        const Params<N> p = LAYOUT == kEach ? params_of<N>(r.params, i) : same;
        vfloat x;
        if constexpr (NORM) {
          x = current<D>(r.in, i, LAYOUT == kShared ? affine : triple(rows, i));
        } else if (RESET < 0 && r.in.affine.base) {
          x = current<D>(r.in, i, triple(rows, i));
        } else {
          x = get<D>(r.in.x + i);
        }
        vfloat state[N::kStates], made[N::kTraces];
        state_before<N>(p.at, r.before, i, RESET < 0 ? r.before_reset : RESET, state);
        N::charge(x, state, p.at, made);
        store_numbers<N::kTraces>(r.trace, kStride, i, made);
      }
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {  // the lanes behind are padding
    RecomputeRow r = {params.at(from), in.at(from), before + from, before_reset, trace + from, in.x};
    Staged<Raw> new_x, new_residual;
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.template whole<false>(0, kSpan);
  }
};

// What a row does: whatever its members say; or the plain cases, where gs alone comes in, the reset is not detached,
// and the parameters have no gradients. kDirect: gx goes out. The others are normalised: kSum adds up for the norm,
// kSumWrite writes gx besides, kCoef writes the gradient of what was normalised.
enum Kind : int { kAnything, kDirect, kSum, kSumWrite, kCoef };

// Small outputs gain little from a function of their own, and each takes its time to compile.
inline Kind kind_of(const LifArgs& a, bool streaming) {
  if (kGeneralRows || !(streaming || (a.norm_sums && !a.gx))) return kAnything;
  if (!a.gs || a.gv || a.gparams || a.detach) return kAnything;
  if (!a.affine) return a.pool_row && a.dtype != kFloat32 ? kAnything : kDirect;
  if (layout_of(a) == kEach || a.reset == kNone) return kAnything;
  if (a.norm_sums && !a.coef) return a.gx ? kSumWrite : kSum;
  return a.coef && !a.norm_sums ? kCoef : kAnything;
}

// One step backward of a block of neurons N. gs, gv, gx, param_sums and norm_sums may be null, and coef absent.
template <class D, class N>
struct BackwardRow {
  using Raw = typename D::Raw;
  using Run = void (*)(const BackwardRow&, int64_t from, int64_t n);
  Run run, run_streaming;
  Rows params;
  Current<Raw> in;
  Rows coef;
  float alpha, share;  // share: of gs, what is a neuron's
  int reset, before_reset, surrogate;
  bool detach;
  bool of_h;  // gv is the gradient of h, not of v
  const float *trace, *before;
  const Raw *gs, *gv;
  Raw* gx;
  float* carry;  // gradient of the state after the step, then of the state before it
  float *param_sums, *norm_sums;
  bool shared_sums;  // kSpan neurons in turns share a float of norm_sums; else each has its own
  const Raw* ahead;

  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }
  TK_INLINE void advance(int64_t i) {
    params = params.at(i), in = in.at(i), coef = coef.at(i);
    trace += i, before += i, carry += i, ahead += i;
    if (param_sums) param_sums += i;
    if (norm_sums && !shared_sums) norm_sums += i;
    if (gs) gs += i;
    if (gv) gv += i;
    if (gx) gx += i;
  }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    (STREAM ? run_streaming : run)(*this, from, n);
  }
  TK_NOINLINE void part(int64_t from, int count) const {
    BackwardRow r = *this;
    r.advance(from);
    Staged<Raw> new_x, new_residual, new_gs, new_gv, new_gx;
    const Kept<N::kStates> kept(r.carry, kStride);
    const Kept<N::kParams> kept_params(r.param_sums, kStride);
    const Kept<2> kept_norm(r.norm_sums, kSumStride);
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.gs = new_gs.in(r.gs, count), r.gv = new_gv.in(r.gv, count), r.gx = new_gx.out(r.gx);
    run(r, 0, kSpan);
    if (gx) new_gx.back(gx + from, count);
    kept.restore(count), kept_params.restore(count), kept_norm.restore(count);
  }
};

// The gradients of x and of the state before a step, from those of the state after it and of the spike; of the sums of
// the parameters, at `to`, each with its part added (LEARN).
template <bool ANY, bool LEARN, class D, class N>
TK_INLINE vfloat step_back(const BackwardRow<D, N>& r, int64_t i, const vfloat* p, const vfloat* trace, vint fired,
                           vfloat slope, vfloat gs, int reset, vfloat* g) {
  vfloat g_trace[N::kTraces], state[N::kStates] = {}, g_state[N::kStates], sum[N::kParams] = {}, x{}, gx;
  const unsigned learned = LEARN ? N::learned(reset) : 0u;
  if (N::kNeedsState || LEARN) {
    x = r.in.affine.base ? current<D>(r.in, i, triple(r.in.affine, i)) : get<D>(r.in.x + i);
    state_before<N>(p, r.before, i, r.before_reset, state);
    for (int k = 0; k < N::kParams; ++k)
      if (learned >> k & 1) sum[k] = load(r.param_sums + k * kStride + i);
  }
  N::fired_back(reset, ANY && r.detach, trace, fired, p, g, gs, slope, g_trace, sum);
  if (ANY && r.gv && r.of_h) g_trace[N::kH] += get<D>(r.gv + i);
  N::charge_back(x, state, p, g_trace, gx, g_state, sum);
  for (int k = 0; k < N::kStates; ++k) g[k] = g_state[k];
  for (int k = 0; k < N::kParams; ++k)
    if (learned >> k & 1) store(r.param_sums + k * kStride + i, sum[k]);
  return gx;
}

// BackwardRow::Run. RESET: -1 where it is a member's.
template <class D, class N, int SURROGATE, bool STREAM, int KIND, int RESET, int LAYOUT>
TK_NOINLINE void backward_run(const BackwardRow<D, N>& row, int64_t from, int64_t n) {
  constexpr bool ANY = KIND == kAnything, NORM = KIND > kDirect, SUMS = KIND == kSum || KIND == kSumWrite;
  BackwardRow<D, N> r = row;
  r.advance(from);
  if constexpr (LAYOUT == kSharedNeuron && !ANY) r.in.affine = r.in.affine.known_each(), r.coef = r.coef.known_each();
  const vfloat sharpness = lit<vfloat>(r.alpha), share = lit<vfloat>(r.share);
  const Params<N> same = params_of<N>(r.params, 0);
  const vfloat same_center = NORM ? r.in.affine.row(kCenter, 0) : vfloat{};
  const Triple same_coef = KIND == kCoef ? triple(r.coef, 0) : Triple{};
  const bool shared_sums = ANY ? r.norm_sums && r.shared_sums : SUMS && LAYOUT == kShared;
  SpanSums sums{};
  float slopes[SURROGATE == kAnySurrogate ? kStrip : 1];
  for (int64_t span = 0; span < n; span += kSpan) {
    prefetch(r.ahead + span);
    if (SURROGATE == kAnySurrogate && span % kStrip == 0)
      strip_slopes<N>(r.trace, r.params, span, n - span < kStrip ? n - span : kStrip, r.surrogate, r.alpha, slopes);
#pragma GCC unroll 4
    for (int k = 0; k < kSpanVectors; ++k) {
      const int64_t i = span + k * kLanes;
      const Params<N> p =
          LAYOUT == kEach && (!ANY || !kPlainRows<N> || r.params.each) ? params_of<N>(r.params, i) : same;
      vfloat trace[N::kTraces], potential, threshold, slope;
      load_numbers<N::kTraces>(r.trace, kStride, i, trace);
      N::fire(trace, p.at, potential, threshold);
      if constexpr (SURROGATE == kAnySurrogate) {
        slope = load(slopes + span % kStrip + k * kLanes);
      } else {
        slope = surrogate<SURROGATE>(potential - threshold, sharpness);
      }
      vfloat gs = !ANY || r.gs ? get<D>(r.gs + i) : vfloat{};
      if (sizeof(*r.gs) == 2 && KIND != kDirect) gs *= share;
      vfloat g[N::kStates], gx;
      load_numbers<N::kStates>(r.carry, kStride, i, g);
      if (ANY && r.gv && !r.of_h) g[N::kV] += get<D>(r.gv + i);
      const int reset = ANY ? r.reset : RESET;
      if (ANY && r.param_sums) {
        gx = step_back<ANY, true>(r, i, p.at, trace, potential > threshold, slope, gs, reset, g);
      } else {
        gx = step_back<ANY, false>(r, i, p.at, trace, potential > threshold, slope, gs, reset, g);
      }
      store_numbers<N::kStates>(r.carry, kStride, i, g);
      if (NORM || (ANY && r.in.affine.base)) {
        const vfloat center = LAYOUT == kShared ? same_center : r.in.affine.row(kCenter, i);
        const vfloat deviation = get<D>(r.in.x + i) - center;
        if (shared_sums) {
          sums.gx[k] += gx;
          sums.moment[k] = fma_(gx, deviation, sums.moment[k]);
        } else if (SUMS || (ANY && r.norm_sums)) {
          add_to(r.norm_sums + i, gx), add_to(r.norm_sums + i + kSumStride, gx, deviation);
        }
        if (ANY ? r.coef.base != nullptr : KIND == kCoef)
          gx = input_gradient(LAYOUT == kShared ? same_coef : triple(r.coef, i), gx, deviation);
      }
      if (KIND != kSum && (!ANY || r.gx)) put<STREAM>(r.gx + i, D::pack(gx));
    }
  }
  if (shared_sums) sums.store_to(r.norm_sums);
}

// The function for what a launch asks for.
template <class D, class N, int SURROGATE, bool STREAM, int KIND, int LAYOUT>
typename BackwardRow<D, N>::Run backward_run_with(int reset) {
  if (reset == kHard) return backward_run<D, N, SURROGATE, STREAM, KIND, kHard, LAYOUT>;
  if (reset == kSoft || KIND != kDirect) return backward_run<D, N, SURROGATE, STREAM, KIND, kSoft, LAYOUT>;
  return backward_run<D, N, SURROGATE, STREAM, kDirect, kNone, LAYOUT>;
}
template <class D, class N, int SURROGATE, bool STREAM, int KIND>
typename BackwardRow<D, N>::Run backward_run_for(const LifArgs& a) {
  constexpr int EACH = KIND == kDirect ? kEach : kSharedNeuron;
  if (layout_of(a) == kShared) return backward_run_with<D, N, SURROGATE, STREAM, KIND, kShared>(a.reset);
  return backward_run_with<D, N, SURROGATE, STREAM, KIND, EACH>(a.reset);
}
template <class D, class N, int SURROGATE, bool STREAM>
typename BackwardRow<D, N>::Run backward_run_of(const LifArgs& a, Kind kind) {
  if constexpr (!kPlainRows<N>) {
    if constexpr (STREAM && !kGeneralRows)
      if (kind == kDirect && layout_of(a) == kShared)
        return backward_run_with<D, N, kAnySurrogate, true, kDirect, kShared>(a.reset);
    return backward_run<D, N, kAnySurrogate, STREAM, kAnything, -1, kEach>;
  } else {
    if (a.surrogate != SURROGATE) {
      if constexpr (SURROGATE + 1 < kSurrogates) return backward_run_of<D, N, SURROGATE + 1, STREAM>(a, kind);
    }
    if constexpr (!kGeneralRows && STREAM) {
      if (kind == kSumWrite) return backward_run_for<D, N, SURROGATE, true, kSumWrite>(a);
      if (kind == kCoef) return backward_run_for<D, N, SURROGATE, true, kCoef>(a);
      if (kind == kDirect) return backward_run_for<D, N, SURROGATE, true, kDirect>(a);
    } else if constexpr (!kGeneralRows) {
      if (kind == kSum) return backward_run_for<D, N, SURROGATE, false, kSum>(a);
    }
    return backward_run<D, N, SURROGATE, STREAM, kAnything, -1, kEach>;
  }
}

// Scratch memory of one thread of the backward pass.
template <class D, class N>
struct BackwardMemory {
  using Raw = typename D::Raw;
  float *traces, *start, *carry, *param_sums, *norm_sums;
  ChannelRows params, affine, coef;
  Raw *pooled, *pooled_gs;  // the gradients of a pooled block's averages, and of its neurons
  Converted<D, RowType<D, N>> x, residual, gs, gv, gx;

  explicit BackwardMemory(Scratch pieces)
      : traces(pieces.take(kChunk * kStride)),
        start(pieces.take(N::kStates * kStride)),
        carry(pieces.take(N::kStates * kStride)),
        param_sums(pieces.take(N::kParams * kStride)),
        norm_sums(pieces.take(kSumStride + kStride)),
        params(pieces.take(N::kParams * kParameterStride), N::kParams),
        affine(pieces.take(kAffine * kParameterStride), kAffine),
        coef(pieces.take(kAffine * kParameterStride), kAffine),
        pooled((Raw*)pieces.take(kBackwardBlock / 4 + kPoolPad)),
        pooled_gs((Raw*)pieces.take(kBackwardBlock + kPoolPad)),
        x(pieces),
        residual(pieces),
        gs(pieces),
        gv(pieces),
        gx(pieces) {}
};

// The traces of steps t0 .. t0 + steps - 1 of a block, in rows kStride apart.
template <class D, class N, class R = RowType<D, N>>
void recompute_chunk(const LifArgs& a, const Rows& params, const Rows& affine, int64_t t0, int steps, const Block& b,
                     const BackwardMemory<D, N>& m) {
  using Raw = typename D::Raw;
  const float* before = m.start;
  for (int j = 0; j < steps; ++j) {
    for (int64_t r = 0; r < b.runs; ++r) {
      const int64_t at = (t0 + j) * a.N + b.start(r), i = r * b.length;
      const Raw* const x = element<Raw>(a.x, (t0 + j) * a.x_stride + b.start(r));
      const Current<typename R::Raw> in = {m.x.in(x, b.length), m.residual.in(element<Raw>(a.residual, at), b.length),
                                           affine.at(i)};
      float* const trace = m.traces + j * N::kTraces * kStride + i;
      RecomputeRow<R, N> row = {params.at(i), in, before + i, j ? a.reset : kHeld, trace};
      row.ahead = m.x.ahead(j + 1 < steps || !a.gs || a.pool_row ? x + a.x_stride : element<Raw>(a.gs, at));
      along<false>(row, b.length);
    }
    before = m.traces + j * N::kTraces * kStride;
  }
}

// The gradients of a pooled block's spikes at step t; in float a quarter of the average's, which a shorter type may not
// hold.
template <class D, class N>
void read_pooled(const LifArgs& a, int64_t t, int64_t n0, const Block& b, const BackwardMemory<D, N>& m) {
  using Raw = typename D::Raw;
  const int64_t n = b.size() / 4;
  const Raw* from = element<Raw>(a.gs, (t * a.N + n0) / 4);
  __builtin_memcpy(m.pooled, from, sizeof(Raw) * n);
  if (t)
    for (int64_t i = 0; i < n; i += kSpan) prefetch(from - a.N / 4 + i);
  if constexpr (sizeof(Raw) == 4)
    for (int64_t i = 0; i < n; i += kLanes) store(m.pooled + i, load(m.pooled + i) * lit<vfloat>(0.25f));
  spread<D>(m.pooled, b.size(), b.fold_row, b.fold_side, m.pooled_gs);
}

// Step t of a block, backwards; `row` has what all steps of the block share, j is the step's place in its chunk.
template <class D, class N, class R = RowType<D, N>>
void backward_step(const LifArgs& a, int64_t t, int j, const Block& b, BackwardRow<R, N> row,
                   const BackwardMemory<D, N>& m, bool streaming) {
  using Raw = typename D::Raw;
  constexpr bool kSame = Converted<D, R>::kSame;
  constexpr int64_t kTrace = N::kTraces * kStride;
  const Rows params = row.params, affine = row.in.affine, coef = row.coef;
  float* const norm_sums = row.norm_sums;
  const float share = row.share;
  if (!kSame) row.share = 1.0f;  // it goes into the conversion
  row.before_reset = j ? a.reset : kHeld;
  for (int64_t r = 0; r < b.runs; ++r) {
    const int64_t start = b.start(r), at = t * a.N + start, i = r * b.length, n = b.length;
    const Raw* const x = element<Raw>(a.x, t * a.x_stride + start);
    const Raw* const gs = a.pool_row && a.gs ? m.pooled_gs + i : element<Raw>(a.gs, at);
    Raw* const gx = element<Raw>(a.gx, at);
    row.params = params.at(i), row.coef = coef.at(i);
    row.in = {m.x.in(x, n), m.residual.in(element<Raw>(a.residual, at), n), affine.at(i)};
    row.trace = m.traces + j * kTrace + i, row.before = j ? row.trace - kTrace : m.start + i;
    row.gs = m.gs.in(gs, n, share), row.gv = m.gv.in(element<Raw>(a.gv, at), n), row.gx = m.gx.out(gx);
    row.carry = m.carry + i, row.param_sums = a.gparams ? m.param_sums + i : nullptr;
    if (norm_sums) row.norm_sums = norm_sums + (row.shared_sums ? 0 : i);
    // Before this chunk comes the one before it; before the first, the next block.
    const Raw* next;
    if (j && !a.pool_row) {
      next = a.gs ? element<Raw>(a.gs, at - a.N) : x - a.x_stride;
    } else if (j) {
      next = x + n;
    } else {
      next = t ? x - kChunk / N::kTraces * a.x_stride : x + n;
    }
    row.ahead = m.x.ahead(next);
    // Neurons that share a sum in turns are counted from the row's start, which then may not be a part by itself.
    if (kSame && streaming && a.gx && !(row.norm_sums && row.to_aligned_output(1))) {
      along<true>(row, n);
    } else {
      along<false>(row, n);
    }
    m.gx.back(gx, n, streaming);
  }
}

template <class D, class N>
void backward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  constexpr int kSteps = kChunk / N::kTraces;
  BackwardMemory<D, N> m(Scratch{scratch});
  const ParamSums<N> param_sums{m.param_sums, a.gparams ? totals : nullptr};
  NormSums norm_sums(m.norm_sums, a.norm_sums ? totals + kMostParams * a.C : nullptr);
  const Kind kind = kind_of(a, streaming);
  using R = RowType<D, N>;
  BackwardRow<R, N> row = {backward_run_of<R, N, 0, false>(a, kind), backward_run_of<R, N, 0, true>(a, kind)};
  row.alpha = a.alpha, row.share = a.pool_row ? 0.25f : 1.0f;
  row.reset = a.reset, row.surrogate = a.surrogate, row.detach = a.detach != 0, row.of_h = a.before != 0;
  row.norm_sums = a.norm_sums ? m.norm_sums : nullptr;
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kBackwardBlock);
    row.params = m.params.parameters(a, b);
    row.in.affine = m.affine.affine(a, b, a.affine), row.coef = m.coef.affine(a, b, a.coef);
    if constexpr (kHasShort<N>) {
      if (is_short_backward(a, streaming) && norm_sums.begin_all(a, b, !row.in.affine.each, m.affine.fresh)) {
        backward_short<D, N>(a, b, row.params, row.in.affine, row.coef, row.norm_sums, norm_sums.shared, streaming);
        continue;
      }
    }
    for (int k = 0; k < N::kStates; ++k) read_row(m.carry + k * kStride, a.gv_final, k * a.N, b);
    for (int64_t t0 = (a.T - 1) / kSteps * kSteps; t0 >= 0; t0 -= kSteps) {
      const int steps = (int)(a.T - t0 < kSteps ? a.T - t0 : kSteps);
      const int64_t edge = t0 ? (t0 / kSteps - 1) * N::kStates : 0;
      for (int k = 0; k < N::kStates; ++k) read_row(m.start + k * kStride, t0 ? a.edges : a.v0, (edge + k) * a.N, b);
      recompute_chunk<D, N>(a, row.params, row.in.affine, t0, steps, b, m);
      param_sums.clear(a);
      for (int j = steps - 1; j >= 0; --j) {
        norm_sums.begin(a, b, !row.in.affine.each, m.affine.fresh && t0 + j + 1 == a.T);
        row.shared_sums = norm_sums.shared;
        if (a.pool_row && a.gs) read_pooled<D>(a, t0 + j, n0, b, m);
        backward_step<D>(a, t0 + j, j, b, row, m, streaming);
      }
      param_sums.add(a, b);
    }
    for (int k = 0; a.gv0 && k < N::kStates; ++k) write_row(a.gv0, k * a.N, m.carry + k * kStride, b, streaming);
  }
  norm_sums.flush(a);
  fence();
}

inline void lif_backward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  for_neuron(a.neuron, [&](auto n) {
    for_dtype(a.dtype,
              [&](auto d) { backward_blocks<decltype(d), decltype(n)>(a, begin, end, scratch, streaming, totals); });
  });
}

}  // namespace trtkern::TK_ISA
