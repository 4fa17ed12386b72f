// Rows of floats times square weights, on vectors. The weights lie in panels, each of kPanel vectors of columns:
// [panel] [k][column]. Every sum goes over k in increasing order, one number at a time, whichever way it is taken: over
// all k (tiles of rows and columns in registers), or over the k that fired.
#pragma once
#include <type_traits>

#include "cpu/simd.h"
#include "recurrent/args.h"

namespace trtkern::TK_ISA {

constexpr int kPanel = 3;                           // vectors of a panel
constexpr int kTogether = 3;                        // panels that one list of spikes is added up for
constexpr int kDenseRows = kLanes == 16 ? 8 : 4;    // rows of a tile: kPanel times as many sums fill the registers
constexpr int64_t kPanelWidth = kPanel * TK_WIDTH;  // floats
constexpr int64_t kDenseShare = 4;                  // from one spike in so many on all k are taken

// Floats from a row of a product to the next.
inline int64_t product_pitch(int64_t width) { return (width + 31) / 32 * 32; }

inline int64_t panels_of(int64_t width) { return (width + kPanelWidth - 1) / kPanelWidth; }
inline int64_t vectors_bytes(int64_t width) { return panels_of(width) * width * kPanelWidth * sizeof(float); }
inline int64_t vectors_own(int64_t width, int64_t units) {
  return units * kSamples * (width + kLanes + 1) * sizeof(int32_t);
}

// a * b + c; where the processor has no fma it is not worth a call.
TK_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__) || defined(__AVX512F__)
  return fma_(a, b, c);
#else
  return a * b + c;
#endif
}

inline void lay_vectors(const RecurrentArgs& a, bool back, int64_t panel, char* weights, int* nonfinite) {
  const float* const from = (const float*)a.weight;
  const int64_t width = a.width, column = panel * kPanelWidth;
  const int64_t count = width - column < kPanelWidth ? width - column : kPanelWidth;
  float* to = (float*)weights + panel * width * kPanelWidth;
  int unusual = 0;
  for (int64_t k = 0; k < width; ++k, to += kPanelWidth) {
    for (int64_t j = 0; j < count; ++j) {
      to[j] = back ? from[k * width + column + j] : from[(column + j) * width + k];
      unusual |= !(__builtin_fabsf(to[j]) <= __FLT_MAX__);
    }
    for (int64_t j = count; j < kPanelWidth; ++j) to[j] = 0.0f;
  }
  if (unusual) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// ROWS rows, VECTORS vectors of a panel's columns, all k.
template <int ROWS, int VECTORS>
TK_NOINLINE void dense_tile(const float* panel, const float* from, int64_t width, float* out, int64_t pitch) {
  vfloat sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < width; ++k, panel += kPanelWidth) {
    vfloat weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) weights[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vfloat number = lit<vfloat>(from[r * width + k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(number, weights[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(out + r * pitch + v * kLanes, sums[r][v]);
}
template <int VECTORS>
TK_INLINE void dense_rows(const float* panel, const float* from, int64_t rows, int64_t width, float* out,
                          int64_t pitch) {
  int64_t r = 0;
  for (; r + kDenseRows <= rows; r += kDenseRows)
    dense_tile<kDenseRows, VECTORS>(panel, from + r * width, width, out + r * pitch, pitch);
  for (; r < rows; ++r) dense_tile<1, VECTORS>(panel, from + r * width, width, out + r * pitch, pitch);
}

// The weights of what fired, for PANELS panels of VECTORS vectors.
template <int PANELS, int VECTORS>
TK_NOINLINE void add_fired(const float* panel, const int32_t* fired, int64_t count, int64_t width, float* out) {
  vfloat sums[PANELS][VECTORS] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float* const row = panel + fired[i] * kPanelWidth;
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[p][v] = sums[p][v] + load(row + p * width * kPanelWidth + v * kLanes);
  }
  for (int p = 0; p < PANELS; ++p)
    for (int v = 0; v < VECTORS; ++v) store(out + p * kPanelWidth + v * kLanes, sums[p][v]);
}

// The numbers of the neurons of a row that are not 0, in increasing order; how many. Room for kLanes more is there.
TK_INLINE int64_t list_fired(const float* s, int64_t width, int32_t* to) {
  int64_t count = 0, i = 0;
#if TK_WIDTH == 16 && defined(__AVX512F__)
  for (; i + kLanes <= width; i += kLanes) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_mask_compressstoreu_epi32(to + count, mask, (__m512i)(lane_numbers() + (int32_t)i));
    count += __builtin_popcount(mask);
  }
#elif TK_WIDTH == 8 && defined(__AVX2__)
  for (; i + kLanes <= width; i += kLanes) {
    unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(s + i), __m256{}, _CMP_NEQ_UQ));
    for (; mask; mask &= mask - 1) to[count++] = (int32_t)i + __builtin_ctz(mask);
  }
#endif
  for (; i < width; ++i) {
    to[count] = (int32_t)i;
    count += s[i] != 0.0f;
  }
  return count;
}

// The last panel may have fewer vectors; f(vectors) with the number as a type.
template <class F>
TK_INLINE void with_vectors(int64_t panel, int64_t width, F f) {
  const int64_t left = (width - panel * kPanelWidth + kLanes - 1) / kLanes;
  if (left >= 3) return f(std::integral_constant<int, 3>{});
  left == 2 ? f(std::integral_constant<int, 2>{}) : f(std::integral_constant<int, 1>{});
}

inline unsigned multiply_vectors(const char* weights, const float* from, int64_t rows, int64_t width, bool spikes,
                                 float* out, char* own) {
  static_assert(kPanel == 3);
  const float* const panels = (const float*)weights;
  const int64_t all = panels_of(width), pitch = product_pitch(width), size = width * kPanelWidth;
  int32_t *const fired = (int32_t*)own, *const counts = fired + rows * (width + kLanes);
  int64_t total = spikes ? 0 : rows * width;
  for (int64_t r = 0; spikes && r < rows; ++r)
    total += counts[r] = (int32_t)list_fired(from + r * width, width, fired + r * (width + kLanes));
  if (kDenseShare * total >= rows * width) {
    for (int64_t p = 0; p < all; ++p)
      with_vectors(p, width, [&](auto vectors) {
        dense_rows<decltype(vectors)::value>(panels + p * size, from, rows, width, out + p * kPanelWidth, pitch);
      });
    return 0;
  }
  const int64_t whole = width / kPanelWidth / kTogether * kTogether;
  for (int64_t p = 0; p < all; p += p < whole ? kTogether : 1)
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const list = fired + r * (width + kLanes);
      float* const to = out + r * pitch + p * kPanelWidth;
      if (p < whole) {
        add_fired<kTogether, kPanel>(panels + p * size, list, counts[r], width, to);
      } else {
        with_vectors(p, width, [&](auto vectors) {
          add_fired<1, decltype(vectors)::value>(panels + p * size, list, counts[r], width, to);
        });
      }
    }
  return 0;
}

constexpr RecurrentProduct kVectorsProduct = {vectors_bytes, vectors_own, panels_of, lay_vectors, multiply_vectors};

}  // namespace trtkern::TK_ISA
