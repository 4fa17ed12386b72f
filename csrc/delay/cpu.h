// Delays: out[t] = a x[t - k] + b x[t - k - 1], where the delay of a channel is k + b steps and a = 1 - b. Backward the
// same with the time turned around: gx[s] = a g[s + k] + b g[s + k + 1].
//
// A block of neurons goes through the steps. The rows that it has passed stay in a ring, in the L1 cache where the
// delays are not long, and a vector gathers from them: each lane reads the row of its own delay. What is further away
// by a step, x[t - k - 1], was what the step before gathered, so each element is gathered once.
//
// A weight of 0 reads nothing: 0 * NaN is NaN.
#pragma once
#include "cpu/rows.h"
#include "delay/args.h"

namespace trtkern::TK_ISA {

// from[index] of each lane.
TK_INLINE vfloat gather(const float* from, vint index) {
#if TK_WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_i32gather_ps((__m512i)index, from, 4);
#elif TK_WIDTH == 8 && defined(__AVX2__)
  return (vfloat)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
  vfloat found;
  for (int l = 0; l < kLanes; ++l) found[l] = from[index[l]];
  return found;
#endif
}

// The rows of a sequence: those of v0 are the steps from -most to -1. Null where there is none.
template <class Raw>
struct Steps {
  Raw *x, *v0;
  int64_t N, most;

  Steps(uint64_t x, uint64_t v0, const DelayArgs& a) : x((Raw*)x), v0((Raw*)v0), N(a.N), most(a.most) {}
  TK_INLINE Raw* row(int64_t step) const {
    if (step >= 0) return x ? x + step * N : nullptr;
    return v0 && step >= -most ? v0 + (most + step) * N : nullptr;
  }
};

constexpr int64_t kDelayAhead = 8;   // steps by which rows are asked for before they are read
constexpr int64_t kDelayFlush = 16;  // steps whose slopes are added in float

// A block of neurons and what its scratch memory holds of each: padded to whole tiles, whose delay is 0.
template <class D>
struct DelayBlock {
  using Raw = typename D::Raw;
  const DelayArgs& a;
  const int64_t pitch;  // neurons of a block: those of a row of the ring
  const int32_t mask;   // the numbers of the ring, less 1
  float* ring;
  int32_t* place;            // of x[t - k] in the ring, less t rows
  float *near, *far, *last;  // the weights; what the step before gathered
  float *row, *slopes;       // on its way out, or in; sums of slopes
  double* sums;
  Raw* narrow;
  int64_t n0 = 0, n = 0;

  DelayBlock(const DelayArgs& a, const DelayPlan& plan, float* scratch)
      : a(a), pitch(plan.neurons), mask((int32_t)(plan.ring * plan.neurons - 1)) {
    Scratch pieces{scratch};
    ring = pieces.take(plan.ring * pitch);
    sums = (double*)pieces.take(2 * pitch);
    place = (int32_t*)pieces.take(pitch);
    near = pieces.take(pitch), far = pieces.take(pitch), last = pieces.take(pitch);
    row = pieces.take(pitch), slopes = pieces.take(pitch);
    narrow = (Raw*)pieces.take(pitch);
  }

  // Neurons [first, first + count), behind zeros; SIGN: -1 reads a delay before a step, 1 behind it.
  template <int SIGN>
  TK_NOINLINE void begin(int64_t first, int64_t count) {
    n0 = first, n = count;
    const float most = (float)a.most, *const delays = (const float*)a.delays;
    int64_t channel = n0 / a.inner % a.C, inside = n0 % a.inner;
    for (int64_t i = 0; i < pitch; ++i) {
      const float delay = i < n ? delays[channel] : 0.0f;
      if (++inside == a.inner) inside = 0, channel = channel + 1 == a.C ? 0 : channel + 1;
      const float held = !(delay > 0.0f) ? 0.0f : delay < most ? delay : most;  // where it is not one, memory is safe
      const int32_t steps = (int32_t)held, end = a.most > 0 ? (int32_t)a.most - 1 : 0;
      const int32_t whole = steps < end ? steps : end;
      float part = delay != delay ? delay : held - (float)whole;
      if (a.rounded && part == part) part = part < 0.5f ? 0.0f : 1.0f;
      near[i] = 1.0f - part, far[i] = part;
      place[i] = (int32_t)i + SIGN * whole * (int32_t)pitch;
    }
    __builtin_memset(ring, 0, sizeof(float) * (mask + 1));
    __builtin_memset(last, 0, sizeof(float) * pitch);
    __builtin_memset(slopes, 0, sizeof(float) * pitch);
    __builtin_memset(sums, 0, sizeof(double) * pitch);
  }

  TK_INLINE float* ring_row(int64_t step) const { return ring + ((step * pitch) & mask); }

  // A row of the block as floats; zeros for null.
  TK_INLINE void read(const Raw* from, float* to) const {
    if (!from) return (void)__builtin_memset(to, 0, sizeof(float) * n);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(to + j, get<D>(from + n0 + j));
    if (j == n) return;
    Staged<Raw> some;
    some.in(from + n0 + j, (int)(n - j));
    const vfloat rest = get<D>(some.memory);
    __builtin_memcpy(to + j, &rest, sizeof(float) * (n - j));
  }
  TK_INLINE void ask_for(const Raw* from) const {
    for (int64_t j = 0; from && j < n; j += 64 / (int64_t)sizeof(Raw)) prefetch(from + n0 + j);
  }

  // A step: what the delays reach of the ring, mixed, into `to` unless it is null; with `inputs`, a row of floats, what
  // they add to the gradients of the delays. DIRECT: whole vectors past the caches.
  template <bool DIRECT, bool LEARNS>
  TK_INLINE void step(int64_t t, Raw* to, const float* inputs) const {
    const vint start = vint{} + (int32_t)((t * pitch) & mask), within = vint{} + mask;
    for (int64_t j = 0; j < n; j += kLanes) {
      const vfloat one = gather(ring, (load_as<vint>(place + j) + start) & within), next = load(last + j), zero{};
      const vfloat a = load(near + j), b = load(far + j);
      store(last + j, one);
      const vfloat made = where_(b == zero, one, where_(a == zero, next, a * one + b * next));
      if constexpr (LEARNS) store(slopes + j, load(slopes + j) + load(inputs + j) * (next - one));
      if constexpr (DIRECT) {
        stream(to + n0 + j, D::pack(made));
      } else {
        put<false>(narrow + j, D::pack(made));
      }
    }
  }
  TK_INLINE void write(Raw* to, bool streaming) const { copy_out(to + n0, narrow, sizeof(Raw) * n, streaming); }

  TK_NOINLINE void flush() const {
    for (int64_t i = 0; i < n; ++i) sums[i] += slopes[i];
    __builtin_memset(slopes, 0, sizeof(float) * pitch);
  }

  // Whether a row of the block can be streamed as it is made.
  bool direct(const Raw* to, bool streaming) const {
    if (!to || !streaming || n % kLanes != 0) return false;
    const uintptr_t off = (uintptr_t)(to + n0) | (uintptr_t)(a.N * sizeof(Raw));
    return off % kStreamAlign<typename D::Pack> == 0;
  }
};

template <class D>
void delay_forward_blocks(const DelayArgs& a, const DelayPlan& plan, int64_t begin, int64_t end, float* scratch,
                          bool streaming) {
  using Raw = typename D::Raw;
  DelayBlock<D> b(a, plan, scratch);
  const Steps<const Raw> in(a.x, a.v0, a);
  Raw* out = (Raw*)a.out;
  for (int64_t n0 = begin; n0 < end; n0 += plan.neurons) {
    b.template begin<-1>(n0, end - n0 < plan.neurons ? end - n0 : plan.neurons);
    for (int64_t t = a.v0 ? -a.most : 0; t < 0; ++t) b.read(in.row(t), b.ring_row(t));
    if (a.v0) b.template step<false, false>(-1, nullptr, nullptr);  // what is further away at step 0
    const bool direct = b.direct(out, streaming);
    for (int64_t t = 0; t < a.T; ++t) {
      if (t + kDelayAhead < a.T) b.ask_for(in.row(t + kDelayAhead));
      b.read(in.row(t), b.ring_row(t));
      Raw* const to = out + t * a.N;
      if (direct) {
        b.template step<true, false>(t, to, nullptr);
      } else {
        b.template step<false, false>(t, to, nullptr);
        b.write(to, streaming);
      }
    }
  }
  fence();
}
inline void delay_forward(const DelayArgs& a, const DelayPlan& plan, int64_t begin, int64_t end, float* scratch,
                          bool streaming) {
  for_dtype(a.dtype, [&](auto d) { delay_forward_blocks<decltype(d)>(a, plan, begin, end, scratch, streaming); });
}

// One step back: gx, or gv0, and with LEARNS x[s] (g[s + k + 1] - g[s + k]).
template <class D, bool LEARNS>
TK_INLINE void step_back(const DelayBlock<D>& b, int64_t t, typename D::Raw* to, const typename D::Raw* x, bool direct,
                         bool streaming) {
  if constexpr (LEARNS) b.read(x, b.row);
  if (direct) return b.template step<true, LEARNS>(t, to, b.row);
  b.template step<false, LEARNS>(t, to, b.row);
  if (to) b.write(to, streaming);
}

template <class D, bool LEARNS>
void delay_backward_blocks(const DelayArgs& a, const DelayPlan& plan, int64_t begin, int64_t end, float* scratch,
                           bool streaming, double* sums) {
  using Raw = typename D::Raw;
  DelayBlock<D> b(a, plan, scratch);
  const Steps<const Raw> in(a.x, a.v0, a), g(a.g, 0, a);
  const Steps<Raw> out(a.gx, a.gv0, a);
  const int64_t first = a.gv0 || (LEARNS && a.v0) ? -a.most : 0;
  for (int64_t n0 = begin; n0 < end; n0 += plan.neurons) {
    b.template begin<1>(n0, end - n0 < plan.neurons ? end - n0 : plan.neurons);
    const bool direct = b.direct(out.x, streaming);
    for (int64_t t = a.T - 1; t >= first; --t) {
      const int64_t next = t - kDelayAhead;
      if (next >= 0) b.ask_for(g.row(next));
      if (LEARNS && next >= 0) b.ask_for(in.row(next));
      b.read(g.row(t), b.ring_row(t));
      step_back<D, LEARNS>(b, t, out.row(t), in.row(t), direct && t >= 0, streaming);
      if (LEARNS && (t & (kDelayFlush - 1)) == 0) b.flush();
    }
    if constexpr (LEARNS) {
      b.flush();
      __builtin_memcpy(sums + n0, b.sums, sizeof(double) * b.n);
    }
  }
  fence();
}
inline void delay_backward(const DelayArgs& a, const DelayPlan& plan, int64_t begin, int64_t end, float* scratch,
                           bool streaming, double* sums) {
  for_dtype(a.dtype, [&](auto d) {
    using D = decltype(d);
    if (sums) {
      delay_backward_blocks<D, true>(a, plan, begin, end, scratch, streaming, sums);
    } else {
      delay_backward_blocks<D, false>(a, plan, begin, end, scratch, streaming, nullptr);
    }
  });
}

}  // namespace trtkern::TK_ISA
