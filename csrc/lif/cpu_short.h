// Short sequences of the LIF on the CPU: a vector of neurons goes through all its steps in one straight line, with its
// state, its h and its gradients in registers. The other way, step by step over a block of neurons whose numbers lie in
// scratch memory, is cpu_forward.h and cpu_backward.h.
//
// Every number is computed as it is there, and sums are added in the same order: which way is taken changes no bit.
// Surrogate, reset and what is there at all are asked at run time, once a vector or once a step: a branch that always
// goes the same way costs nothing beside memory, and so one function serves them all.
#pragma once
#include "cpu/rows.h"
#include "lif/cpu_slopes.h"
#include "lif/cpu_sums.h"
#include "spikes/cpu.h"

namespace trtkern::TK_ISA {

// The most steps of a short sequence, as measured: of all; where rows are streamed, many of which at once are too many
// for the buffers that gather a line, or where what a norm needs fills the registers; with fewer registers.
constexpr int kShortSteps = 16, kShortFull = 8, kShortNarrow = 4;

// Surrogates of up to so many steps stand in the straight line; of more they have a loop of their own: short to
// compile.
#if defined(TK_FLOAT32_ONLY)
constexpr int kInlineSlopes = 0;
#else
constexpr int kInlineSlopes = 8;
#endif

template <class D>
constexpr int kLine = 64 / sizeof(typename D::Raw);  // elements of a cache line, which are streamed together

template <class N>
constexpr bool kHasShort = kPlainRows<N> && !kGeneralRows;

// Whether a launch goes the short way.
TK_INLINE bool is_short_forward(const LifArgs& a, bool streaming) {
  return a.T <= (streaming ? kShortFull : kShortSteps) && !a.pool_row;
}
TK_INLINE bool is_short_backward(const LifArgs& a, bool streaming) {
  if (a.pool_row || !a.gs || a.gv || a.gparams) return false;
  if (kLanes < 16) return a.T <= kShortNarrow && !streaming && !a.affine;
  if (a.dtype != kFloat32) return a.T <= kShortFull && !streaming;  // bound by arithmetic, not by memory
  return a.T <= (streaming || a.affine ? kShortFull : kShortSteps);
}

// Whether the rows of all steps reach alignment at the same neuron: only then can all be streamed.
template <class D>
TK_INLINE bool aligned_alike(const LifArgs& a) {
  return a.T == 1 || a.N * sizeof(typename D::Raw) % kStreamAlign<typename D::Pack> == 0;
}

// What both directions read: the rows of a tensor lie `stride` apart, those of x maybe not.
template <class D>
struct ShortInput {
  using Raw = typename D::Raw;
  const Raw *x, *residual;  // residual may be null
  int64_t x_stride, stride;

  TK_INLINE ShortInput at(int64_t i) const { return {x + i, residual ? residual + i : nullptr, x_stride, stride}; }
  // The input current of step t.
  template <bool NORM>
  TK_INLINE vfloat current(int t, int64_t i, const Triple& affine) const {
    if constexpr (!NORM) return get<D>(x + t * x_stride + i);
    return TK_ISA::current<D>({x + t * x_stride, residual ? residual + t * stride : nullptr, {}}, i, affine);
  }
};

// `count` elements of every step, in rows of WIDTH that may be read and written whole. Null stays null.
template <class Raw, int WIDTH>
struct StagedSteps {
  Raw memory[kShortSteps][WIDTH];

  const Raw* in(const Raw* from, int64_t stride, int steps, int count) {
    for (int t = 0; from && t < steps; ++t) {
      __builtin_memset(memory[t], 0, sizeof memory[t]);
      __builtin_memcpy(memory[t], from + t * stride, sizeof(Raw) * count);
    }
    return from ? memory[0] : nullptr;
  }
  Raw* out(const Raw* to) { return to ? memory[0] : nullptr; }
  void back(Raw* to, int64_t stride, int steps, int count) const {
    for (int t = 0; to && t < steps; ++t) __builtin_memcpy(to + t * stride, memory[t], sizeof(Raw) * count);
  }
};

// All steps forward. s, v_out, packed, v0 and v_final may be null; `watch` as in cpu_forward.h, kLine<D> floats.
template <class D, class N>
struct ShortForward {
  using Raw = typename D::Raw;
  static constexpr int kWidth = kLine<D>, kVectors = kWidth / kLanes;
  Rows params, affine;
  ShortInput<D> in;
  Raw *s, *v_out;
  uint8_t* packed;
  int64_t plane;  // between the planes of packed
  const float* v0;
  float *v_final, *watch;
  int T, reset;
  bool before;

  TK_INLINE ShortForward at(int64_t i) const {
    ShortForward r = *this;
    r.params = params.at(i), r.affine = affine.at(i), r.in = in.at(i);
    if (s) r.s += i;
    if (v_out) r.v_out += i;
    if (packed) r.packed += i;
    if (v0) r.v0 += i;
    if (v_final) r.v_final += i;
    return r;
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(s ? s : v_out, n); }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    const ShortForward r = at(from);
    const bool more = !s || v_out || packed || params.each;
    if (!affine.base)
      return more ? r.template run<STREAM, true, false, kEach>(n) : r.template run<STREAM, false, false, kShared>(n);
    if (more) return r.template run<STREAM, true, true, kEach>(n);
    affine.each ? r.template run<STREAM, false, true, kSharedNeuron>(n)
                : r.template run<STREAM, false, true, kShared>(n);
  }
  // MORE: not just s goes out. kEach stands for any layout.
  template <bool STREAM, bool MORE, bool NORM, int LAYOUT>
  TK_NOINLINE void run(int64_t n) const {
    const ShortForward r = *this;
    const Params<N> same = params_of<N>(r.params, 0);
    const Rows rows = LAYOUT == kSharedNeuron ? r.affine.known_each() : r.affine;
    const Triple same_affine = NORM ? triple(rows, 0) : Triple{};
    vfloat watched[kVectors];
    for (int k = 0; k < kVectors; ++k) watched[k] = load(r.watch + k * kLanes);
    for (int64_t line = 0; line < n; line += kWidth) {
      Params<N> p[kVectors];
      Triple affine[kVectors];
      vfloat state[kVectors][N::kStates], held[kVectors] = {};
      vint bits[kVectors] = {};
      for (int k = 0; k < kVectors; ++k) {
        const int64_t i = line + k * kLanes;
        p[k] = LAYOUT == kEach ? params_of<N>(r.params, i) : same;
        affine[k] = LAYOUT == kShared || !NORM ? same_affine : triple(rows, i);
        state[k][0] = r.v0 ? load(r.v0 + i) : vfloat{};
      }
      for (int t = 0; t < r.T; ++t) {
        const bool last_bit = t % 8 == 7 || t + 1 == r.T;
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) {
          const int64_t i = line + k * kLanes, at = t * r.in.stride + i;
          vfloat trace[N::kTraces];
          N::charge(r.in.template current<NORM>(t, i, affine[k]), state[k], p[k].at, trace);
          const vint fired = settle<N>(p[k].at, trace, r.reset, state[k]);
          held[k] = fma_(trace[N::kH], vfloat{}, held[k]);
          if (!MORE || r.s) put<STREAM>(r.s + at, D::pack_exact(where_(fired, lit<vfloat>(1.0f), lit<vfloat>(0.0f))));
          if (MORE && r.v_out) {
            const typename D::Pack shown = D::pack(r.before ? trace[N::kH] : state[k][N::kV]);
            put<STREAM>(r.v_out + at, shown);
            held[k] = fma_(D::unpack(shown), vfloat{}, held[k]);
          }
          if (!MORE || !r.packed) continue;
          bits[k] |= fired & (int8_t)(1 << t % 8);
          if (!last_bit) continue;
          put<false>(r.packed + t / 8 * r.plane + i, narrow_mask(bits[k]));
          bits[k] = vint{};
        }
      }
      for (int k = 0; k < kVectors; ++k) {
        if (r.v_final) {
          store(r.v_final + line + k * kLanes, state[k][0]);
          held[k] = fma_(state[k][0], vfloat{}, held[k]);
        }
        watched[k] += held[k];
      }
    }
    for (int k = 0; k < kVectors; ++k) store(r.watch + k * kLanes, watched[k]);
  }

  TK_NOINLINE void part(int64_t from, int count) const {
    const ShortForward to = at(from);
    ShortForward r = to;
    StagedSteps<Raw, kWidth> new_x, new_residual, new_s, new_v;
    StagedSteps<uint8_t, kWidth> new_packed;
    StagedSteps<float, kWidth> new_v0, new_v_final;
    float watched[kWidth] = {};
    r.in = {new_x.in(to.in.x, in.x_stride, T, count), new_residual.in(to.in.residual, in.stride, T, count), kWidth,
            kWidth};
    r.s = new_s.out(s), r.v_out = new_v.out(v_out), r.packed = new_packed.out(packed), r.plane = kWidth;
    r.v0 = new_v0.in(to.v0, 0, 1, count), r.v_final = new_v_final.out(v_final), r.watch = watched;
    r.template whole<false>(0, kWidth);
    new_s.back(to.s, in.stride, T, count), new_v.back(to.v_out, in.stride, T, count);
    new_packed.back(to.packed, plane, (T + 7) / 8, count), new_v_final.back(to.v_final, 0, 1, count);
    for (int i = 0; i < count; ++i) watch[i] += watched[i];
  }
};

template <class D, class N>
void forward_short(const LifArgs& a, const Block& b, const Rows& params, const Rows& affine, float* watch,
                   bool streaming) {
  using Raw = typename D::Raw;
  const ShortInput<D> in = {element<Raw>(a.x, b.at), element<Raw>(a.residual, b.at), a.x_stride, a.N};
  const ShortForward<D, N> rows = {params,
                                   affine,
                                   in,
                                   element<Raw>(a.s, b.at),
                                   element<Raw>(a.v, b.at),
                                   element<uint8_t>(a.packed, b.at),
                                   a.N,
                                   element<float>(a.v0, b.at),
                                   element<float>(a.v_final, b.at),
                                   watch,
                                   (int)a.T,
                                   a.reset,
                                   a.before != 0};
  if (streaming && (a.s || a.v) && aligned_alike<D>(a)) {
    along<true, kLine<D>>(rows, b.length);
  } else {
    along<false, kLine<D>>(rows, b.length);
  }
}

// The two sums of the norm of each step over a block, where kSpan neurons in turn share a float (NormSums).
struct StepSums {
  float gx[kShortSteps][kSpan], moment[kShortSteps][kSpan];

  void clear(int steps) {
    __builtin_memset(gx, 0, sizeof gx[0] * steps), __builtin_memset(moment, 0, sizeof moment[0] * steps);
  }
};

// All steps backward. residual, gx, v0, gv_final, gv0 and norm_sums may be null, affine and coef absent.
template <class D, class N>
struct ShortBackward {
  using Raw = typename D::Raw;
  Rows params, affine, coef;
  ShortInput<D> in;
  const Raw* gs;
  Raw* gx;
  const float *v0, *gv_final;
  float* gv0;
  float* norm_sums;  // where each neuron has its own
  StepSums* sums;    // where they share them: of the whole spans and of the rest
  int64_t spanned;   // neurons in whole spans
  float alpha;
  int T, reset, surrogate;
  bool detach, streaming;

  TK_INLINE ShortBackward at(int64_t i) const {
    ShortBackward r = *this;
    r.params = params.at(i), r.affine = affine.at(i), r.coef = coef.at(i), r.in = in.at(i), r.gs += i;
    r.spanned -= i;
    if (gx) r.gx += i;
    if (v0) r.v0 += i;
    if (gv_final) r.gv_final += i;
    if (gv0) r.gv0 += i;
    if (norm_sums) r.norm_sums += i;
    return r;
  }
  TK_INLINE int64_t to_aligned_output(int64_t n) const { return to_aligned<typename D::Pack>(gx, n); }

  template <bool STREAM>
  TK_INLINE void whole(int64_t from, int64_t n) const {
    ShortBackward r = at(from);
    r.streaming = STREAM;
    r.of_steps(n);
  }
  TK_NOINLINE void of_steps(int64_t n) const {
    if (T <= kShortNarrow) return of_layout<kShortNarrow>(n);
    if constexpr (kLanes == 16) {
      if (T <= kShortFull) return of_layout<kShortFull>(n);
      if constexpr (sizeof(Raw) == 4) of_layout<kShortSteps>(n);
    }
  }
  template <int K>
  TK_INLINE void of_layout(int64_t n) const {
    if constexpr (kLanes == 16 && K <= kShortFull) {
      if (affine.base && params.each) return run<K, true, kEach, -1>(n);
      if (affine.base) return affine.each ? of_reset<K, true, kSharedNeuron>(n) : of_reset<K, true, kShared>(n);
    }
    params.each ? run<K, false, kEach, -1>(n) : of_reset<K, false, kShared>(n);
  }
  template <int K, bool NORM, int LAYOUT>
  TK_INLINE void of_reset(int64_t n) const {
    if (detach || reset == kNone) return run<K, NORM, kEach, -1>(n);
    reset == kHard ? run<K, NORM, LAYOUT, kHard>(n) : run<K, NORM, LAYOUT, kSoft>(n);
  }

  template <int ID = 0>
  TK_INLINE vfloat slope_of(vfloat u, vfloat sharpness) const {
    if constexpr (ID + 1 < kSurrogates)
      if (surrogate != ID) return slope_of<ID + 1>(u, sharpness);
    return TK_ISA::surrogate<ID>(u, sharpness);
  }
  // K: the most that T may be. kEach stands for any layout. RESET: not detached, or -1 where both are members'.
  template <int K, bool NORM, int LAYOUT, int RESET>
  TK_NOINLINE void run(int64_t n) const {
    static_assert(N::kStates == 1 && N::kTraces == 1 && !N::kNeedsState);
    const ShortBackward r = *this;
    const int reset = RESET < 0 ? r.reset : RESET;
    const bool detach = RESET < 0 && r.detach;
    const Params<N> same = params_of<N>(r.params, 0);
    constexpr bool kKnown = LAYOUT == kSharedNeuron, kSame = LAYOUT == kShared || !NORM;
    const Rows rows = kKnown ? r.affine.known_each() : r.affine, coefs = kKnown ? r.coef.known_each() : r.coef;
    const Triple same_affine = NORM ? triple(rows, 0) : Triple{};
    const Triple same_coef = NORM && coefs.base ? triple(coefs, 0) : Triple{};
    float* const norm_sums = NORM && LAYOUT != kShared ? r.norm_sums : nullptr;
    StepSums* const sums = NORM && LAYOUT != kSharedNeuron ? r.sums : nullptr;
    const vfloat sharpness = lit<vfloat>(r.alpha);
    constexpr bool kAhead = K > kInlineSlopes;
    float slopes[kAhead ? K : 1][kLanes];
    for (int64_t i = 0; i < n; i += kLanes) {
      const Params<N> p = LAYOUT == kEach ? params_of<N>(r.params, i) : same;
      const Triple affine = kSame ? same_affine : triple(rows, i);
      const Triple coef = kSame || !coefs.base ? same_coef : triple(coefs, i);
      vfloat h[K], state[1] = {r.v0 ? load(r.v0 + i) : vfloat{}}, potential, threshold;
#pragma GCC unroll 16
      for (int t = 0; t < K; ++t) {
        if (t >= r.T) break;
        N::charge(r.in.template current<NORM>(t, i, affine), state, p.at, h + t);
        settle<N>(p.at, h + t, reset, state);
      }
      if constexpr (kAhead) {
#pragma GCC unroll 16
        for (int t = 0; t < K; ++t) {
          if (t >= r.T) break;
          N::fire(h + t, p.at, potential, threshold);
          store(slopes[t], potential - threshold);
        }
        surrogates_of(r.surrogate, slopes[0], r.alpha, r.T * kLanes);
      }
      vfloat g[1] = {r.gv_final ? load(r.gv_final + i) : vfloat{}};
      vfloat sum{}, moment{};
      if (norm_sums) sum = load(norm_sums + i), moment = load(norm_sums + kSumStride + i);
#pragma GCC unroll 16
      for (int t = K - 1; t >= 0; --t) {
        if (t >= r.T) continue;
        vfloat g_trace[1], gx, none[1] = {}, unused[N::kParams] = {};
        N::fire(h + t, p.at, potential, threshold);
        const vfloat gs = get<D>(r.gs + t * r.in.stride + i);
        const vfloat slope = kAhead ? load(slopes[t]) : r.slope_of(potential - threshold, sharpness);
        N::fired_back(reset, detach, h + t, potential > threshold, p.at, g, gs, slope, g_trace, unused);
        N::charge_back(vfloat{}, none, p.at, g_trace, gx, g, unused);
        if constexpr (NORM) {
          const vfloat deviation = get<D>(r.in.x + t * r.in.x_stride + i) - affine.a;
          if (norm_sums) sum += gx, moment = fma_(gx, deviation, moment);
          if (sums) add_to(sums->gx[t] + i % kSpan, gx), add_to(sums->moment[t] + i % kSpan, gx, deviation);
          if (coefs.base) gx = input_gradient(coef, gx, deviation);
          if (!r.gx) continue;
        }
        Raw* const to = r.gx + t * r.in.stride + i;
        r.streaming ? put<true>(to, D::pack(gx)) : put<false>(to, D::pack(gx));
      }
      if (norm_sums) store(norm_sums + i, sum), store(norm_sums + kSumStride + i, moment);
      if (r.gv0) store(r.gv0 + i, g[0]);
    }
  }
  TK_NOINLINE void part(int64_t from, int count) const {
    for (int k = 0; k < count; k += kSpan) at(from + k).piece(count - k < kSpan ? count - k : kSpan);
  }
  TK_INLINE void piece(int count) const {
    ShortBackward r = *this;
    StagedSteps<Raw, kSpan> new_x, new_residual, new_gs, new_gx;
    StagedSteps<float, kSpan> new_v0, new_gv_final, new_gv0;
    const Kept<2> kept(norm_sums, kSumStride);
    StepSums own;
    StepSums* const mine = sums && spanned <= 0 ? sums + 1 : sums;
    if (sums) own = *mine, r.sums = &own;
    r.in = {new_x.in(in.x, in.x_stride, T, count), new_residual.in(in.residual, in.stride, T, count), kSpan, kSpan};
    r.gs = new_gs.in(gs, in.stride, T, count), r.gx = new_gx.out(gx);
    r.v0 = new_v0.in(v0, 0, 1, count), r.gv_final = new_gv_final.in(gv_final, 0, 1, count), r.gv0 = new_gv0.out(gv0);
    r.of_steps(kSpan);
    new_gx.back(gx, in.stride, T, count), new_gv0.back(gv0, 0, 1, count), kept.restore(count);
    for (int t = 0; sums && t < T; ++t) {
      __builtin_memcpy(mine->gx[t], own.gx[t], sizeof(float) * count);
      __builtin_memcpy(mine->moment[t], own.moment[t], sizeof(float) * count);
    }
  }
};

// `norm_sums`: those of the block's neurons, or of a span where they share them (shared_sums); or null.
template <class D, class N>
void backward_short(const LifArgs& a, const Block& b, const Rows& params, const Rows& affine, const Rows& coef,
                    float* norm_sums, bool shared_sums, bool streaming) {
  using Raw = typename D::Raw;
  const int T = (int)a.T;
  StepSums sums[2];
  const bool shared = norm_sums && shared_sums;
  if (shared) sums[0].clear(T), sums[1].clear(T);
  const ShortInput<D> in = {element<Raw>(a.x, b.at), element<Raw>(a.residual, b.at), a.x_stride, a.N};
  const ShortBackward<D, N> rows = {params,
                                    affine,
                                    coef,
                                    in,
                                    element<Raw>(a.gs, b.at),
                                    element<Raw>(a.gx, b.at),
                                    element<float>(a.v0, b.at),
                                    element<float>(a.gv_final, b.at),
                                    element<float>(a.gv0, b.at),
                                    shared ? nullptr : norm_sums,
                                    shared ? sums : nullptr,
                                    b.length / kSpan * kSpan,
                                    a.alpha,
                                    T,
                                    a.reset,
                                    a.surrogate,
                                    a.detach != 0};
  // Neurons that share a sum in turns are counted from the block's start, which then may not be a part by itself.
  if (streaming && a.gx && aligned_alike<D>(a) && !(shared && rows.to_aligned_output(1))) {
    along<true, kLine<D>>(rows, b.length);
  } else {
    along<false, kLine<D>>(rows, b.length);
  }
  for (int t = T - 1; shared && t >= 0; --t)
    for (const StepSums& each : sums)
      for (int k = 0; k < kSpan; k += kLanes) {
        add_to(norm_sums + k, load(each.gx[t] + k));
        add_to(norm_sums + kSumStride + k, load(each.moment[t] + k));
      }
}

}  // namespace trtkern::TK_ISA
