// LIF backward on the CPU: h of a chunk is computed again, then its steps run backwards, and their sums over steps and
// neurons are added up. Sums of a few numbers are in float, those of many in double, in an order that the width of a
// vector does not change.
#pragma once
#include "cpu/rows.h"
#include "spikes/cpu_pool.h"

namespace trtkern::TK_ISA {

// v before a step: `from` holds h of the step before, or v itself where `reset` is kNone.
TK_INLINE vfloat v_before(const Neuron<vfloat>& p, const float* from, int64_t i, int reset) {
  return reset_after(p, load(from + i), reset);
}

// h of one step from x and the row before it.
template <class D>
struct RecomputeRow {
  using Raw = typename D::Raw;
  Rows params;
  Current<Raw> in;
  const float* before;
  int before_reset;
  float* h;
  const Raw* ahead;

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    const bool normed = in.affine.base;
    if (params.each) return normed ? with_reset<true, kEach>(from, n) : with_reset<false, kEach>(from, n);
    if (!normed) return with_reset<false, kShared>(from, n);
    in.affine.each ? with_reset<true, kSharedNeuron>(from, n) : with_reset<true, kShared>(from, n);
  }
  template <bool NORM, int LAYOUT>
  TK_INLINE void with_reset(int64_t from, int64_t n) const {
    if (before_reset == kHard) return run<NORM, LAYOUT, kHard>(from, n);
    if (before_reset == kSoft) return run<NORM, LAYOUT, kSoft>(from, n);
    run<NORM, LAYOUT, kNone>(from, n);
  }
  template <bool NORM, int LAYOUT, int RESET>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    const RecomputeRow r = *this;
    const Neuron<vfloat> same = neuron(r.params, 0);
    const Rows rows = LAYOUT == kSharedNeuron ? r.in.affine.known_each() : r.in.affine;
    const Triple affine = NORM ? triple(rows, 0) : Triple{};
    for (int64_t span = from; span < from + n; span += kSpan) {
      prefetch(r.ahead + span);
#pragma GCC unroll 4
      for (int k = 0; k < kSpanVectors; ++k) {
        const int64_t i = span + k * kLanes;
        const Neuron<vfloat> p = LAYOUT == kEach ? neuron(r.params, i) : same;
        vfloat x;
        if constexpr (NORM) {
          x = current<D>(r.in, i, LAYOUT == kShared ? affine : triple(rows, i));
        } else {
          x = get<D>(r.in.x + i);
        }
        store(r.h + i, charge(p, v_before(p, r.before, i, RESET), x));
      }
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {  // the lanes behind are padding
    RecomputeRow r = {params.at(from), in.at(from), before + from, before_reset, h + from, in.x};
    Staged<Raw> new_x, new_residual;
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.template whole<false>(0, kSpan);
  }
};

// The h of steps t0 .. t0 + steps - 1 of a block, in rows kStride apart; `start` is v before them.
template <class D>
void recompute_chunk(const LifArgs& a, const Rows& params, const Rows& affine, int64_t t0, int steps, const Block& b,
                     const float* start, float* h) {
  using Raw = typename D::Raw;
  const float* before = start;
  for (int j = 0; j < steps; ++j) {
    for (int64_t r = 0; r < b.runs; ++r) {
      const int64_t at = (t0 + j) * a.N + b.start(r), i = r * b.length;
      const Current<Raw> in = {element<Raw>(a.x, (t0 + j) * a.x_stride + b.start(r)), element<Raw>(a.residual, at),
                               affine.at(i)};
      RecomputeRow<D> row = {params.at(i), in, before + i, j ? a.reset : kNone, h + j * kStride + i};
      row.ahead = j + 1 < steps || !a.gs || a.pool_row ? row.in.x + a.x_stride : element<Raw>(a.gs, at);
      along<false>(row, b.length);
    }
    before = h + j * kStride;
  }
}

constexpr int64_t kSumStride = kStride + 512;  // between the two: loads do not meet stores 4096 bytes before them

// Adds to a vector of sums.
TK_INLINE void add_to(float* sum, vfloat a) { store(sum, a + load(sum)); }
TK_INLINE void add_to(float* sum, vfloat a, vfloat b) { store(sum, fma_(a, b, load(sum))); }

// Sums for the gradients of the parameters, a row of floats each: cleared for a chunk, then added to [kParams, C].
struct ParamSums {
  float* rows;
  double* totals;  // null: not wanted

  static bool has(const LifArgs& a, int k) {
    return !(k == kResetAmount && a.reset != kSoft) && !(k == kVReset && a.reset != kHard);
  }
  void clear(const LifArgs& a) const {
    for (int k = 0; totals && k < kParams; ++k)
      if (has(a, k)) __builtin_memset(rows + k * kStride, 0, sizeof(float) * kStride);
  }
  void add(const LifArgs& a, const Block& b) const {
    for (int k = 0; totals && k < kParams; ++k)
      if (has(a, k)) add_channels(a, b, rows + k * kStride, totals + k * a.C);
  }
};

// The two sums of the norm. Where channels are long, kSpan neurons in turn share a float, for a block; where they are
// short, a float is a neuron's, kept while blocks start at the same channel. Some kMostAdded numbers go into one.
struct NormSums {
  float* rows;
  double* totals;  // [2, C]; null: not wanted
  bool shared = false;
  int64_t added = 0;  // rows
  Block block{};
  static constexpr int64_t kMostAdded = kBackwardBlock / kSpan;

  NormSums(float* rows, double* totals) : rows(rows), totals(totals) {}
  // Before a step of a block; `fresh`: its channels are not those of the block before.
  void begin(const LifArgs& a, const Block& b, bool shared_by_span, bool fresh) {
    if (!totals) return;
    if (fresh || added == 0 || added >= kMostAdded || b.size() > block.size()) {
      flush(a);
      block = b, shared = shared_by_span;
      for (int k = 0; k < 2; ++k)
        __builtin_memset(rows + k * kSumStride, 0, sizeof(float) * (shared ? kSpan : kStride));
    }
    ++added;
  }
  void flush(const LifArgs& a) {
    for (int k = 0; added && k < 2; ++k) {
      if (shared) {
        totals[k * a.C + block.at / a.inner % a.C] += ordered_sum(rows + k * kSumStride, kSpan);
      } else {
        add_channels(a, block, rows + k * kSumStride, totals + k * a.C);
      }
    }
    added = 0;
  }
};

// What a row does: whatever its members say; or the plain cases, where gs alone comes in, the reset is not detached,
// and the parameters have no gradients. kDirect: gx goes out. The others are normalised: kSum adds up for the norm,
// kSumWrite writes gx besides, kCoef writes the gradient of what was normalised.
enum Kind : int { kAnything, kDirect, kSum, kSumWrite, kCoef };

// Whether this instruction set has the rows that do anything and no others: short to compile (setup.py).
#if defined(TK_GENERAL_ROWS)
constexpr bool kGeneralRows = true;
#else
constexpr bool kGeneralRows = false;
#endif

// Small outputs gain little from a function of their own, and each takes its time to compile.
inline Kind kind_of(const LifArgs& a, bool streaming) {
  if (kGeneralRows || !(streaming || (a.norm_sums && !a.gx))) return kAnything;
  if (!a.gs || a.gv || a.gparams || a.detach) return kAnything;
  if (!a.affine) return a.pool_row && a.dtype != kFloat32 ? kAnything : kDirect;
  if (layout_of(a) == kEach || a.reset == kNone) return kAnything;
  if (a.norm_sums && !a.coef) return a.gx ? kSumWrite : kSum;
  return a.coef && !a.norm_sums ? kCoef : kAnything;
}

// One step backward of a block. gs, gv, gx, param_sums and norm_sums may be null, and coef absent.
template <class D>
struct BackwardRow {
  using Raw = typename D::Raw;
  using Run = void (*)(const BackwardRow&, int64_t from, int64_t n);
  Run run, run_streaming;
  Rows params;
  Current<Raw> in;
  Rows coef;
  float alpha, share;  // share: of gs, what is a neuron's
  int reset, before_reset;
  bool detach;
  bool of_h;  // gv is the gradient of h, not of v
  const float *h, *before;
  const Raw *gs, *gv;
  Raw* gx;
  float* carry;  // gradient of v after the step, then of v before it
  float *param_sums, *norm_sums;
  bool shared_sums;  // kSpan neurons in turns share a float of norm_sums; else each has its own
  const Raw* ahead;

  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }
  TK_INLINE void advance(int64_t i) {
    params = params.at(i), in = in.at(i), coef = coef.at(i);
    h += i, before += i, carry += i, ahead += i;
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
  TK_INLINE void add_params(int64_t i, const Neuron<vfloat>& p, const StepGradient<vfloat>& g) const {
    float* to = param_sums + i;
    const vfloat x = in.affine.base ? current<D>(in, i, triple(in.affine, i)) : get<D>(in.x + i);
    add_to(to + kDecay * kStride, g.h, v_before(p, before, i, before_reset));
    add_to(to + kGain * kStride, g.h, x);
    add_to(to + kBias * kStride, g.h);
    add_to(to + kThreshold * kStride, g.threshold);
    if (reset == kSoft) add_to(to + kResetAmount * kStride, g.reset_amount);
    if (reset == kHard) add_to(to + kVReset * kStride, g.v_reset);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    BackwardRow r = *this;
    r.advance(from);
    Staged<Raw> new_x, new_residual, new_gs, new_gv, new_gx;
    const Kept<1> kept(r.carry);
    const Kept<kParams> kept_params(r.param_sums, kStride);
    const Kept<2> kept_norm(r.norm_sums, kSumStride);
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.gs = new_gs.in(r.gs, count), r.gv = new_gv.in(r.gv, count), r.gx = new_gx.out(r.gx);
    run(r, 0, kSpan);
    if (gx) new_gx.back(gx + from, count);
    kept.restore(count), kept_params.restore(count), kept_norm.restore(count);
  }
};

// The two sums of the norm of a span, in registers.
struct SpanSums {
  vfloat gx[kSpanVectors], moment[kSpanVectors];
  TK_INLINE void store_to(float* sums) const {
    for (int k = 0; k < kSpanVectors; ++k) {
      add_to(sums + k * kLanes, gx[k]);
      add_to(sums + kSumStride + k * kLanes, moment[k]);
    }
  }
};

// BackwardRow::Run. RESET: -1 where it is a member's.
template <class D, int SURROGATE, bool STREAM, int KIND, int RESET, int LAYOUT>
TK_NOINLINE void backward_run(const BackwardRow<D>& row, int64_t from, int64_t n) {
  constexpr bool ANY = KIND == kAnything, NORM = KIND > kDirect, SUMS = KIND == kSum || KIND == kSumWrite;
  BackwardRow<D> r = row;
  r.advance(from);
  if constexpr (LAYOUT == kSharedNeuron) r.in.affine = r.in.affine.known_each(), r.coef = r.coef.known_each();
  const vfloat sharpness = lit<vfloat>(r.alpha), share = lit<vfloat>(r.share);
  const Neuron<vfloat> same = neuron(r.params, 0);
  const vfloat same_center = NORM ? r.in.affine.row(kCenter, 0) : vfloat{};
  const Triple same_coef = KIND == kCoef ? triple(r.coef, 0) : Triple{};
  const bool shared_sums = ANY ? r.norm_sums && r.shared_sums : SUMS && LAYOUT == kShared;
  SpanSums sums{};
  for (int64_t span = 0; span < n; span += kSpan) {
    prefetch(r.ahead + span);
#pragma GCC unroll 4
    for (int k = 0; k < kSpanVectors; ++k) {
      const int64_t i = span + k * kLanes;
      const Neuron<vfloat> p = LAYOUT == kEach && (!ANY || r.params.each) ? neuron(r.params, i) : same;
      vfloat gs = !ANY || r.gs ? get<D>(r.gs + i) : vfloat{};
      if (sizeof(*r.gs) == 2 && KIND != kDirect) gs *= share;
      vfloat gv = load(r.carry + i);
      if (ANY && r.gv && !r.of_h) gv += get<D>(r.gv + i);
      auto g = step_gradient<SURROGATE>(p, load(r.h + i), gs, gv, sharpness, ANY ? r.reset : RESET, ANY && r.detach);
      if (ANY && r.gv && r.of_h) g.h += get<D>(r.gv + i);
      vfloat gx = p.gain * g.h;
      store(r.carry + i, p.decay * g.h);
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
      if (ANY && r.param_sums) r.add_params(i, p, g);
    }
  }
  if (shared_sums) sums.store_to(r.norm_sums);
}

// The function for what a launch asks for.
template <class D, int SURROGATE, bool STREAM, int KIND, int LAYOUT>
typename BackwardRow<D>::Run backward_run_with(int reset) {
  if (reset == kHard) return backward_run<D, SURROGATE, STREAM, KIND, kHard, LAYOUT>;
  if (reset == kSoft || KIND != kDirect) return backward_run<D, SURROGATE, STREAM, KIND, kSoft, LAYOUT>;
  return backward_run<D, SURROGATE, STREAM, kDirect, kNone, LAYOUT>;
}
template <class D, int SURROGATE, bool STREAM, int KIND>
typename BackwardRow<D>::Run backward_run_for(const LifArgs& a) {
  constexpr int EACH = KIND == kDirect ? kEach : kSharedNeuron;
  if (layout_of(a) == kShared) return backward_run_with<D, SURROGATE, STREAM, KIND, kShared>(a.reset);
  return backward_run_with<D, SURROGATE, STREAM, KIND, EACH>(a.reset);
}
template <class D, int SURROGATE, bool STREAM>
typename BackwardRow<D>::Run backward_run_of(const LifArgs& a, Kind kind) {
  if (a.surrogate != SURROGATE) {
    if constexpr (SURROGATE + 1 < kSurrogates) return backward_run_of<D, SURROGATE + 1, STREAM>(a, kind);
  }
  if constexpr (!kGeneralRows && STREAM) {
    if (kind == kSumWrite) return backward_run_for<D, SURROGATE, true, kSumWrite>(a);
    if (kind == kCoef) return backward_run_for<D, SURROGATE, true, kCoef>(a);
    if (kind == kDirect) return backward_run_for<D, SURROGATE, true, kDirect>(a);
  } else if constexpr (!kGeneralRows) {
    if (kind == kSum) return backward_run_for<D, SURROGATE, false, kSum>(a);
  }
  return backward_run<D, SURROGATE, STREAM, kAnything, -1, kEach>;
}

// Scratch memory of one thread of the backward pass.
template <class D>
struct BackwardMemory {
  using Raw = typename D::Raw;
  float *h, *start, *carry, *param_sums, *norm_sums;
  ChannelRows params, affine, coef;
  Raw *pooled, *gs;  // the gradients of a pooled block's averages, and of its neurons

  explicit BackwardMemory(Scratch s)
      : h(s.take(kChunk * kStride)),
        start(s.take(kStride)),
        carry(s.take(kStride)),
        param_sums(s.take(kParams * kStride)),
        norm_sums(s.take(kSumStride + kStride)),
        params(s.take(kParams * kParameterStride), kParams),
        affine(s.take(kAffine * kParameterStride), kAffine),
        coef(s.take(kAffine * kParameterStride), kAffine),
        pooled((Raw*)s.take(kBackwardBlock / 4 + kPoolPad)),
        gs((Raw*)s.take(kBackwardBlock + kPoolPad)) {}
};

// The gradients of a pooled block's spikes at step t; in float a quarter of the average's, which a shorter type may not
// hold.
template <class D>
void read_pooled(const LifArgs& a, int64_t t, int64_t n0, const Block& b, const BackwardMemory<D>& m) {
  using Raw = typename D::Raw;
  const int64_t n = b.size() / 4;
  const Raw* from = element<Raw>(a.gs, (t * a.N + n0) / 4);
  __builtin_memcpy(m.pooled, from, sizeof(Raw) * n);
  if (t)
    for (int64_t i = 0; i < n; i += kSpan) prefetch(from - a.N / 4 + i);
  if constexpr (sizeof(Raw) == 4)
    for (int64_t i = 0; i < n; i += kLanes) store(m.pooled + i, load(m.pooled + i) * lit<vfloat>(0.25f));
  spread<D>(m.pooled, b.size(), b.fold_row, b.fold_inner, m.gs);
}

// Step t of a block, backwards; `row` has what all steps of the block share, j is the step's place in its chunk.
template <class D>
void backward_step(const LifArgs& a, int64_t t, int j, const Block& b, BackwardRow<D> row, const BackwardMemory<D>& m,
                   bool streaming) {
  using Raw = typename D::Raw;
  const Rows params = row.params, affine = row.in.affine, coef = row.coef;
  float* const norm_sums = row.norm_sums;
  row.before_reset = j ? a.reset : kNone;
  for (int64_t r = 0; r < b.runs; ++r) {
    const int64_t start = b.start(r), at = t * a.N + start, i = r * b.length;
    row.params = params.at(i), row.coef = coef.at(i);
    row.in = {element<Raw>(a.x, t * a.x_stride + start), element<Raw>(a.residual, at), affine.at(i)};
    row.h = m.h + j * kStride + i, row.before = j ? row.h - kStride : m.start + i;
    row.gs = a.pool_row && a.gs ? m.gs + i : element<Raw>(a.gs, at);
    row.gv = element<Raw>(a.gv, at), row.gx = element<Raw>(a.gx, at);
    row.carry = m.carry + i, row.param_sums = a.gparams ? m.param_sums + i : nullptr;
    if (norm_sums) row.norm_sums = norm_sums + (row.shared_sums ? 0 : i);
    // Before this chunk comes the one before it; before the first, the next block.
    if (j && !a.pool_row) {
      row.ahead = a.gs ? element<Raw>(a.gs, at - a.N) : row.in.x - a.x_stride;
    } else if (j) {
      row.ahead = row.in.x + b.length;
    } else {
      row.ahead = t ? row.in.x - kChunk * a.x_stride : row.in.x + b.length;
    }
    // Neurons that share a sum in turns are counted from the row's start, which then may not be a part by itself.
    if (streaming && a.gx && !(row.norm_sums && row.to_aligned_output(1))) {
      along<true>(row, b.length);
    } else {
      along<false>(row, b.length);
    }
  }
}

template <class D>
void backward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  BackwardMemory<D> m(Scratch{scratch});
  const ParamSums param_sums{m.param_sums, a.gparams ? totals : nullptr};
  NormSums norm_sums(m.norm_sums, a.norm_sums ? totals + kParams * a.C : nullptr);
  const Kind kind = kind_of(a, streaming);
  BackwardRow<D> row = {backward_run_of<D, 0, false>(a, kind), backward_run_of<D, 0, true>(a, kind)};
  row.alpha = a.alpha, row.share = a.pool_row ? 0.25f : 1.0f;
  row.reset = a.reset, row.detach = a.detach != 0, row.of_h = a.before != 0;
  row.norm_sums = a.norm_sums ? m.norm_sums : nullptr;
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kBackwardBlock);
    row.params = m.params.parameters(a, b);
    row.in.affine = m.affine.affine(a, b, a.affine), row.coef = m.coef.affine(a, b, a.coef);
    read_row(m.carry, a.gv_final, 0, b);
    for (int64_t t0 = (a.T - 1) / kChunk * kChunk; t0 >= 0; t0 -= kChunk) {
      const int steps = (int)(a.T - t0 < kChunk ? a.T - t0 : kChunk);
      read_row(m.start, t0 ? a.edges : a.v0, t0 ? (t0 / kChunk - 1) * a.N : 0, b);
      recompute_chunk<D>(a, row.params, row.in.affine, t0, steps, b, m.start, m.h);
      param_sums.clear(a);
      for (int j = steps - 1; j >= 0; --j) {
        norm_sums.begin(a, b, !row.in.affine.each, m.affine.fresh && t0 + j + 1 == a.T);
        row.shared_sums = norm_sums.shared;
        if (a.pool_row && a.gs) read_pooled<D>(a, t0 + j, n0, b, m);
        backward_step<D>(a, t0 + j, j, b, row, m, streaming);
      }
      param_sums.add(a, b);
    }
    if (a.gv0) write_row(a.gv0, 0, m.carry, b, streaming);
  }
  norm_sums.flush(a);
  fence();
}

inline void lif_backward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  for_dtype(a.dtype, [&](auto d) { backward_blocks<decltype(d)>(a, begin, end, scratch, streaming, totals); });
}

}  // namespace trtkern::TK_ISA
