// LIF backward on the CPU, a step of a block.
//
// No include guard: each instruction set includes it inside a namespace of its own, after lif/cpu_sums.h.

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
