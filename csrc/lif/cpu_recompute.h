// LIF backward on the CPU, its first part: h of a chunk is computed again.
//
// No include guard: each instruction set includes it inside a namespace of its own, after cpu/rows.h.

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
