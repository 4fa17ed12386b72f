// LIF on the CPU: blocks of neurons x chunks of kChunk steps, one pass over memory. A row is one step of a block.
//
// No include guard: each instruction set includes it inside a namespace of its own, after simd.h and lif_math.h.
// Lanes are neurons, and nothing is added across lanes but in add_channels, in a fixed order: the width of a vector
// changes no result.

// The parameters of a block, kParams rows kParameterStride floats apart: a float a neuron (step 1), or one vector for
// all (step 0).
struct Rows {
  const float* base;
  int64_t step;
};

TK_INLINE Neuron<vfloat> neuron(const Rows& rows, int64_t i) {
  const float* at = rows.base + i * rows.step;
  const auto row = [&](Param k) __attribute__((always_inline)) { return load(at + k * kParameterStride); };
  return {row(kDecay), row(kGain), row(kBias), row(kResetAmount), row(kThreshold), row(kVReset)};
}

// The runs of neighbouring neurons from n0 on whose channels are one (inner > 1) or count up (inner = 1):
// run(i, channel, length), i counted from n0.
template <class Run>
TK_INLINE void channel_runs(const LifArgs& a, int64_t n0, int64_t n, Run run) {
  const int64_t span = a.inner == 1 ? a.C : a.inner;
  int64_t channel = a.inner == 1 ? n0 % a.C : n0 / a.inner % a.C;
  int64_t left = span - n0 % span;
  if (a.C == 1) left = n;
  for (int64_t i = 0; i < n;) {
    const int64_t length = left < n - i ? left : n - i;
    run(i, channel, length);
    i += length;
    left = span;
    channel = a.inner == 1 || channel + 1 == a.C ? 0 : channel + 1;
  }
}

// Neurons of the block at n0: within one channel where channels are long, so that its parameters are one vector; fewer
// than `most` where they are short, so that rows of parameters stay in L1.
inline int64_t block_length(const LifArgs& a, int64_t n0, int64_t end, int64_t most) {
  int64_t n = end - n0 < most ? end - n0 : most;
  if (a.C == 1) return n;
  const int64_t limit = a.inner < kLongRun ? kMixedBlock : a.inner - n0 % a.inner;
  return n < limit ? n : limit;
}

// The parameters of neurons [n0, n0 + n), laid out in `memory`.
inline Rows parameter_rows(const LifArgs& a, int64_t n0, int64_t n, float* memory) {
  const Rows rows{memory, a.params != 0 && a.C > 1 && a.inner < kLongRun};
  for (int k = 0; k < kParams; ++k) {
    float* row = memory + k * kParameterStride;
    const float* from = (const float*)a.params + k * a.C;
    if (!rows.step) {
      store(row, lit<vfloat>(a.params ? from[n0 / a.inner % a.C] : a.scalars[k]));
      continue;
    }
    __builtin_memset(row + n, 0, sizeof(float) * kPad);
    channel_runs(a, n0, n, [&](int64_t i, int64_t channel, int64_t length) {
      if (a.inner == 1) {
        __builtin_memcpy(row + i, from + channel, sizeof(float) * length);
      } else {
        const float value = from[channel];
        for (int64_t j = 0; j < length; ++j) row[i + j] = value;
      }
    });
  }
  return rows;
}

// A row of a [.., N] float32 tensor, or zeros where there is none; zeros behind it.
inline void read_row(float* row, uint64_t tensor, int64_t at, int64_t n) {
  if (tensor) __builtin_memcpy(row, (const float*)tensor + at, sizeof(float) * n);
  const int64_t have = tensor ? n : 0;
  __builtin_memset(row + have, 0, sizeof(float) * (n - have + kPad));
}
inline void write_row(uint64_t tensor, int64_t at, const float* row, int64_t n, bool streaming) {
  float* to = (float*)tensor + at;
  int64_t i = 0;
  if (streaming) {
    i = to_aligned<vfloat>(to, n);
    __builtin_memcpy(to, row, sizeof(float) * i);
    for (; i + kLanes <= n; i += kLanes) stream(to + i, load(row + i));
  }
  __builtin_memcpy(to + i, row + i, sizeof(float) * (n - i));
}

// One vector of an element type.
template <class D>
TK_INLINE vfloat get(const typename D::Raw* from) {
  return D::unpack(load_as<typename D::Pack>(from));
}
template <bool STREAM, class Raw, class Pack>
TK_INLINE void put(Raw* to, Pack value) {
  if constexpr (STREAM) {
    stream(to, value);
  } else {
    __builtin_memcpy(to, &value, sizeof value);
  }
}

// `row` of n neurons in whole vectors: the lanes before its output is aligned for streaming, what can be streamed, the
// rest. Odd lanes pass through a small copy (Row::part) padded to a vector.
template <bool STREAM, class Row>
TK_INLINE void along(const Row& row, int64_t n) {
  int64_t head = 0;
  if constexpr (STREAM) head = row.to_aligned_output(n);
  if (head) row.part(0, (int)head);
  const int64_t body = (n - head) / kLanes * kLanes;
  if (body) row.template whole<STREAM>(head, body);
  if (head + body < n) row.part(head + body, (int)(n - head - body));
}

// A vector's worth of tensor memory that may not be read or written beyond `count` elements. Null stays null.
template <class Raw>
struct Staged {
  Raw memory[kLanes] = {};
  const Raw* in(const Raw* from, int count) {
    if (from) __builtin_memcpy(memory, from, sizeof(Raw) * count);
    return from ? memory : nullptr;
  }
  Raw* out(const Raw* to) { return to ? memory : nullptr; }
  void back(Raw* to, int count) const {
    if (to) __builtin_memcpy(to, memory, sizeof(Raw) * count);
  }
};

// A vector of scratch memory whose lanes from `count` on keep their values.
struct Kept {
  float memory[kLanes];
  explicit Kept(const float* from) { store(memory, load(from)); }
  void restore(float* to, int count) const { store(to, where_(lane_numbers() < count, load(to), load(memory))); }
};

// One step forward of a block: v in place; s and v_out may be null; `bad` is NaN where an h was not finite.
template <class D>
struct ForwardRow {
  using Raw = typename D::Raw;
  Rows rows;
  const Raw* x;
  Raw *s, *v_out;
  float *v, *bad;
  int reset;
  const Raw* ahead;  // the row of x that comes next

  TK_INLINE ForwardRow at(int64_t i) const {
    return {{rows.base + i * rows.step, rows.step},
            x + i,
            s ? s + i : s,
            v_out ? v_out + i : v_out,
            v + i,
            bad,
            reset,
            ahead + i};
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(s ? s : v_out, n); }

  template <bool STREAM>
  TK_NOINLINE void whole(int64_t from, int64_t n) const {
    const ForwardRow r = at(from);
    vfloat seen = load(bad);
    for (int64_t i = 0; i < n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = neuron(r.rows, i);
      const vfloat h = charge(p, load(r.v + i), get<D>(r.x + i));
      const vfloat after = reset_after(p, h, r.reset);
      seen = fma_(h, vfloat{}, seen);
      if (r.s) put<STREAM>(r.s + i, D::pack_exact(fire(p, h)));
      if (r.v_out) put<STREAM>(r.v_out + i, D::pack(after));
      store(r.v + i, after);
    }
    store(r.bad, seen);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    ForwardRow r = at(from);
    Raw *to_s = r.s, *to_v = r.v_out;
    Staged<Raw> new_x, new_s, new_v;
    const Kept kept(r.v);
    r.x = new_x.in(r.x, count), r.s = new_s.out(r.s), r.v_out = new_v.out(r.v_out);
    r.template whole<false>(0, kLanes);
    new_s.back(to_s, count), new_v.back(to_v, count);
    kept.restore(r.v, count);
  }
};

template <class D>
void forward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  using Raw = typename D::Raw;
  float *v = scratch, *parameters = scratch + kForwardBlock + kPad, bad[kLanes] = {};
  if (a.s && a.v && (a.s - a.v) % 64) streaming = false;  // a row is led to alignment for both at once
  const auto row_of = [](uint64_t tensor, int64_t at) { return tensor ? (Raw*)tensor + at : nullptr; };
  for (int64_t n0 = begin, n = 0; n0 < end; n0 += n) {
    n = block_length(a, n0, end, kForwardBlock);
    const Rows rows = parameter_rows(a, n0, n, parameters);
    read_row(v, a.v0, n0, n);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t at = t * a.N + n0;
      const ForwardRow<D> row = {rows,
                                 row_of(a.x, at),
                                 row_of(a.s, at),
                                 row_of(a.v, at),
                                 v,
                                 bad,
                                 a.reset,
                                 row_of(a.x, t + 1 < a.T ? at + a.N : n0 + n)};
      if (streaming && (a.s || a.v)) {
        along<true>(row, n);
      } else {
        along<false>(row, n);
      }
      if (a.edges && (t + 1) % kChunk == 0 && t + 1 < a.T)
        write_row(a.edges, ((t + 1) / kChunk - 1) * a.N + n0, v, n, streaming);
    }
    if (a.v_final) write_row(a.v_final, n0, v, n, streaming);
  }
  for (int i = 0; i < kLanes; ++i)
    if (a.flag && bad[i] != 0.0f) __atomic_store_n((int32_t*)a.flag, 1, __ATOMIC_RELAXED);
  fence();
}

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
    for (int64_t i = from; i < from + n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = neuron(r.rows, i);
      store(r.h + i, charge(p, v_before(p, r.before, i, r.before_reset), get<D>(r.x + i)));
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {  // the lanes behind are padding
    RecomputeRow r = {{rows.base + from * rows.step, rows.step}, x + from, before + from, before_reset, h + from, x};
    Staged<Raw> new_x;
    r.x = new_x.in(r.x, count);
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
    for (int64_t i = 0; i < n; i += kLanes) {
      prefetch(r.ahead + i);
      const Neuron<vfloat> p = neuron(r.rows, i);
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

template <class D, int SURROGATE>
void backward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  using Raw = typename D::Raw;
  float *h = scratch, *start = h + kChunk * kStride, *carry = start + kStride, *sums = carry + kStride;
  float* parameters = sums + kParams * kStride;
  const auto row_of = [](uint64_t tensor, int64_t at) { return tensor ? (Raw*)tensor + at : nullptr; };
  for (int64_t n0 = begin, n = 0; n0 < end; n0 += n) {
    n = block_length(a, n0, end, kBackwardBlock);
    const Rows rows = parameter_rows(a, n0, n, parameters);
    read_row(carry, a.gv_final, n0, n);
    for (int64_t t0 = (a.T - 1) / kChunk * kChunk; t0 >= 0; t0 -= kChunk) {
      const int steps = (int)(a.T - t0 < kChunk ? a.T - t0 : kChunk);
      read_row(start, t0 ? a.edges : a.v0, t0 ? (t0 / kChunk - 1) * a.N + n0 : n0, n);
      const auto before = [&](int j) { return j ? h + (j - 1) * kStride : start; };
      for (int j = 0; j < steps; ++j) {
        const Raw* x = row_of(a.x, (t0 + j) * a.N + n0);
        along<false>(RecomputeRow<D>{rows, x, before(j), j ? a.reset : kNone, h + j * kStride,
                                     j + 1 < steps || !a.gs ? x + a.N : row_of(a.gs, (t0 + j) * a.N + n0)},
                     n);
      }
      if (totals) __builtin_memset(sums, 0, sizeof(float) * kParams * kStride);
      for (int j = steps - 1; j >= 0; --j) {
        const int64_t at = (t0 + j) * a.N + n0;
        const BackwardRow<D, SURROGATE> row = {
            rows,
            a.alpha,
            a.reset,
            j ? a.reset : kNone,
            a.detach != 0,
            h + j * kStride,
            before(j),
            row_of(a.x, at),
            row_of(a.gs, at),
            row_of(a.gv, at),
            row_of(a.gx, at),
            carry,
            totals ? sums : nullptr,
            j ? row_of(a.gs ? a.gs : a.x, at - a.N) : row_of(a.x, t0 ? (t0 - kChunk) * a.N + n0 : at + n)};
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

// From run-time numbers to the instances above.
template <class F>
TK_INLINE void for_dtype(int dtype, F f) {
  if (dtype == kFloat32) f(Float32{});
  if (dtype == kBFloat16) f(BFloat16{});
  if (dtype == kFloat16) f(Float16{});
}

inline void lif_forward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { forward_blocks<decltype(d)>(a, begin, end, scratch, streaming); });
}

template <class D, int SURROGATE>
void backward_pick(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  if (a.surrogate == SURROGATE) return backward_blocks<D, SURROGATE>(a, begin, end, scratch, streaming, totals);
  if constexpr (SURROGATE + 1 < kSurrogates) backward_pick<D, SURROGATE + 1>(a, begin, end, scratch, streaming, totals);
}

inline void lif_backward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming, double* totals) {
  for_dtype(a.dtype, [&](auto d) { backward_pick<decltype(d), 0>(a, begin, end, scratch, streaming, totals); });
}
