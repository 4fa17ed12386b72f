// LIF forward on the CPU.
#pragma once
#include "cpu/rows.h"
#include "lif/cpu_short.h"
#include "spikes/cpu.h"
#include "spikes/cpu_pool.h"

namespace trtkern::TK_ISA {

// One step forward of a block of neurons N: the state in place; s, v_out and packed may be null; `watch` is NaN where a
// number of a trace was not finite, or a v as it goes out. `before`: what goes out is h.
template <class D, class N>
struct ForwardRow {
  using Raw = typename D::Raw;
  Rows params;
  Current<Raw> in;
  Raw *s, *v_out;
  uint8_t* packed;  // the bytes of the spikes, of which this step sets `bit`
  float *state, *watch;
  int bit, reset;
  bool before, odd;  // odd: the lanes at the end are padding, from `live` on
  const Raw* ahead;  // the row of x that comes next
  int live = kSpan;

  TK_INLINE ForwardRow at(int64_t i) const {
    ForwardRow r = *this;
    r.params = params.at(i), r.in = in.at(i), r.state += i, r.ahead += i;
    if (s) r.s += i;
    if (v_out) r.v_out += i;
    if (packed) r.packed += i;
    return r;
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(s ? s : v_out, n); }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    if constexpr (!kPlainRows<N>) return run<STREAM, true, false, kEach>(from, n);
    if (!s || v_out || packed) return with_layout<STREAM, true>(from, n);
    with_layout<STREAM, false>(from, n);
  }
  template <bool STREAM, bool MORE>
  TK_INLINE void with_layout(int64_t from, int64_t n) const {
    const bool normed = in.affine.base;
    if (params.each) return normed ? run<STREAM, MORE, true, kEach>(from, n) : run<STREAM, MORE, false, kEach>(from, n);
    if (!normed) return run<STREAM, MORE, false, kShared>(from, n);
    in.affine.each ? run<STREAM, MORE, true, kSharedNeuron>(from, n) : run<STREAM, MORE, true, kShared>(from, n);
  }
  // MORE: not just s goes out. Rows that are not plain ask for the norm at run time.
  template <bool STREAM, bool MORE, bool NORM, int LAYOUT>
  TK_NOINLINE void run(int64_t from, int64_t n) const {
    const ForwardRow r = at(from);
    const Params<N> same = params_of<N>(r.params, 0);
    const Rows rows = LAYOUT == kSharedNeuron ? r.in.affine.known_each() : r.in.affine;
    const Triple affine = NORM ? triple(rows, 0) : Triple{};
    vfloat watched = load(watch);
    for (int64_t span = 0; span < n; span += kSpan) {
      prefetch(r.ahead + span);
#pragma GCC unroll 4
      for (int k = 0; k < kSpanVectors; ++k) {
        const int64_t i = span + k * kLanes;
        const Params<N> p = LAYOUT == kEach ? params_of<N>(r.params, i) : same;
        vfloat x;
        if constexpr (NORM) {
          x = current<D>(r.in, i, LAYOUT == kShared ? affine : triple(rows, i));
        } else if (!kPlainRows<N> && r.in.affine.base) {
          x = current<D>(r.in, i, triple(rows, i));
        } else {
          x = get<D>(r.in.x + i);
        }
        vfloat state[N::kStates], trace[N::kTraces];
        load_numbers<N::kStates>(r.state, kForwardStride, i, state);
        N::charge(x, state, p.at, trace);
        const vint fired = settle<N>(p.at, trace, r.reset, state);
        for (int j = 0; j < N::kTraces; ++j) {
          vfloat known = trace[j];
          // Of padding a neuron may make what is not finite: with a state of 0 one that divides by it.
          if (!kPlainRows<N> && r.odd) known = where_(lane_numbers() + k * kLanes < r.live, known, vfloat{});
          watched = fma_(known, vfloat{}, watched);
        }
        if (!MORE || r.s) put<STREAM>(r.s + i, D::pack_exact(where_(fired, lit<vfloat>(1.0f), lit<vfloat>(0.0f))));
        if (MORE && r.v_out) {
          const typename D::Pack shown = D::pack(r.before ? trace[N::kH] : state[N::kV]);
          put<STREAM>(r.v_out + i, shown);
          if (!r.odd) watched = fma_(D::unpack(shown), vfloat{}, watched);
        }
        if (MORE && r.packed) set_bits(r.packed + i, fired, r.bit);
        store_numbers<N::kStates>(r.state, kForwardStride, i, state);
      }
    }
    store(r.watch, watched);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    ForwardRow r = at(from);
    Raw *to_s = r.s, *to_v = r.v_out;
    uint8_t* to_packed = r.packed;
    Staged<Raw> new_x, new_residual, new_s, new_v;
    Staged<uint8_t> new_packed;
    const Kept<N::kStates> kept(r.state, kForwardStride);
    r.in.x = new_x.in(r.in.x, count), r.in.residual = new_residual.in(r.in.residual, count);
    r.s = new_s.out(r.s), r.v_out = new_v.out(r.v_out), r.odd = true;
    r.live = count;
    if (to_packed) new_packed.in(to_packed, count), r.packed = new_packed.out(to_packed);
    r.template whole<false>(0, kSpan);
    if (to_v) watch_some(new_v, count);
    new_s.back(to_s, count), new_v.back(to_v, count), new_packed.back(to_packed, count);
    kept.restore(count);
  }
  TK_NOINLINE void watch_some(Staged<Raw> shown, int count) const {
    for (int i = count; i < kSpan; ++i) shown.memory[i] = 0;
    vfloat watched = load(watch);
    for (int k = 0; k < kSpan; k += kLanes) watched = fma_(get<D>(shown.memory + k), vfloat{}, watched);
    store(watch, watched);
  }
};

// Scratch memory of one thread of the forward pass.
template <class D, class N>
struct ForwardMemory {
  using Raw = typename D::Raw;
  float* state;
  ChannelRows params, affine;
  uint8_t* packed;
  Raw *spikes, *folded;  // of a pooled block
  Converted<D, RowType<D, N>> x, residual, s, v;

  explicit ForwardMemory(Scratch pieces)
      : state(pieces.take(N::kStates * kForwardStride)),
        params(pieces.take(N::kParams * kParameterStride), N::kParams),
        affine(pieces.take(kAffine * kParameterStride), kAffine),
        packed((uint8_t*)pieces.take((kForwardBlock + kPad) / 4)),
        spikes((Raw*)pieces.take(kForwardBlock + kPoolPad)),
        folded((Raw*)pieces.take(kForwardBlock / 4 + kPoolPad)),
        x(pieces),
        residual(pieces),
        s(pieces),
        v(pieces) {}
};

// Step t of a block.
template <class D, class N, class R = RowType<D, N>>
TK_INLINE void forward_step(const LifArgs& a, int64_t t, int64_t n0, const Block& b, ForwardRow<R, N> row,
                            const ForwardMemory<D, N>& m, bool streaming) {
  using Raw = typename D::Raw;
  constexpr bool kSame = Converted<D, R>::kSame;
  const ForwardRow<R, N> shared = row;
  for (int64_t r = 0; r < b.runs; ++r) {
    const int64_t at = t * a.N + b.start(r), i = r * b.length, n = b.length;
    const Raw* const x = element<Raw>(a.x, t * a.x_stride + b.start(r));
    Raw* const s = a.pool_row ? (a.s ? m.spikes + i : nullptr) : element<Raw>(a.s, at);
    Raw* const v = element<Raw>(a.v, at);
    row.params = shared.params.at(i);
    row.in = {m.x.in(x, n), m.residual.in(element<Raw>(a.residual, at), n), shared.in.affine.at(i)};
    row.s = m.s.out(s), row.v_out = m.v.out(v);
    row.packed = a.packed ? m.packed + i : nullptr;
    row.state = m.state + i;
    row.ahead = m.x.ahead(x + (t + 1 < a.T ? a.x_stride : n - t * a.x_stride));
    if (kSame && streaming && !a.pool_row && (a.s || a.v)) {
      along<true>(row, n);
    } else {
      along<false>(row, n);
    }
    m.s.back(s, n, streaming && !a.pool_row), m.v.back(v, n, streaming, row.watch);
  }
  if (a.pool_row && a.s) write_fold<D>(a, t, n0, m.spikes, m.folded, b, streaming);
  if (a.packed) write_packed(a, t, m.packed, b, streaming);
}

// NaN in `watch` where one of n floats, with zeros behind them, is not finite.
TK_NOINLINE inline void watch_row(const float* row, int64_t n, float* watch) {
  vfloat watched = load(watch);
  for (int64_t i = 0; i < n; i += kLanes) watched = fma_(load(row + i), vfloat{}, watched);
  store(watch, watched);
}

constexpr int kWatch = 32;  // floats: a vector, or a line of any element type

template <class D, class N>
void forward_blocks(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  constexpr int kSteps = kChunk / N::kTraces;
  ForwardMemory<D, N> m(Scratch{scratch});
  float watch[kWatch] = {};
  if (a.s && a.v && (a.s - a.v) % 64) streaming = false;  // a row is led to alignment for both at once
  Block b;
  for (int64_t n0 = begin; n0 < end; n0 += b.size()) {
    b = block_at(a, n0, end, kForwardBlock);
    if constexpr (kHasShort<N>) {
      if (is_short_forward(a, streaming)) {
        const Rows& params = m.params.parameters(a, b);
        forward_short<D, N>(a, b, params, m.affine.affine(a, b, a.affine), watch, streaming);
        continue;
      }
    }
    ForwardRow<RowType<D, N>, N> row = {m.params.parameters(a, b), {nullptr, nullptr, m.affine.affine(a, b, a.affine)}};
    row.watch = watch, row.reset = a.reset, row.before = a.before != 0, row.odd = false;
    for (int k = 0; k < N::kStates; ++k) read_row(m.state + k * kForwardStride, a.v0, k * a.N, b);
    for (int64_t t = 0; t < a.T; ++t) {
      row.bit = 1 << t % 8;
      forward_step(a, t, n0, b, row, m, streaming);
      if (!a.edges || (t + 1) % kSteps != 0 || t + 1 == a.T) continue;
      const int64_t edge = ((t + 1) / kSteps - 1) * N::kStates;
      for (int k = 0; k < N::kStates; ++k)
        write_row(a.edges, (edge + k) * a.N, m.state + k * kForwardStride, b, streaming);
    }
    for (int k = 0; a.v_final && k < N::kStates; ++k) {
      write_row(a.v_final, k * a.N, m.state + k * kForwardStride, b, streaming);
      watch_row(m.state + k * kForwardStride, b.size(), watch);
    }
  }
  for (int i = 0; i < kWatch; ++i)
    if (a.flag && watch[i] != 0.0f) __atomic_store_n((int32_t*)a.flag, 1, __ATOMIC_RELAXED);
  fence();
}

inline void lif_forward(const LifArgs& a, int64_t begin, int64_t end, float* scratch, bool streaming) {
  for_neuron(a.neuron, [&](auto n) {
    for_dtype(a.dtype, [&](auto d) { forward_blocks<decltype(d), decltype(n)>(a, begin, end, scratch, streaming); });
  });
}

}  // namespace trtkern::TK_ISA
