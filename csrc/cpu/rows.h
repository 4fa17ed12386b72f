// What both directions of the LIF share on the CPU: blocks of neurons x chunks of kChunk steps, one pass over memory. A
// row is one step of a block.
//
// Lanes are neurons, and nothing is added across lanes but in add_channels, in a fixed order: the width of a vector
// changes no result.
#pragma once
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "lif/math.h"

namespace trtkern::TK_ISA {

#include "trtkern_neurons.h"

// Neurons that go through the steps together: `runs` runs of `length`, `pitch` apart in memory, one after the other in
// scratch memory. One run, or with pooling a piece of two image rows (two runs), or a piece of the channels of two
// places of two image rows (four, in twos `row` apart).
struct Block {
  int64_t at = 0, length = 0, runs = 1, pitch = 0, row = 0;
  int64_t fold_row = 0, fold_side = 0;  // with pooling: the rows and places that are pooled, as they lie in scratch

  TK_INLINE int64_t size() const { return runs * length; }
  TK_INLINE int64_t start(int64_t run) const { return at + (run & 1) * pitch + (run >> 1) * row; }
};

// Neurons of one block at n0, at most: within one channel where channels are long, so that its parameters are one
// vector; fewer where they are short, so that rows of parameters stay in L1.
inline int64_t block_limit(const LifArgs& a, int64_t n0, int64_t most) {
  if (a.C == 1) return most;
  if (a.inner >= kLongRun) return a.inner - n0 % a.inner < most ? a.inner - n0 % a.inner : most;
  const int64_t limit = kMixedBlock < most ? kMixedBlock : most;
  return a.inner == 1 && a.C < limit ? limit / a.C * a.C : limit;  // all blocks start at the same channel
}

// The block at n0 of [n0, end). With pooling n0 counts neurons in the order in which they are pooled: the block's
// averages start at n0 / 4, and n0 + size() is where the next block is.
TK_NOINLINE inline Block block_at(const LifArgs& a, int64_t n0, int64_t end, int64_t most) {
  const int64_t limit = block_limit(a, n0, most), left = end - n0;
  if (!a.pool_row) return {n0, left < limit ? left : limit};
  const int64_t pair = 2 * a.pool_row, side = a.pool_side;
  if (pair <= limit) return {n0, (left < limit ? left : limit) / pair * pair, 1, 0, 0, a.pool_row, side};
  const int64_t first = n0 / pair * pair, within = n0 % pair;
  if (4 * side <= limit) {
    const int64_t column = within / 2, most_columns = limit / 2 / (2 * side) * (2 * side);
    const int64_t length = a.pool_row - column < most_columns ? a.pool_row - column : most_columns;
    return {first + column, length, 2, a.pool_row, 0, length, side};
  }
  const int64_t place = within / (4 * side) * (2 * side), channel = within % (4 * side) / 4;
  const int64_t length = side - channel < limit / 4 ? side - channel : limit / 4;
  return {first + place + channel, length, 4, side, a.pool_row, 2 * length, length};
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
// The same of a block, i counted in scratch memory.
template <class Run>
TK_INLINE void channel_runs(const LifArgs& a, const Block& b, Run run) {
  for (int64_t r = 0; r < b.runs; ++r)
    channel_runs(a, b.start(r), b.length,
                 [&](int64_t i, int64_t channel, int64_t length) { run(r * b.length + i, channel, length); });
}

// The sum of n floats in double, in an order that depends on n alone.
TK_NOINLINE inline double ordered_sum(const float* from, int64_t n) {
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
TK_NOINLINE inline void add_channels(const LifArgs& a, const Block& b, const float* row, double* totals) {
  channel_runs(a, b, [&](int64_t i, int64_t channel, int64_t length) {
    if (a.inner == 1 && a.C > 1) {
      for (int64_t j = 0; j < length; ++j) totals[channel + j] += row[i + j];
    } else {
      totals[channel] += ordered_sum(row + i, length);
    }
  });
}

// Numbers of the neurons of a block, row by row, kParameterStride floats apart: a float a neuron (each is -1), or one
// vector for all (0). base is null where there are none.
struct Rows {
  const float* base = nullptr;
  int64_t each = 0;

  TK_INLINE vfloat row(int k, int64_t i) const { return load(base + k * kParameterStride + (i & each)); }
  TK_INLINE Rows at(int64_t i) const { return {base + (i & each), each}; }
  TK_INLINE Rows known_each() const { return {base, -1}; }  // said to the compiler
};

// The parameters of a neuron N (trtkern_neurons.h).
template <class N>
struct Params {
  vfloat at[N::kParams];
};
template <class N>
TK_INLINE Params<N> params_of(const Rows& rows, int64_t i) {
  Params<N> p;
  for (int k = 0; k < N::kParams; ++k) p.at[k] = rows.row(k, i);
  return p;
}

// COUNT numbers of a neuron from rows of scratch memory, `stride` floats apart, and back.
template <int COUNT>
TK_INLINE void load_numbers(const float* rows, int64_t stride, int64_t i, vfloat* to) {
  for (int k = 0; k < COUNT; ++k) to[k] = load(rows + k * stride + i);
}
template <int COUNT>
TK_INLINE void store_numbers(float* rows, int64_t stride, int64_t i, const vfloat* from) {
  for (int k = 0; k < COUNT; ++k) store(rows + k * stride + i, from[k]);
}

// The state after a step, and where it fired.
template <class N>
TK_INLINE vint settle(const vfloat* p, const vfloat* trace, int reset, vfloat* state) {
  vfloat potential, threshold;
  N::fire(trace, p, potential, threshold);
  const vint fired = potential > threshold;
  N::settle(reset, trace, fired, p, state);
  return fired;
}

// Whether this instruction set has the rows that do anything and no others: short to compile (setup.py).
#if defined(TK_GENERAL_ROWS)
constexpr bool kGeneralRows = true;
#else
constexpr bool kGeneralRows = false;
#endif

// Whether a neuron has rows of its own for the plain cases, or those alone that do anything: short to compile.
template <class N>
constexpr bool kPlainRows = N::kId == 0;

// A tensor [count, C] laid out as Rows for one block after the other.
struct ChannelRows {
  float* memory;
  int count;
  Rows rows;
  Block kept{-1, 0};
  bool fresh = true;  // the last block's channels were not those of the block before it

  ChannelRows(float* memory, int count) : memory(memory), count(count) {}
  // `per_channel`: `from` has C numbers a row, else one.
  TK_NOINLINE const Rows& fill(const LifArgs& a, const Block& b, const float* from, bool per_channel) {
    rows = {memory, per_channel && a.C > 1 && a.inner < kLongRun ? -1 : 0};
    const int64_t C = per_channel ? a.C : 1;
    fresh = true;
    if (!rows.each) {
      const float* first = from + (C > 1 ? b.at / a.inner % C : 0);
      for (int k = 0; k < count; ++k) store(memory + k * kParameterStride, lit<vfloat>(first[k * C]));
      return rows;
    }
    const bool same = a.inner == 1 && kept.at == b.at % C && kept.runs == b.runs && b.runs <= 2 && b.pitch % C == 0 &&
                      (b.length == kept.length || (b.runs == 1 && b.length < kept.length));
    fresh = !same;
    if (same) return rows;
    kept = b, kept.at = b.at % C;
    for (int k = 0; k < count; ++k) {
      float* row = memory + k * kParameterStride;
      channel_runs(a, b, [&](int64_t i, int64_t channel, int64_t length) {
        if (a.inner == 1) {
          __builtin_memcpy(row + i, from + k * C + channel, sizeof(float) * length);
        } else {
          const float value = from[k * C + channel];
          for (int64_t j = 0; j < length; ++j) row[i + j] = value;
        }
      });
      // Padding has the numbers of a neuron: with zeros one that divides by them would not be finite.
      for (int64_t i = 0; i < kPad; ++i) row[b.size() + i] = row[b.size() - 1];
    }
    return rows;
  }
  const Rows& parameters(const LifArgs& a, const Block& b) {
    return fill(a, b, a.params ? (const float*)a.params : a.scalars, a.params != 0);
  }
  Rows affine(const LifArgs& a, const Block& b, uint64_t tensor) {
    return tensor ? fill(a, b, (const float*)tensor, true) : Rows{};
  }
};

// Scratch memory, taken piece by piece.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += (floats + 15) / 16 * 16;
    return piece;
  }
};

// Bytes to `to`, past the caches where they are large.
TK_NOINLINE inline void copy_out(void* to, const void* from, int64_t bytes, bool streaming) {
  char* out = (char*)to;
  const char* in = (const char*)from;
  int64_t i = 0;
  if (streaming) {
    i = to_aligned<vfloat>(out, bytes);
    __builtin_memcpy(out, in, i);
    for (; i + (int64_t)sizeof(vfloat) <= bytes; i += sizeof(vfloat)) stream(out + i, load_as<vfloat>(in + i));
  }
  __builtin_memcpy(out + i, in + i, bytes - i);
}

// A row of a [.., N] float32 tensor, or zeros where there is none; zeros behind it. `at`: element of neuron 0.
TK_NOINLINE inline void read_row(float* row, uint64_t tensor, int64_t at, const Block& b) {
  if (!tensor) return (void)__builtin_memset(row, 0, sizeof(float) * (b.size() + kPad));
  for (int64_t r = 0; r < b.runs; ++r)
    __builtin_memcpy(row + r * b.length, (const float*)tensor + at + b.start(r), sizeof(float) * b.length);
  __builtin_memset(row + b.size(), 0, sizeof(float) * kPad);
}
TK_NOINLINE inline void write_row(uint64_t tensor, int64_t at, const float* row, const Block& b, bool streaming) {
  for (int64_t r = 0; r < b.runs; ++r)
    copy_out((float*)tensor + at + b.start(r), row + r * b.length, sizeof(float) * b.length, streaming);
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

// What the input current of a row is made of.
template <class Raw>
struct Current {
  const Raw *x, *residual;
  Rows affine;

  TK_INLINE Current at(int64_t i) const { return {x + i, residual ? residual + i : nullptr, affine.at(i)}; }
};

// The three numbers of `affine` or `coef`.
struct Triple {
  vfloat a, b, c;
};
TK_INLINE Triple triple(const Rows& rows, int64_t i) { return {rows.row(0, i), rows.row(1, i), rows.row(2, i)}; }

// The gradient of what was normalised, from that of the input current.
TK_INLINE vfloat input_gradient(const Triple& coef, vfloat gx, vfloat deviation) {
  return fma_(coef.a, gx, fma_(coef.b, deviation, coef.c));
}

// The input current of a vector of a normalised row.
template <class D>
TK_INLINE vfloat current(const Current<typename D::Raw>& in, int64_t i, const Triple& affine) {
  const vfloat x = current_of(get<D>(in.x + i), affine.a, affine.b, affine.c);
  return in.residual ? x + get<D>(in.residual + i) : x;
}

// Which numbers of a block are one vector for all neurons: all, those of the neuron, none (or it is not known).
enum Layout : int { kShared, kSharedNeuron, kEach };
inline Layout layout_of(const LifArgs& a) {
  const bool each = a.C > 1 && a.inner < kLongRun;
  return each && a.params ? kEach : each && a.affine ? kSharedNeuron : kShared;
}

constexpr int64_t kForwardStride = kForwardBlock + kPad;  // between the rows of a state in the forward pass
constexpr int64_t kStride = kBackwardBlock + kPad;        // between the rows of scratch memory of the backward pass
constexpr int kSpan = 16, kSpanVectors = kSpan / kLanes;  // neurons that a loop takes at a time, at most kPad

// `row` of n neurons in whole spans: the neurons before its output is aligned for streaming, what can be streamed, the
// rest. Odd neurons pass through a small copy (Row::part) padded to a span.
template <bool STREAM, int SPAN = kSpan, class Row>
TK_INLINE void along(const Row& row, int64_t n) {
  int64_t head = 0;
  if constexpr (STREAM) head = row.to_aligned_output(n);
  if (head) row.part(0, (int)head);
  const int64_t body = (n - head) / SPAN * SPAN;
  if (body) row.template whole<STREAM>(head, body);
  if (head + body < n) row.part(head + body, (int)(n - head - body));
}

// A span of tensor memory that may not be read or written beyond `count` elements. Null stays null.
template <class Raw>
struct Staged {
  Raw memory[kSpan] = {};
  const Raw* in(const Raw* from, int count) {
    if (from) __builtin_memcpy(memory, from, sizeof(Raw) * count);
    return from ? memory : nullptr;
  }
  Raw* out(const Raw* to) { return to ? memory : nullptr; }
  void back(Raw* to, int count) const {
    if (to) __builtin_memcpy(to, memory, sizeof(Raw) * count);
  }
};

// COUNT spans of scratch memory, `stride` apart, whose floats from `count` on are put back. Null stays null.
template <int COUNT>
struct Kept {
  float* at;
  int64_t stride;
  float memory[COUNT][kSpan];
  explicit Kept(float* at, int64_t stride = 0) : at(at), stride(stride) {
    for (int k = 0; at && k < COUNT; ++k) __builtin_memcpy(memory[k], at + k * stride, sizeof memory[k]);
  }
  void restore(int count) const {
    for (int k = 0; at && k < COUNT; ++k)
      __builtin_memcpy(at + k * stride + count, memory[k] + count, sizeof(float) * (kSpan - count));
  }
};

// The element type of the rows of neurons N where tensors are of D: a neuron without rows of its own for the plain
// cases has those of float32 alone, and its rows of a half type are converted on the way (Converted).
template <class D, class N>
using RowType = std::conditional_t<kPlainRows<N>, D, Float32>;

// A row of a tensor of D, read or written by a row of R. Where the two are the same it is the tensor itself.
template <class D, class R>
struct Converted {
  static constexpr bool kSame = true;
  using Raw = typename D::Raw;

  explicit Converted(Scratch&) {}
  TK_INLINE const Raw* in(const Raw* from, int64_t, float = 1.0f) const { return from; }
  TK_INLINE const Raw* ahead(const Raw* next) const { return next; }
  TK_INLINE Raw* out(Raw* to) const { return to; }
  TK_INLINE void back(Raw*, int64_t, bool, float* = nullptr) const {}
};
// A half type passes through a row of floats. Null stays null.
template <class D>
struct Converted<D, std::enable_if_t<sizeof(typename D::Raw) == 2, Float32>> {
  static constexpr bool kSame = false;
  using Raw = typename D::Raw;
  float* row;
  Raw* narrow;

  explicit Converted(Scratch& s) : row(s.take(kForwardStride)), narrow((Raw*)s.take(kForwardStride / 2)) {}
  TK_NOINLINE const float* in(const Raw* from, int64_t n, float share = 1.0f) const {
    if (!from) return nullptr;
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(row + i, lit<vfloat>(share) * get<D>(from + i));
    Staged<Raw> last;
    if (whole < n) store(row + whole, lit<vfloat>(share) * get<D>(last.in(from + whole, (int)(n - whole))));
    return row;
  }
  TK_INLINE const float* ahead(const Raw*) const { return row; }
  TK_INLINE float* out(Raw* to) const { return to ? row : nullptr; }
  // The row to its tensor; `watch` is NaN then where a number is not finite in D.
  TK_NOINLINE void back(Raw* to, int64_t n, bool streaming, float* watch = nullptr) const {
    if (!to) return;
    __builtin_memset(row + n, 0, sizeof(float) * kPad);
    vfloat watched = watch ? load(watch) : vfloat{};
    for (int64_t i = 0; i < n; i += kLanes) {
      const typename D::Pack shown = D::pack(load(row + i));
      put<false>(narrow + i, shown);
      watched = fma_(D::unpack(shown), vfloat{}, watched);
    }
    if (watch) store(watch, watched);
    copy_out(to, narrow, sizeof(Raw) * n, streaming);
  }
};

// Element `at` of a tensor, or null where there is none.
template <class Raw>
TK_INLINE Raw* element(uint64_t tensor, int64_t at) {
  return tensor ? (Raw*)tensor + at : nullptr;
}

// f(element type) for a number of Dtype.
template <class F>
TK_INLINE void for_dtype(int dtype, F f) {
  if (dtype == kFloat32) return f(Float32{});
#if defined(TK_FLOAT32_ONLY)
  __builtin_trap();
#else
  if (dtype == kBFloat16) f(BFloat16{});
  if (dtype == kFloat16) f(Float16{});
#endif
}

}  // namespace trtkern::TK_ISA
