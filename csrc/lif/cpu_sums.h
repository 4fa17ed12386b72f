// Sums over steps and neurons on the CPU: of a few in float, then in double, in an order that the width of a vector
// does not change.
//
// No include guard: each instruction set includes it inside a namespace of its own, after cpu/rows.h.

constexpr int64_t kSumStride = kStride + 512;  // between the two: loads do not meet stores 4096 bytes before them

// Adds to a vector of sums.
TK_INLINE void add_to(float* sum, vfloat a) { store(sum, a + load(sum)); }
TK_INLINE void add_to(float* sum, vfloat a, vfloat b) { store(sum, fma_(a, b, load(sum))); }

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
  for (int64_t left = n - i; left > 0; --left) sum += from[n - left];
  return sum;
}

// Adds a row of sums, a float a neuron of the block, to the totals of their channels.
inline void add_channels(const LifArgs& a, const Block& b, const float* row, double* totals) {
  channel_runs(a, b, [&](int64_t i, int64_t channel, int64_t length) {
    if (a.inner == 1 && a.C > 1) {
      for (int64_t j = 0; j < length; ++j) totals[channel + j] += row[i + j];
    } else {
      totals[channel] += ordered_sum(row + i, length);
    }
  });
}

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
