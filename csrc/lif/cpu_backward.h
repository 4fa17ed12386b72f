// LIF backward on the CPU: h of a chunk is computed again, then its steps run backwards.
//
// No include guard: each instruction set includes it inside a namespace of its own, after lif/cpu_backward_row.h.

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
