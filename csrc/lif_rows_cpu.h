// What both directions of the LIF share on the CPU: blocks of neurons x chunks of kChunk steps, one pass over memory. A
// row is one step of a block.
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

// Element `at` of a tensor, or null where there is none.
template <class Raw>
TK_INLINE Raw* element(uint64_t tensor, int64_t at) {
  return tensor ? (Raw*)tensor + at : nullptr;
}

// f(element type) for a number of Dtype.
template <class F>
TK_INLINE void for_dtype(int dtype, F f) {
  if (dtype == kFloat32) f(Float32{});
  if (dtype == kBFloat16) f(BFloat16{});
  if (dtype == kFloat16) f(Float16{});
}
