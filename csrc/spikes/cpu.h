// Packed spikes: bit t % 8 of byte plane t / 8 is the spike of step t.
#pragma once
#include "cpu/rows.h"
#include "spikes/cpu_pool.h"

namespace trtkern::TK_ISA {

typedef uint8_t vbyte __attribute__((vector_size(TK_WIDTH)));

// The bytes of lanes from -128 to 127.
TK_INLINE vbyte narrow_mask(vint mask) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vbyte)_mm512_cvtepi32_epi8((__m512i)mask);
#elif TK_WIDTH == 8 && defined(__AVX2__)
  const __m256i m = (__m256i)mask;
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  return load_as<vbyte>(&(const __m128i&)_mm_packs_epi16(shorts, shorts));
#else
  return __builtin_convertvector(mask, vbyte);
#endif
}
TK_INLINE vint widen_bytes(vbyte bytes) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vint)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif TK_WIDTH == 8 && defined(__AVX2__)
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&bytes));
#else
  return __builtin_convertvector(bytes, vint);
#endif
}

// Sets `bit` of the bytes whose lanes fired; the first bit clears the others.
TK_INLINE void set_bits(uint8_t* packed, vint fired, int bit) {
  const vbyte bits = narrow_mask(fired) & (uint8_t)bit;
  put<false>(packed, bit == 1 ? bits : load_as<vbyte>(packed) | bits);
}

// A finished plane of a block to its place in [planes, N]; `packed` holds steps up to t.
TK_INLINE void write_packed(const LifArgs& a, int64_t t, const uint8_t* packed, const Block& b, bool streaming) {
  if (t % 8 != 7 && t + 1 != a.T) return;
  uint8_t* to = (uint8_t*)a.packed + t / 8 * a.N;
  for (int64_t r = 0; r < b.runs; ++r) copy_out(to + b.start(r), packed + r * b.length, b.length, streaming);
}

// One step of dense spikes into the bytes of a block.
template <class D>
struct PackRow {
  using Raw = typename D::Raw;
  const Raw* s;
  uint8_t* packed;
  int bit;

  template <bool STREAM>
  TK_NOINLINE void whole(int64_t from, int64_t n) const {
    for (int64_t i = from; i < from + n; i += kLanes) set_bits(packed + i, get<D>(s + i) != 0.0f, bit);
  }
  TK_NOINLINE void part(int64_t from, int count) const {  // the bytes behind are padding
    Staged<Raw> new_s;
    const PackRow row = {new_s.in(s + from, count), packed + from, bit};
    row.template whole<false>(0, kSpan);
  }
};

template <class D>
void pack_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  uint8_t* packed = (uint8_t*)scratch;
  for (int64_t n0 = begin, n = 0; n0 < end; n0 += n) {
    n = end - n0 < kForwardBlock ? end - n0 : kForwardBlock;
    for (int64_t t = 0; t < a.T; ++t) {
      along<false>(PackRow<D>{element<typename D::Raw>(a.s, t * a.N + n0), packed, 1 << t % 8}, n);
      write_packed(a, t, packed, {n0, n}, streaming);
    }
  }
  fence();
}
inline void spikes_pack(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { pack_blocks<decltype(d)>(a, begin, end, scratch, streaming); });
}

// n spikes of a bit of scratch bytes; the elements behind are padding.
template <class D>
TK_NOINLINE void spikes_of(const uint8_t* packed, int bit, typename D::Raw* s, int64_t n) {
  const vfloat one = lit<vfloat>(1.0f), zero = lit<vfloat>(0.0f);
  for (int64_t i = 0; i < n; i += kLanes)
    put<false>(s + i, D::pack_exact(where_((widen_bytes(load_as<vbyte>(packed + i)) & bit) != 0, one, zero)));
}

// Averages of a block's spikes to [T, N / 4].
template <class D>
TK_INLINE void write_fold(const LifArgs& a, int64_t t, int64_t n0, const typename D::Raw* spikes,
                          typename D::Raw* folded, const Block& b, bool streaming) {
  fold<D>(spikes, b.size(), b.fold_row, b.fold_side, folded);
  copy_out(element<typename D::Raw>(a.s, (t * a.N + n0) / 4), folded, sizeof(*folded) * (b.size() / 4), streaming);
}

// Steps first, first + 1, ... of the packed spikes of a.packed, a.T of them, into a.s.
template <class D>
void unpack_blocks(const LifArgs& a, int64_t first, int64_t begin, int64_t end, float* scratch, bool streaming) {
  using Raw = typename D::Raw;
  Scratch pieces{scratch};
  uint8_t* packed = (uint8_t*)pieces.take((kForwardBlock + kPad) / 4);
  Raw *s = (Raw*)pieces.take(kForwardBlock + kPoolPad), *folded = (Raw*)pieces.take(kForwardBlock / 4 + kPoolPad);
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kForwardBlock);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t step = first + t;
      for (int64_t r = 0; (t == 0 || step % 8 == 0) && r < b.runs; ++r)
        __builtin_memcpy(packed + r * b.length, (const uint8_t*)a.packed + step / 8 * a.N + b.start(r), b.length);
      spikes_of<D>(packed, 1 << step % 8, s, b.size());
      if (a.pool_row) {
        write_fold<D>(a, t, n0, s, folded, b, streaming);
      } else {
        copy_out(element<Raw>(a.s, t * a.N + n0), s, sizeof(Raw) * b.size(), streaming);
      }
    }
  }
  fence();
}
inline void spikes_unpack(const LifArgs& a, int64_t first, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { unpack_blocks<decltype(d)>(a, first, begin, end, scratch, streaming); });
}

}  // namespace trtkern::TK_ISA
