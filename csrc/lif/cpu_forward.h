// LIF forward on the CPU.
#pragma once
#include "cpu/rows.h"
#include "spikes/cpu.h"
#include "spikes/cpu_pool.h"

namespace trtkern::TK_ISA {

// One step forward of a block: v in place; s, v_out and words may be null; `bad` is NaN where an h was not finite, or
// a v as it goes out. `before`: what goes out is h.
template <class D>
struct ForwardRow {
  using Raw = typename D::Raw;
  Rows params;
  Current<Raw> in;
  Raw *s, *v_out;
  uint8_t* words;  // the bytes of the spikes, of which this step sets `bit`
  float *v, *bad;
  int bit, reset;
  bool before, odd;  // odd: the lanes at the end are padding
  const Raw* ahead;  // the row of x that comes next

  TK_INLINE ForwardRow at(int64_t i) const {
    ForwardRow r = *this;
    r.params = params.at(i), r.in = in.at(i), r.v += i, r.ahead += i;
    if (s) r.s += i;
    if (v_out) r.v_out += i;
    if (words) r.words += i;
    return r;
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(s ? s : v_out, n); }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    if (!s || v_out || words) return with_layout<STREAM, true>(from, n);
    with_layout<STREAM, false>(from, n);
  }
  template <bool STREAM, bool MORE>
  TK_INLINE void with_layout(int64_t from, int64_t n) const {
    const bool normed = in.affine.base;
    if (params.each) return normed ? run<STREAM, MORE, true, kEach>(from, n) : run<STREAM, MORE, false, kEach>(from, n);
    if (!normed) return run<STREAM, MORE, false, kShared>(from, n);
    in.affine.each ? run<STREAM, MORE, true, kSharedNeuron>(from, n) : run<STREAM, MORE, true, kShared>(from, n);
  }
  // MORE: not just s goes out.
  template <bool STREAM, bool MORE, bool NORM, int LAYOUT>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    const ForwardRow r = at(from);
    const Neuron<vfloat> same = neuron(r.params, 0);
    const Rows rows = LAYOUT == kSharedNeuron ? r.in.affine.known_each() : r.in.affine;
    const Triple affine = NORM ? triple(rows, 0) : Triple{};
    vfloat seen = load(bad);
    for (int64_t span = 0; span < n; span += kSpan) {
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
        const vfloat h = charge(p, load(r.v + i), x);
        const vfloat after = reset_after(p, h, r.reset);
        seen = fma_(h, vfloat{}, seen);
        if (!MORE || r.s) put<STREAM>(r.s + i, D::pack_exact(fire(p, h)));
        if (MORE && r.v_out) {
          const typename D::Pack shown = D::pack(r.before ? h : after);
          put<STREAM>(r.v_out + i, shown);
          if (!r.odd) seen = fma_(D::unpack(shown), vfloat{}, seen);
        }
        if (MORE && r.words) set_bits(r.words + i, h > p.threshold, r.bit);
        store(r.v + i, after);
      }
    }
    store(r.bad, seen);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    ForwardRow r = at(from);
    Raw *to_s = r.s, *to_v = r.v_out;
    uint8_t* to_words = r.words;
    Staged<Raw> new_x, new_residual, new_s, new_v;
    Staged<uint8_t> new_words;
    const Kept<1> kept(r.v);
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.s = new_s.out(r.s), r.v_out = new_v.out(r.v_out), r.odd = true;
    if (to_words) new_words.in(to_words, count), r.words = new_words.out(to_words);
    r.template whole<false>(0, kSpan);
    if (to_v) watch_some(new_v, count);
    new_s.back(to_s, count), new_v.back(to_v, count), new_words.back(to_words, count);
    kept.restore(count);
  }
  TK_NOINLINE void watch_some(Staged<Raw> shown, int count) const {
    for (int i = count; i < kSpan; ++i) shown.memory[i] = 0;
    vfloat seen = load(bad);
    for (int k = 0; k < kSpan; k += kLanes) seen = fma_(get<D>(shown.memory + k), vfloat{}, seen);
    store(bad, seen);
  }
};

// Scratch memory of one thread of the forward pass.
template <class D>
struct ForwardMemory {
  using Raw = typename D::Raw;
  float* v;
  ChannelRows params, affine;
  uint8_t* words;
  Raw *spikes, *folded;  // of a pooled block

  explicit ForwardMemory(Scratch s)
      : v(s.take(kForwardBlock + kPad)),
        params(s.take(kParams * kParameterStride), kParams),
        affine(s.take(kAffine * kParameterStride), kAffine),
        words((uint8_t*)s.take((kForwardBlock + kPad) / 4)),
        spikes((Raw*)s.take(kForwardBlock + kPoolPad)),
        folded((Raw*)s.take(kForwardBlock / 4 + kPoolPad)) {}
};

// Step t of a block.
template <class D>
TK_INLINE void forward_step(const LifArgs& a, int64_t t, int64_t n0, const Block& b, ForwardRow<D> row,
                            const ForwardMemory<D>& m, bool streaming) {
  using Raw = typename D::Raw;
  const ForwardRow<D> shared = row;
  for (int64_t r = 0; r < b.runs; ++r) {
    const int64_t at = t * a.N + b.start(r), i = r * b.length;
    row.params = shared.params.at(i);
    row.in = {element<Raw>(a.x, t * a.x_stride + b.start(r)), element<Raw>(a.residual, at), shared.in.affine.at(i)};
    row.s = a.pool_row ? (a.s ? m.spikes + i : nullptr) : element<Raw>(a.s, at);
    row.v_out = element<Raw>(a.v, at);
    row.words = a.packed ? m.words + i : nullptr;
    row.v = m.v + i;
    const int64_t next = t + 1 < a.T ? a.x_stride : b.length - t * a.x_stride;
    row.ahead = row.in.x + next;
    if (streaming && !a.pool_row && (a.s || a.v)) {
      along<true>(row, b.length);
    } else {
      along<false>(row, b.length);
    }
  }
  if (a.pool_row && a.s) write_fold<D>(a, t, n0, m.spikes, m.folded, b, streaming);
  if (a.packed) write_words(a, t, m.words, b, streaming);
}

// NaN in `bad` where one of n floats, with zeros behind them, is not finite.
inline void watch_row(const float* row, int64_t n, float* bad) {
  vfloat seen = load(bad);
  for (int64_t i = 0; i < n; i += kLanes) seen = fma_(load(row + i), vfloat{}, seen);
  store(bad, seen);
}

template <class D>
void forward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  ForwardMemory<D> m(Scratch{scratch});
  float bad[kLanes] = {};
  if (a.s && a.v && (a.s - a.v) % 64) streaming = false;  // a row is led to alignment for both at once
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kForwardBlock);
    ForwardRow<D> row = {m.params.parameters(a, b), {nullptr, nullptr, m.affine.affine(a, b, a.affine)}};
    row.bad = bad, row.reset = a.reset, row.before = a.before != 0, row.odd = false;
    read_row(m.v, a.v0, 0, b);
    for (int64_t t = 0; t < a.T; ++t) {
      row.bit = 1 << t % 8;
      forward_step(a, t, n0, b, row, m, streaming);
      if (a.edges && (t + 1) % kChunk == 0 && t + 1 < a.T)
        write_row(a.edges, ((t + 1) / kChunk - 1) * a.N, m.v, b, streaming);
    }
    if (a.v_final) {
      write_row(a.v_final, 0, m.v, b, streaming);
      watch_row(m.v, b.size(), bad);
    }
  }
  for (int i = 0; i < kLanes; ++i)
    if (a.flag && bad[i] != 0.0f) __atomic_store_n((int32_t*)a.flag, 1, __ATOMIC_RELAXED);
  fence();
}

inline void lif_forward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_dtype(a.dtype, [&](auto d) { forward_blocks<decltype(d)>(a, begin, end, scratch, streaming); });
}

}  // namespace trtkern::TK_ISA
