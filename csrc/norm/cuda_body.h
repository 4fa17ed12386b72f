// What one thread does of the statistics of a BatchNorm, and of the gradient of its input where there is a residual.
// Include after a dialect and lif/cuda_body.h; g++ compiles it too (tests/test_cuda_threads.py).
#pragma once

namespace trtkern {
namespace cuda {

constexpr int kStatisticsThreads = 256, kStatisticsRounds = 4;  // a block's threads, and the packs of each
constexpr int kMergeThreads = 64;                               // that merge the blocks of a channel

// Blocks over x [T, N] as one row of T * N numbers: the channels of a step come again in the next.
inline index::Tiles statistics_tiles(const LifArgs& a, int vec) {
  return index::Tiles::of(a.T * a.N, a.C, a.inner, vec, kStatisticsThreads, kStatisticsRounds);
}
inline index::Tiles statistics_tiles(const LifArgs& a) {
  const int wide = a.dtype == kFloat32 ? 4 : 8;
  const bool aligned = a.x % 16 == 0 && a.T * a.N % wide == 0;
  const index::Tiles t = statistics_tiles(a, aligned ? wide : 1);
  return t.groups != 0 ? t : statistics_tiles(a, 1);
}

// The numbers of one thread, which stay in registers while its block goes over them twice: first for their mean, then
// for the deviations from it. So a large mean costs no digits, nor does an outlier.
template <class E, int V>
struct Sample {
  Pack<E, V> x[kStatisticsRounds];
  int count = 0;

  TK_INLINE void load(const LifArgs& a, const index::Tiles& t, int64_t block, int thread) {
    TK_UNROLL
    for (int r = 0; r < kStatisticsRounds; ++r) {
      const int64_t n = t.first_neuron(block, thread, r);
      if (n >= t.N()) continue;
      x[r].load(address<E>(a.x, n));
      count = r + 1;
    }
  }
  // Sums of the numbers of each channel of the pack; of one channel: all in sum[0].
  TK_INLINE void add_up(int lanes, Real (&sum)[V]) const {
    TK_UNROLL
    for (int j = 0; j < V; ++j) {
      sum[j] = 0.0f;
      TK_UNROLL
      for (int r = 0; r < kStatisticsRounds; ++r) {
        if (r < count) sum[j] += x[r].get(j);
      }
    }
    if (lanes == 1) gather(sum);
  }
  // The same of the deviations from `mean` and of their squares.
  TK_INLINE void deviations(int lanes, const Real (&mean)[V], Real (&sum)[V], Real (&squares)[V]) const {
    TK_UNROLL
    for (int j = 0; j < V; ++j) {
      sum[j] = 0.0f, squares[j] = 0.0f;
      TK_UNROLL
      for (int r = 0; r < kStatisticsRounds; ++r) {
        if (r >= count) continue;
        const Real d = x[r].get(j) - mean[j];
        sum[j] += d;
        squares[j] = fma_(d, d, squares[j]);
      }
    }
    if (lanes == 1) gather(sum), gather(squares);
  }
  TK_INLINE static void gather(Real (&sum)[V]) {
    TK_UNROLL
    for (int j = 1; j < V; ++j) sum[0] += sum[j];
  }
};

// Number o of a block's sums (index::Tiles), from what its threads left in `words` [lanes, threads].
TK_INLINE Real column_sum(const index::Tiles& t, const uint32_t* words, int o) {
  Real sum = 0.0f;
  for (int thread = o / t.lanes; thread < t.threads; thread += 1 << t.shift) {
    sum += Float32::unpack(words[o % t.lanes * t.threads + thread], 0);
  }
  return sum;
}

// What a block found out about a channel: how many numbers, their mean, and the sum of squared deviations from it.
struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;

  // Chan, Golub and LeVeque's pairwise formula.
  TK_INLINE void merge(const Moments& other) {
    const double both = count + other.count;
    if (other.count == 0.0) return;
    const double apart = other.mean - mean, share = other.count / both;
    mean += apart * share;
    squares += other.squares + apart * apart * count * share;
    count = both;
  }
};

// `near`: a number close to the mean, from which deviations were taken.
TK_INLINE Moments moments_about(double count, Real near, Real sum, Real squares) {
  const double shift = widen(sum) / count;
  return {count, widen(near) + shift, widen(squares) - widen(sum) * shift};
}

// The workspace of the statistics, double [2, segments * C]: means, then squares; behind them the same of all segments,
// [2, C], and a counter.
TK_INLINE void store_moments(const LifArgs& a, const index::Tiles& t, int64_t block, int o, const Moments& m) {
  const int64_t at = t.place(block, o);
  store_double(a.workspace, at, m.mean);
  store_double(a.workspace, t.segments() * t.C() + at, m.squares);
}

inline uint64_t known_statistics(const LifArgs& a, const index::Tiles& t) {
  return a.workspace + 16 * t.segments() * t.C();
}

// One thread's share of the segments of a channel, merged.
TK_INLINE Moments merge_segments(const LifArgs& a, const index::Tiles& t, int64_t channel, int thread) {
  Moments all;
  for (int64_t segment = thread; segment < t.segments(); segment += kMergeThreads) {
    const int64_t at = index::offset(segment, channel, t.C());
    Moments one;
    one.count = static_cast<double>(t.count(segment));
    one.mean = load_double(a.workspace, at);
    one.squares = load_double(a.workspace, t.segments() * t.C() + at);
    all.merge(one);
  }
  return all;
}

// gx = coef[0] * gs + coef[1] * (x - center) + coef[2] for all steps of the neurons n .. n + V - 1.
template <class E, int V>
TK_INLINE void input_grad_thread(const LifArgs& a, int64_t n) {
  constexpr int K = 4;
  int64_t channel[V];
  Real center[V];
  Affine3 coef[V];
  Channels(a, n).next(a, channel);
  TK_UNROLL
  for (int j = 0; j < V; ++j) center[j] = load_row(a, a.affine, kCenter, channel[j]);
  load_affine(a, a.coef, channel, coef);
  for (int64_t step = 0; step < a.T; step += K) {
    const int count = steps(a, step, K);
    const int64_t N = again(count, a.N), first = index::offset(step, n, a.N);
    Pack<E, V> x[K], g[K];
    load_steps<E>(a.x, index::offset(step, n, a.x_stride), again(count, a.x_stride), count, x);
    load_steps<E>(a.gs, first, N, count, g);
    uint64_t at = address<E>(a.gx, first);
    TK_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      Real out[V];
      TK_UNROLL
      for (int j = 0; j < V; ++j) out[j] = input_gradient(g[k].get(j), x[k].get(j) - center[j], coef[j]);
      g[k].set(out);
      g[k].store(at);
      at = address<E>(at, N);
    }
  }
}

}  // namespace cuda
}  // namespace trtkern
