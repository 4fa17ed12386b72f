// BatchNorm on the CPU: the statistics of x, and the gradient of x from that of the normalised x.
//
// Statistics go in two passes over a block in the caches: its mean, then the squared deviations from it, in float; then
// the blocks are merged in double (Chan et al. 1983). So a large mean costs no digits, whatever element comes first.
#pragma once
#include "cpu/rows.h"

namespace trtkern::TK_ISA {

// Of n numbers: their mean and the sum of their squared deviations from it.
struct Moments {
  double n, mean, m2;
};
TK_INLINE Moments merged(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, delta = b.mean - a.mean, part = b.n / n;
  return {n, a.mean + delta * part, a.m2 + b.m2 + delta * delta * (a.n * part)};
}
// From the sums of n deviations from `around`, and of their squares.
TK_INLINE Moments moments_around(double n, double around, double sum, double squares) {
  const double mean = sum * (1.0 / n), m2 = squares - sum * mean;
  return {n, around + mean, m2 < 0.0 ? 0.0 : m2};
}

// Sums go into kMomentLanes lanes whatever the width of a vector, so all instruction sets agree bitwise.
constexpr int kMomentLanes = 32, kMomentVectors = kMomentLanes / kLanes;
constexpr int64_t kMomentPiece = 4096;

// f(k, vector k of kMomentLanes elements) over n elements; those behind the last are `fill`.
template <class D, class F>
TK_INLINE void over_lanes(const typename D::Raw* x, int64_t n, vfloat fill, F f) {
  int64_t i = 0;
  for (; i + kMomentLanes <= n; i += kMomentLanes)
#pragma GCC unroll 8
    for (int k = 0; k < kMomentVectors; ++k) f(k, i + k * kLanes, get<D>(x + i + k * kLanes));
  if (i == n) return;
  typename D::Raw last[kMomentLanes];
  __builtin_memset(last, 0, sizeof last);
  __builtin_memcpy(last, x + i, sizeof(*x) * (n - i));
  for (int k = 0; k < kMomentVectors; ++k)
    f(k, i, where_(lane_numbers() + k * kLanes < (int)(n - i), get<D>(last + k * kLanes), fill));
}
TK_INLINE double total(const vfloat* lanes) {
  float each[kMomentLanes];
  __builtin_memcpy(each, lanes, sizeof each);
  return ordered_sum(each, kMomentLanes);
}

template <class D>
TK_NOINLINE Moments piece_moments(const typename D::Raw* x, int64_t n) {
  vfloat sum[kMomentVectors] = {}, deviations[kMomentVectors] = {}, squares[kMomentVectors] = {};
  over_lanes<D>(x, n, vfloat{}, [&](int k, int64_t, vfloat value) __attribute__((always_inline)) { sum[k] += value; });
  const vfloat around = lit<vfloat>((float)(total(sum) / (double)n));
  over_lanes<D>(x, n, around, [&](int k, int64_t i, vfloat value) __attribute__((always_inline)) {
    if (k * kLanes * sizeof(*x) % 64 == 0) prefetch(x + n + i);
    const vfloat d = value - around;
    deviations[k] += d;
    squares[k] = fma_(d, d, squares[k]);
  });
  return moments_around((double)n, around[0], total(deviations), total(squares));
}

template <class D>
void run_moments_of(const LifArgs& a, int64_t begin, int64_t end, double* moments) {
  channel_runs(a, begin, end - begin, [&](int64_t i, int64_t channel, int64_t length) {
    double* to = moments + channel;
    for (int64_t j = 0; j < length; j += kMomentPiece) {
      const int64_t n = length - j < kMomentPiece ? length - j : kMomentPiece;
      const Moments all =
          merged({to[0], to[a.C], to[2 * a.C]}, piece_moments<D>((const typename D::Raw*)a.x + begin + i + j, n));
      to[0] = all.n, to[a.C] = all.mean, to[2 * a.C] = all.m2;
    }
  });
}
inline void run_moments(const LifArgs& a, int64_t begin, int64_t end, double* moments) {
  for_dtype(a.dtype, [&](auto d) { run_moments_of<decltype(d)>(a, begin, end, moments); });
}

// Sums of `rows` elements below one another, `stride` apart: VECTORS vectors, the last of `count` lanes. SQUARES: of
// the deviations from `around` and of their squares; the rows that come next are prefetched.
template <class D, int VECTORS, bool SQUARES>
TK_INLINE void column_sums(const typename D::Raw* x, int64_t stride, int64_t rows, int count, const float* around,
                           float* sums, float* squares) {
  vfloat sum[VECTORS] = {}, square[VECTORS] = {}, center[VECTORS] = {};
  for (int k = 0; SQUARES && k < VECTORS; ++k) center[k] = load(around + k * kLanes);
  const int64_t ahead = rows * stride;
  for (int64_t r = 0; r < rows; ++r, x += stride)
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; ++k) {
      typename D::Pack raw{};
      __builtin_memcpy(&raw, x + k * kLanes, VECTORS > 1 ? sizeof raw : sizeof(*x) * count);
      vfloat d = D::unpack(raw);
      if (SQUARES) {
        if (k * kLanes * sizeof(*x) % 64 == 0) prefetch(x + k * kLanes + ahead);
        d -= center[k];
        square[k] = fma_(d, d, square[k]);
      }
      sum[k] += d;
    }
  for (int k = 0; k < VECTORS; ++k) {
    store(sums + k * kLanes, sum[k]);
    if (SQUARES) store(squares + k * kLanes, square[k]);
  }
}
template <class D, bool SQUARES>
TK_NOINLINE void tile_sums(const typename D::Raw* x, int64_t stride, int64_t rows, int64_t columns, const float* around,
                           float* sums, float* squares) {
  int64_t k = 0;
  for (; k + 4 * kLanes <= columns; k += 4 * kLanes)
    column_sums<D, 4, SQUARES>(x + k, stride, rows, kLanes, around + k, sums + k, squares + k);
  for (; k < columns; k += kLanes) {
    const int count = columns - k < kLanes ? (int)(columns - k) : kLanes;
    column_sums<D, 1, SQUARES>(x + k, stride, rows, count, around + k, sums + k, squares + k);
  }
}

template <class D>
void column_moments_of(const LifArgs& a, int64_t r0, int64_t r1, int64_t k0, int64_t k1, float* scratch,
                       double* moments) {
  const int64_t K = a.C * a.inner;
  float *around = scratch, *deviations = around + kColumnTile, *squares = deviations + kColumnTile;
  for (int64_t k = k0; k < k1; k += kColumnTile) {
    const int64_t columns = k1 - k < kColumnTile ? k1 - k : kColumnTile;
    for (int64_t r = r0; r < r1; r += kRowTile) {
      const int64_t rows = r1 - r < kRowTile ? r1 - r : kRowTile;
      const typename D::Raw* x = (const typename D::Raw*)a.x + r * K + k;
      tile_sums<D, false>(x, K, rows, columns, around, around, squares);
      for (int64_t i = 0; i < columns; ++i) around[i] /= (float)rows;
      tile_sums<D, true>(x, K, rows, columns, around, deviations, squares);
      double *mean = moments + k, *m2 = mean + K;
      const double n = (double)rows, before = (double)(r - r0);
      for (int64_t i = 0; i < columns; ++i) {
        const Moments tile = moments_around(n, around[i], deviations[i], squares[i]);
        const Moments all = r == r0 ? tile : merged({before, mean[i], m2[i]}, tile);
        mean[i] = all.mean, m2[i] = all.m2;
      }
    }
  }
}
inline void column_moments(const LifArgs& a, int64_t r0, int64_t r1, int64_t k0, int64_t k1, float* scratch,
                           double* moments) {
  for_dtype(a.dtype, [&](auto d) { column_moments_of<decltype(d)>(a, r0, r1, k0, k1, scratch, moments); });
}

// One step of a block: gx from g.
template <class D>
struct InputGradRow {
  using Raw = typename D::Raw;
  Current<Raw> in;
  Rows coef;
  const Raw* g;
  Raw* gx;

  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }
  template <bool STREAM>
  TK_NOINLINE void whole(int64_t from, int64_t n) const {
    const InputGradRow row = *this;
    for (int64_t i = from; i < from + n; i += kLanes) {
      const vfloat deviation = get<D>(row.in.x + i) - row.in.affine.row(kCenter, i);
      put<STREAM>(row.gx + i, D::pack(input_gradient(triple(row.coef, i), get<D>(row.g + i), deviation)));
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {
    InputGradRow r = {in.at(from), coef.at(from), g + from, gx + from};
    Staged<Raw> new_x, new_g, new_gx;
    r.in.x = new_x.in(r.in.x, count), r.g = new_g.in(r.g, count), r.gx = new_gx.out(r.gx);
    r.template whole<false>(0, kSpan);
    new_gx.back(gx + from, count);
  }
};

template <class D>
void input_grad_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  using Raw = typename D::Raw;
  Scratch pieces{scratch};
  ChannelRows affine(pieces.take(kAffine * kParameterStride), kAffine);
  ChannelRows coef(pieces.take(kAffine * kParameterStride), kAffine);
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kForwardBlock);
    const Rows affine_rows = affine.affine(a, b, a.affine), coef_rows = coef.affine(a, b, a.coef);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t at = t * a.N + n0;
      const Current<Raw> in = {element<Raw>(a.x, t * a.x_stride + n0), nullptr, affine_rows};
      const InputGradRow<D> row = {in, coef_rows, element<Raw>(a.gs, at), element<Raw>(a.gx, at)};
      if (streaming) {
        along<true>(row, b.length);
      } else {
        along<false>(row, b.length);
      }
    }
  }
  fence();
}
inline void input_grad(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { input_grad_blocks<decltype(d)>(a, begin, end, scratch, streaming); });
}

}  // namespace trtkern::TK_ISA
