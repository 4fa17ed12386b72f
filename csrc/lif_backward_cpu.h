// LIF backward on the CPU: h of a chunk is computed again, then its steps run backwards.
//
// No include guard: each instruction set includes it inside a namespace of its own, after lif_recompute_cpu.h and
// lif_sums_cpu.h.

// What a row of the backward pass does: whatever its members say; or the plain cases, where gs alone comes in, the reset
// is not detached, and there are no sums for parameters. kDirect: gx goes out. The others are normalised: kSum adds up for
// the norm, kSumWrite writes gx besides, kCoef writes the gradient of what was normalised.
enum Kind : int { kAnything, kDirect, kSum, kSumWrite, kCoef };

// One step backward of a block. gs, gv and gx may be null, and coef absent.
template <class D, int SURROGATE>
struct BackwardRow {
  using Raw = typename D::Raw;
  Rows params;
  Current<Raw> in;
  Rows coef;
  float alpha, share;  // share: of gs, what is a neuron's
  int reset, before_reset;
  bool detach;
  const float *h, *before;
  const Raw *gs, *gv;
  Raw* gx;
  float* carry;  // gradient of v after the step, then of v before it
  float *param_sums, *norm_sums;
  int64_t place, mask;  // neuron i adds to the norm_sums of (place + i) & mask
  const Raw* ahead;

  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }
  TK_INLINE BackwardRow at(int64_t i) const {
    BackwardRow r = *this;
    r.params = params.at(i), r.in = in.at(i), r.coef = coef.at(i);
    r.h += i, r.before += i, r.carry += i, r.ahead += i, r.place += i;
    if (param_sums) r.param_sums += i;
    if (gs) r.gs += i;
    if (gv) r.gv += i;
    if (gx) r.gx += i;
    return r;
  }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    const bool plain = gs && !gv && !param_sums && !detach, normed = in.affine.base;
    if (plain && STREAM && !normed && share == 1.0f) return with_reset<STREAM, kDirect>(from, n);
    if (!plain || !normed || params.step) return run<STREAM, kAnything, -1>(from, n);
    if (norm_sums && !gx) return with_reset<false, kSum>(from, n);
    if (norm_sums && !coef.base) return with_reset<STREAM, kSumWrite>(from, n);
    if (!norm_sums && coef.base) return with_reset<STREAM, kCoef>(from, n);
    run<STREAM, kAnything, -1>(from, n);
  }
  template <bool STREAM, int KIND>
  TK_INLINE void with_reset(int64_t from, int64_t n) const {
    if (reset == kHard) return run<STREAM, KIND, kHard>(from, n);
    if (reset == kSoft) return run<STREAM, KIND, kSoft>(from, n);
    if constexpr (KIND == kDirect) return run<STREAM, KIND, kNone>(from, n);
    run<STREAM, kAnything, -1>(from, n);
  }
  template <bool STREAM, int KIND, int RESET>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    constexpr bool ANY = KIND == kAnything, NORM = KIND > kDirect;
    const BackwardRow r = at(from);
    const vfloat sharpness = lit<vfloat>(alpha), quarter = lit<vfloat>(share);
    const Neuron<vfloat> same = neuron(r.params, 0);
    for (int64_t i = 0; i < n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = !NORM && r.params.step ? neuron(r.params, i) : same;
      vfloat gs = !ANY || r.gs ? get<D>(r.gs + i) : vfloat{};
      if (KIND != kDirect) gs *= quarter;
      vfloat gv = load(r.carry + i);
      if (ANY && r.gv) gv += get<D>(r.gv + i);
      const auto g =
          step_gradient<SURROGATE>(p, load(r.h + i), gs, gv, sharpness, ANY ? r.reset : RESET, ANY && r.detach);
      vfloat gx = p.gain * g.h;
      store(r.carry + i, p.decay * g.h);
      if (NORM || (ANY && r.in.affine.base)) {
        const vfloat deviation = get<D>(r.in.x + i) - r.in.affine.row(kCenter, i);
        if (ANY ? r.norm_sums != nullptr : KIND != kCoef) {
          float* sum = r.norm_sums + ((r.place + i) & r.mask);
          add_to(sum, gx), add_to(sum + kStride, gx, deviation);
        }
        if (ANY ? r.coef.base != nullptr : KIND == kCoef) gx = input_gradient(r.coef, i, gx, deviation);
      }
      if (KIND != kSum && (!ANY || r.gx)) put<STREAM>(r.gx + i, D::pack(gx));
      if (ANY && r.param_sums) r.add_params(i, p, g);
    }
  }
  TK_INLINE void add_params(int64_t i, const Neuron<vfloat>& p, const StepGradient<vfloat>& g) const {
    float* to = param_sums + i;
    const vfloat x = in.affine.base ? current<D>(in, i) : get<D>(in.x + i);
    add_to(to + kDecay * kStride, g.h, v_before(p, before, i, before_reset));
    add_to(to + kGain * kStride, g.h, x);
    add_to(to + kBias * kStride, g.h);
    add_to(to + kThreshold * kStride, g.threshold);
    if (reset == kSoft) add_to(to + kResetAmount * kStride, g.reset_amount);
    if (reset == kHard) add_to(to + kVReset * kStride, g.v_reset);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    BackwardRow r = at(from);
    Staged<Raw> new_x, new_residual, new_gs, new_gv, new_gx;
    const Kept<1> kept(r.carry);
    const Kept<kParams> kept_params(r.param_sums);
    const Kept<2> kept_norm(norm_sums ? norm_sums + (r.place & r.mask) : nullptr);
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.gs = new_gs.in(r.gs, count), r.gv = new_gv.in(r.gv, count), r.gx = new_gx.out(r.gx);
    r.template whole<false>(0, kLanes);
    if (gx) new_gx.back(gx + from, count);
    kept.restore(count), kept_params.restore(count), kept_norm.restore(count);
  }
};

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
        norm_sums(s.take(2 * kStride)),
        params(s.take(kParams * kParameterStride), kParams),
        affine(s.take(kAffine * kParameterStride), kAffine),
        coef(s.take(kAffine * kParameterStride), kAffine),
        pooled((Raw*)s.take(kBackwardBlock / 4 + kPoolPad)),
        gs((Raw*)s.take(kBackwardBlock + kPoolPad)) {}
};

// Step t of a block, backwards; `row` has what all steps of the block share, j is the step's place in its chunk.
template <class D, int SURROGATE>
TK_INLINE void backward_step(const LifArgs& a, int64_t t, int j, int64_t n0, const Block& b,
                             const BackwardRow<D, SURROGATE>& shared, const BackwardMemory<D>& m, bool streaming) {
  using Raw = typename D::Raw;
  if (a.pool_row && a.gs) {
    __builtin_memcpy(m.pooled, element<Raw>(a.gs, (t * a.N + n0) / 4), sizeof(Raw) * (b.size() / 4));
    spread<D>(m.pooled, b.size(), b.fold_row, b.fold_inner, m.gs);
  }
  for (int64_t r = 0; r < b.runs; ++r) {
    const int64_t at = t * a.N + b.start(r), i = r * b.length;
    BackwardRow<D, SURROGATE> row = shared;
    row.params = shared.params.at(i), row.coef = shared.coef.at(i);
    row.in = {element<Raw>(a.x, t * a.x_stride + b.start(r)), element<Raw>(a.residual, at), shared.in.affine.at(i)};
    row.before_reset = j ? a.reset : kNone;
    row.h = m.h + j * kStride + i, row.before = j ? row.h - kStride : m.start + i;
    row.gs = a.pool_row && a.gs ? m.gs + i : element<Raw>(a.gs, at);
    row.gv = element<Raw>(a.gv, at), row.gx = element<Raw>(a.gx, at);
    row.carry = m.carry + i, row.param_sums = a.gparams ? m.param_sums + i : nullptr;
    row.place = shared.mask < 0 ? i : 0;
    // Before this chunk comes the one before it; before the first, the next block.
    if (j) {
      row.ahead = a.gs && !a.pool_row ? element<Raw>(a.gs, at - a.N) : row.in.x - a.x_stride;
    } else {
      row.ahead = t ? row.in.x - kChunk * a.x_stride : row.in.x + b.length;
    }
    // Sums in turns start with the row, so it may not have a head.
    if (streaming && a.gx && !(row.norm_sums && row.to_aligned_output(1))) {
      along<true>(row, b.length);
    } else {
      along<false>(row, b.length);
    }
  }
}

template <class D, int SURROGATE>
void backward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  BackwardMemory<D> m(Scratch{scratch});
  const ParamSums param_sums{m.param_sums, a.gparams ? totals : nullptr};
  NormSums norm_sums(m.norm_sums, a.norm_sums ? totals + kParams * a.C : nullptr);
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kBackwardBlock);
    BackwardRow<D, SURROGATE> shared = {m.params.parameters(a, b)};
    shared.in.affine = m.affine.affine(a, b, a.affine), shared.coef = m.coef.affine(a, b, a.coef);
    shared.alpha = a.alpha, shared.share = a.pool_row ? 0.25f : 1.0f;
    shared.reset = a.reset, shared.detach = a.detach != 0;
    shared.norm_sums = a.norm_sums ? m.norm_sums : nullptr;
    read_row(m.carry, a.gv_final, 0, b);
    for (int64_t t0 = (a.T - 1) / kChunk * kChunk; t0 >= 0; t0 -= kChunk) {
      const int steps = (int)(a.T - t0 < kChunk ? a.T - t0 : kChunk);
      read_row(m.start, t0 ? a.edges : a.v0, t0 ? (t0 / kChunk - 1) * a.N : 0, b);
      recompute_chunk<D>(a, shared.params, shared.in.affine, t0, steps, b, m.start, m.h);
      param_sums.clear(a);
      for (int j = steps - 1; j >= 0; --j) {
        norm_sums.begin(a, b, !shared.in.affine.step, m.affine.fresh && t0 + j + 1 == a.T);
        shared.mask = norm_sums.mask;
        backward_step(a, t0 + j, j, n0, b, shared, m, streaming);
      }
      param_sums.add(a, b);
    }
    if (a.gv0) write_row(a.gv0, 0, m.carry, b, streaming);
  }
  norm_sums.flush(a);
  fence();
}

template <class D, int SURROGATE>
void backward_pick(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  if (a.surrogate == SURROGATE) return backward_blocks<D, SURROGATE>(a, begin, end, scratch, streaming, totals);
  if constexpr (SURROGATE + 1 < kSurrogates) backward_pick<D, SURROGATE + 1>(a, begin, end, scratch, streaming, totals);
}

inline void lif_backward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  for_dtype(a.dtype, [&](auto d) { backward_pick<decltype(d), 0>(a, begin, end, scratch, streaming, totals); });
}
