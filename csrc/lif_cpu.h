// LIF on the CPU: blocks of neurons x chunks of kChunk steps, one pass over memory. A row is one step of a block.
//
// No include guard: each instruction set includes it inside a namespace of its own, after simd.h and lif_math.h.
// Lanes are neurons, and nothing is added across lanes but in add_channels, in a fixed order: the width of a vector
// changes no result.

// The parameters of a block: a float a neuron (step 1), or one vector for all (step 0).
struct Rows {
  const float* at[kParams];
  int64_t step;
};

TK_INLINE Neuron<vfloat> neuron(const Rows& rows, int64_t i) {
  const int64_t o = i * rows.step;
  return {load(rows.at[kDecay] + o),       load(rows.at[kGain] + o),      load(rows.at[kBias] + o),
          load(rows.at[kResetAmount] + o), load(rows.at[kThreshold] + o), load(rows.at[kVReset] + o)};
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

// The parameters of neurons [n0, n0 + n), laid out in `memory`, kParams rows `stride` floats apart.
inline Rows parameter_rows(const LifArgs& a, int64_t n0, int64_t n, float* memory, int64_t stride) {
  Rows rows{{}, a.C > 1 && a.params != 0};
  for (int k = 0; k < kParams; ++k) {
    float* row = memory + k * stride;
    const float* from = (const float*)a.params + k * a.C;
    rows.at[k] = row;
    if (!rows.step) {
      store(row, lit<vfloat>(a.params ? *from : a.scalars[k]));
      continue;
    }
    channel_runs(a, n0, n, [&](int64_t i, int64_t channel, int64_t length) {
      if (a.inner == 1) {
        __builtin_memcpy(row + i, from + channel, sizeof(float) * length);
      } else {
        for (int64_t j = 0; j < length; ++j) row[i + j] = from[channel];
      }
    });
  }
  return rows;
}

// A row of a [.., N] float32 tensor, or zeros where there is none.
inline void read_row(float* row, uint64_t tensor, int64_t at, int64_t n) {
  if (tensor) {
    __builtin_memcpy(row, (const float*)tensor + at, sizeof(float) * n);
  } else {
    __builtin_memset(row, 0, sizeof(float) * n);
  }
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

// One vector of an element type: whole, or its first lanes.
template <class D, bool WHOLE>
TK_INLINE vfloat get(const typename D::Raw* from, int count) {
  if constexpr (WHOLE) return D::unpack(load_as<typename D::Pack>(from));
  return D::unpack(load_first<typename D::Pack>(from, count));
}
template <class D, bool WHOLE, bool STREAM>
TK_INLINE void put(typename D::Raw* to, vfloat value, int count) {
  const typename D::Pack packed = D::pack(value);
  if constexpr (!WHOLE) {
    store_first(to, packed, count);
  } else if constexpr (STREAM) {
    stream(to, packed);
  } else {
    __builtin_memcpy(to, &packed, sizeof packed);
  }
}

template <bool WHOLE>
struct Whole {
  static constexpr bool value = WHOLE;
};

// body(Whole, i, count) along a row: the lanes before `out` is aligned for streaming, whole vectors, the rest.
template <class D, bool STREAM, class Body>
TK_INLINE void along(const typename D::Raw* out, int64_t n, Body body) {
  int64_t i = 0;
  if constexpr (STREAM) {
    i = to_aligned<typename D::Pack>(out, n);
    if (i) body(Whole<false>{}, int64_t{0}, (int)i);
  }
  for (; i + kLanes <= n; i += kLanes) body(Whole<true>{}, i, kLanes);
  if (i < n) body(Whole<false>{}, i, (int)(n - i));
}

// One step forward: v in place; s and v_out may be null. Returns `bad` with NaN where an h was not finite.
template <class D, bool STREAM>
vfloat forward_row(const Rows& rows, const typename D::Raw* x, typename D::Raw* s, typename D::Raw* v_out, float* v,
                   int64_t n, int reset, vfloat bad) {
  along<D, STREAM>(s ? s : v_out, n, [&](auto whole, int64_t i, int count) __attribute__((always_inline)) {
    constexpr bool W = decltype(whole)::value;
    const Neuron<vfloat> p = neuron(rows, i);
    const vfloat h = charge(p, load(v + i), get<D, W>(x + i, count));
    const vfloat after = reset_after(p, h, reset);
    const vfloat seen = W ? h : where_(lane_numbers() < count, h, vfloat{});
    bad = fma_(seen, vfloat{}, bad);
    if (s) put<D, W, STREAM>(s + i, fire(p, h), count);
    if (v_out) put<D, W, STREAM>(v_out + i, after, count);
    put<Float32, W, false>(v + i, after, count);
  });
  return bad;
}

template <class D>
void forward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  using Raw = typename D::Raw;
  const Raw* x = (const Raw*)a.x;
  Raw *s = (Raw*)a.s, *v_out = (Raw*)a.v;
  float *v = scratch, *parameters = scratch + kForwardBlock + kPad;
  if (s && v_out && (a.s - a.v) % 64) streaming = false;  // a row is led to alignment for both at once
  const bool stream_rows = streaming && (s || v_out);
  vfloat bad{};
  for (int64_t n0 = begin; n0 < end; n0 += kForwardBlock) {
    const int64_t n = end - n0 < kForwardBlock ? end - n0 : kForwardBlock;
    const Rows rows = parameter_rows(a, n0, n, parameters, kForwardBlock + kPad);
    read_row(v, a.v0, n0, n);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t at = t * a.N + n0;
      auto row = stream_rows ? forward_row<D, true> : forward_row<D, false>;
      bad = row(rows, x + at, s ? s + at : nullptr, v_out ? v_out + at : nullptr, v, n, a.reset, bad);
      if (a.edges && (t + 1) % kChunk == 0 && t + 1 < a.T)
        write_row(a.edges, ((t + 1) / kChunk - 1) * a.N + n0, v, n, streaming);
    }
    if (a.v_final) write_row(a.v_final, n0, v, n, streaming);
  }
  float lanes[kLanes];
  store(lanes, bad);
  for (int i = 0; i < kLanes; ++i)
    if (a.flag && lanes[i] != 0.0f) __atomic_store_n((int32_t*)a.flag, 1, __ATOMIC_RELAXED);
  fence();
}

// v before a step: `from` holds h of the step before, or v itself where `reset` is kNone.
TK_INLINE vfloat v_before(const Neuron<vfloat>& p, const float* from, int64_t i, int reset) {
  return reset_after(p, load(from + i), reset);
}

// h of one step from x and the row before it.
template <class D>
void recompute_row(const Rows& rows, const typename D::Raw* x, const float* before, int before_reset, float* h,
                   int64_t n) {
  along<D, false>(nullptr, n, [&](auto whole, int64_t i, int count) __attribute__((always_inline)) {
    const Neuron<vfloat> p = neuron(rows, i);
    store(h + i, charge(p, v_before(p, before, i, before_reset), get<D, decltype(whole)::value>(x + i, count)));
  });
}

// What one step backward reads and writes, at the first neuron of the block. gs, gv and sums may be null.
template <class Raw>
struct BackwardRow {
  const float *h, *before;
  int before_reset, reset;
  bool detach;
  const Raw *x, *gs, *gv;
  Raw* gx;
  float *carry, *sums;  // carry: gradient of v after the step, then of v before it; sums: kParams rows
};
constexpr int64_t kStride = kBackwardBlock + kPad;  // between the rows of scratch memory

template <class D, int SURROGATE, bool STREAM>
void backward_row(const Rows& rows, const BackwardRow<typename D::Raw>& m, vfloat alpha, int64_t n) {
  along<D, STREAM>(m.gx, n, [&](auto whole, int64_t i, int count) __attribute__((always_inline)) {
    constexpr bool W = decltype(whole)::value;
    const Neuron<vfloat> p = neuron(rows, i);
    const vfloat gs = m.gs ? get<D, W>(m.gs + i, count) : vfloat{};
    vfloat gv = load(m.carry + i);
    if (m.gv) gv += get<D, W>(m.gv + i, count);
    const auto g = step_gradient<SURROGATE>(p, load(m.h + i), gs, gv, alpha, m.reset, m.detach);
    put<D, W, STREAM>(m.gx + i, p.gain * g.h, count);
    put<Float32, W, false>(m.carry + i, p.decay * g.h, count);
    if (!m.sums) return;
    auto add = [&](Param k, vfloat a, vfloat b) __attribute__((always_inline)) {
      float* sum = m.sums + k * kStride + i;
      put<Float32, W, false>(sum, fma_(a, b, load(sum)), count);
    };
    const vfloat one = lit<vfloat>(1.0f);
    add(kDecay, g.h, v_before(p, m.before, i, m.before_reset));
    add(kGain, g.h, get<D, W>(m.x + i, count));
    add(kBias, g.h, one);
    add(kThreshold, g.threshold, one);
    if (m.reset == kSoft) add(kResetAmount, g.reset_amount, one);
    if (m.reset == kHard) add(kVReset, g.v_reset, one);
  });
}

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
  const vfloat alpha = lit<vfloat>(a.alpha);
  auto row_of = [](uint64_t tensor, int64_t at) { return tensor ? (Raw*)tensor + at : nullptr; };
  for (int64_t n0 = begin; n0 < end; n0 += kBackwardBlock) {
    const int64_t n = end - n0 < kBackwardBlock ? end - n0 : kBackwardBlock;
    const Rows rows = parameter_rows(a, n0, n, parameters, kStride);
    read_row(carry, a.gv_final, n0, n);
    for (int64_t t0 = (a.T - 1) / kChunk * kChunk; t0 >= 0; t0 -= kChunk) {
      const int steps = (int)(a.T - t0 < kChunk ? a.T - t0 : kChunk);
      read_row(start, t0 ? a.edges : a.v0, t0 ? (t0 / kChunk - 1) * a.N + n0 : n0, n);
      const auto before = [&](int j) { return j ? h + (j - 1) * kStride : start; };
      for (int j = 0; j < steps; ++j)
        recompute_row<D>(rows, (const Raw*)a.x + (t0 + j) * a.N + n0, before(j), j ? a.reset : kNone, h + j * kStride,
                         n);
      if (totals) __builtin_memset(sums, 0, sizeof(float) * kParams * kStride);
      for (int j = steps - 1; j >= 0; --j) {
        const int64_t at = (t0 + j) * a.N + n0;
        const BackwardRow<Raw> m = {h + j * kStride,   before(j),          j ? a.reset : kNone,
                                    a.reset,           a.detach != 0,      row_of(a.x, at),
                                    row_of(a.gs, at),  row_of(a.gv, at),   row_of(a.gx, at),
                                    carry,             totals ? sums : nullptr};
        (streaming ? backward_row<D, SURROGATE, true> : backward_row<D, SURROGATE, false>)(rows, m, alpha, n);
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
  if constexpr (SURROGATE + 1 < kSurrogates)
    backward_pick<D, SURROGATE + 1>(a, begin, end, scratch, streaming, totals);
}

inline void lif_backward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming,
                         double* totals) {
  for_dtype(a.dtype, [&](auto d) { backward_pick<decltype(d), 0>(a, begin, end, scratch, streaming, totals); });
}
