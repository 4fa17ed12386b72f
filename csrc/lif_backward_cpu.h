// LIF backward on the CPU: h of a chunk is computed again, then its steps run backwards.
//
// No include guard: each instruction set includes it inside a namespace of its own, after lif_rows_cpu.h.

// v before a step: `from` holds h of the step before, or v itself where `reset` is kNone.
TK_INLINE vfloat v_before(const Neuron<vfloat>& p, const float* from, int64_t i, int reset) {
  return reset_after(p, load(from + i), reset);
}

// h of one step from x and the row before it.
template <class D>
struct RecomputeRow {
  using Raw = typename D::Raw;
  Rows rows;
  const Raw* x;
  const float* before;
  int before_reset;
  float* h;
  const Raw* ahead;

  template <bool STREAM>
  TK_NOINLINE void whole(int64_t from, int64_t n) const {
    const RecomputeRow r = *this;
    const Neuron<vfloat> same = neuron(r.rows, 0);
    for (int64_t i = from; i < from + n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = r.rows.step ? neuron(r.rows, i) : same;
      store(r.h + i, charge(p, v_before(p, r.before, i, r.before_reset), get<D>(r.x + i)));
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {  // the lanes behind are padding
    RecomputeRow r = {{rows.base + from * rows.step, rows.step}, x, before + from, before_reset, h + from, x};
    Staged<Raw> new_x;
    r.x = new_x.in(x + from, count);
    r.template whole<false>(0, kLanes);
  }
};

// One step backward of a block. gs, gv and sums may be null.
constexpr int64_t kStride = kBackwardBlock + kPad;  // between the rows of scratch memory
template <class D, int SURROGATE>
struct BackwardRow {
  using Raw = typename D::Raw;
  Rows rows;
  float alpha;
  int reset, before_reset;
  bool detach;
  const float *h, *before;
  const Raw *x, *gs, *gv;
  Raw* gx;
  float *carry, *sums;  // carry: gradient of v after the step, then of v before it; sums: kParams rows
  const Raw* ahead;

  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }
  TK_INLINE BackwardRow at(int64_t i) const {
    BackwardRow r = *this;
    r.rows.base += i * rows.step, r.h += i, r.before += i, r.x += i, r.gx += i, r.carry += i, r.ahead += i;
    if (gs) r.gs += i;
    if (gv) r.gv += i;
    if (sums) r.sums += i;
    return r;
  }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    if (!STREAM || !gs || gv || sums || detach) return run<STREAM, -1>(from, n);
    if (reset == kHard) return run<STREAM, kHard>(from, n);
    if (reset == kSoft) return run<STREAM, kSoft>(from, n);
    run<STREAM, kNone>(from, n);
  }
  // RESET: the plain case of that reset (gs alone comes in, no sums, not detached); -1: whatever the members say.
  template <bool STREAM, int RESET>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    constexpr bool ANY = RESET < 0;
    const BackwardRow r = at(from);
    const vfloat sharpness = lit<vfloat>(alpha);
    const Neuron<vfloat> same = neuron(r.rows, 0);
    for (int64_t i = 0; i < n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = r.rows.step ? neuron(r.rows, i) : same;
      const vfloat gs = !ANY || r.gs ? get<D>(r.gs + i) : vfloat{};
      vfloat gv = load(r.carry + i);
      if (ANY && r.gv) gv += get<D>(r.gv + i);
      const auto g =
          step_gradient<SURROGATE>(p, load(r.h + i), gs, gv, sharpness, ANY ? r.reset : RESET, ANY && r.detach);
      put<STREAM>(r.gx + i, D::pack(p.gain * g.h));
      store(r.carry + i, p.decay * g.h);
      if (ANY && r.sums) r.add_sums(i, p, g);
    }
  }
  TK_INLINE void add_sums(int64_t i, const Neuron<vfloat>& p, const StepGradient<vfloat>& g) const {
    const auto add = [&](Param k, vfloat a, vfloat b) __attribute__((always_inline)) {
      float* sum = sums + k * kStride + i;
      store(sum, fma_(a, b, load(sum)));
    };
    const vfloat one = lit<vfloat>(1.0f);
    add(kDecay, g.h, v_before(p, before, i, before_reset));
    add(kGain, g.h, get<D>(x + i));
    add(kBias, g.h, one);
    add(kThreshold, g.threshold, one);
    if (reset == kSoft) add(kResetAmount, g.reset_amount, one);
    if (reset == kHard) add(kVReset, g.v_reset, one);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    BackwardRow r = at(from);
    Staged<Raw> new_x, new_gs, new_gv, new_gx;
    const Kept kept(r.carry);
    float before_sums[kParams][kLanes];
    for (int k = 0; sums && k < kParams; ++k) store(before_sums[k], load(r.sums + k * kStride));
    r.x = new_x.in(r.x, count), r.gs = new_gs.in(r.gs, count), r.gv = new_gv.in(r.gv, count);
    r.gx = new_gx.out(r.gx);
    r.template whole<false>(0, kLanes);
    new_gx.back(gx + from, count);
    kept.restore(r.carry, count);
    for (int k = 0; sums && k < kParams; ++k) {
      float* sum = r.sums + k * kStride;
      store(sum, where_(lane_numbers() < count, load(sum), load(before_sums[k])));
    }
  }
};

// The sum of n floats in double, in an order that depends on n alone.
inline double ordered_sum(const float* from, int64_t n) {
  typedef double vdouble __attribute__((vector_size(32)));
  typedef float vquad __attribute__((vector_size(16)));
  vdouble even{}, odd{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    even += __builtin_convertvector(load_as<vquad>(from + i), vdouble);
    odd += __builtin_convertvector(load_as<vquad>(from + i + 4), vdouble);
  }
  even += odd;
  double sum = (even[0] + even[1]) + (even[2] + even[3]);
  for (; i < n; ++i) sum += from[i];
  return sum;
}

// Adds the rows of a block's sums to the totals of their channels.
inline void add_channels(const LifArgs& a, int64_t n0, int64_t n, const float* rows, double* totals) {
  for (int k = 0; k < kParams; ++k) {
    if ((k == kResetAmount && a.reset != kSoft) || (k == kVReset && a.reset != kHard)) continue;
    const float* row = rows + k * kStride;
    channel_runs(a, n0, n, [&](int64_t i, int64_t channel, int64_t length) {
      double* total = totals + k * a.C + channel;
      if (a.inner == 1 && a.C > 1) {
        for (int64_t j = 0; j < length; ++j) total[j] += row[i + j];
      } else {
        *total += ordered_sum(row + i, length);
      }
    });
  }
}

// The h of steps t0 .. t0 + steps - 1 of a block, in rows kStride apart; `start` is v before them.
template <class D>
void recompute_chunk(const LifArgs& a, const Rows& rows, int64_t t0, int steps, int64_t n0, int64_t n,
                     const float* start, float* h) {
  using Raw = typename D::Raw;
  const float* before = start;
  for (int j = 0; j < steps; ++j) {
    const int64_t at = (t0 + j) * a.N + n0;
    RecomputeRow<D> row = {rows, element<Raw>(a.x, at), before, j ? a.reset : kNone, h + j * kStride};
    row.ahead = j + 1 < steps || !a.gs ? row.x + a.N : element<Raw>(a.gs, at);
    along<false>(row, n);
    before = row.h;
  }
}

template <class D, int SURROGATE>
void backward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  using Raw = typename D::Raw;
  float *h = scratch, *start = h + kChunk * kStride, *carry = start + kStride, *sums = carry + kStride;
  float* parameters = sums + kParams * kStride;
  for (int64_t n0 = begin, n = 0; n0 < end; n0 += n) {
    n = block_length(a, n0, end, kBackwardBlock);
    const Rows rows = parameter_rows(a, n0, n, parameters);
    read_row(carry, a.gv_final, n0, n);
    for (int64_t t0 = (a.T - 1) / kChunk * kChunk; t0 >= 0; t0 -= kChunk) {
      const int steps = (int)(a.T - t0 < kChunk ? a.T - t0 : kChunk);
      read_row(start, t0 ? a.edges : a.v0, t0 ? (t0 / kChunk - 1) * a.N + n0 : n0, n);
      recompute_chunk<D>(a, rows, t0, steps, n0, n, start, h);
      if (totals) __builtin_memset(sums, 0, sizeof(float) * kParams * kStride);
      for (int j = steps - 1; j >= 0; --j) {
        const int64_t at = (t0 + j) * a.N + n0;
        BackwardRow<D, SURROGATE> row = {rows, a.alpha, a.reset, j ? a.reset : kNone, a.detach != 0};
        row.h = h + j * kStride, row.before = j ? row.h - kStride : start;
        row.x = element<Raw>(a.x, at), row.gs = element<Raw>(a.gs, at), row.gv = element<Raw>(a.gv, at);
        row.gx = element<Raw>(a.gx, at), row.carry = carry, row.sums = totals ? sums : nullptr;
        // Before this chunk comes the one before it; before the first, the next block.
        row.ahead =
            j ? element<Raw>(a.gs ? a.gs : a.x, at - a.N) : element<Raw>(a.x, t0 ? (t0 - kChunk) * a.N + n0 : at + n);
        if (streaming) {
          along<true>(row, n);
        } else {
          along<false>(row, n);
        }
      }
      if (totals) add_channels(a, n0, n, sums, totals);
    }
    if (a.gv0) write_row(a.gv0, n0, carry, n, streaming);
  }
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
