// Runs the threads of the CUDA kernels on the CPU, one after the other: csrc/lif_cuda_body.h compiled by g++, with
// every access to memory checked against the tensors that LifArgs names and counted (tests/test_cuda_threads.py).
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "lif_args.h"
#include "lif_index.h"

#define TK_INLINE inline
#define TK_UNROLL
#define TK_ROLLED

namespace trtkern {
namespace cuda {

// ---- memory ----

struct Tensor {
  const char* name;
  uint64_t begin;
  int64_t bytes, loaded, stored;
};
static std::vector<Tensor> tensors;
static int64_t strays, misaligned;

static void touch(uint64_t address, int bytes, bool store) {
  misaligned += address % bytes != 0;
  for (Tensor& t : tensors) {
    if (address < t.begin || address + bytes > t.begin + t.bytes) continue;
    (store ? t.stored : t.loaded) += bytes;
    return;
  }
  ++strays;
}

template <int BYTES>
void read(uint64_t address, uint32_t* words) {
  touch(address, BYTES, false);
  if (strays == 0) std::memcpy(words, reinterpret_cast<const void*>(address), BYTES);
}
template <int BYTES>
void write(uint64_t address, const uint32_t* words) {
  touch(address, BYTES, true);
  if (strays == 0) std::memcpy(reinterpret_cast<void*>(address), words, BYTES);
}

// ---- the dialect ----

using Real = float;
template <class F>
F lit(float value) {
  return value;
}
inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }
inline float abs_(float a) { return std::fabs(a); }
inline float exp_(float a) { return std::exp(a); }
inline float where_(bool condition, float a, float b) { return condition ? a : b; }
inline float maximum_(float a, float b) { return a != a || b != b ? a + b : a > b ? a : b; }

inline uint32_t bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float number(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
struct Float32 {
  static constexpr int kBytes = 4;
  static float unpack(uint32_t word, int) { return number(word); }
  static uint32_t pack(float low, float) { return bits(low); }
};
template <class E>
struct Halves {
  static constexpr int kBytes = 2;
  static float unpack(uint32_t word, int at) { return E::widen(at == 0 ? word & 0xffff : word >> 16); }
  static uint32_t pack(float low, float high) { return E::narrow(low) | E::narrow(high) << 16; }
};
struct BFloat16 : Halves<BFloat16> {
  static float widen(uint32_t half) { return number(half << 16); }
  static uint32_t narrow(float value) {
    const uint32_t word = bits(value);
    return value != value ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};
struct Float16 : Halves<Float16> {
  static float widen(uint32_t half) {
    const float sign = half >> 15 ? -1.0f : 1.0f;
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa), (exponent ? exponent : 1) - 25);
  }
  static uint32_t narrow(float value) {
    if (value != value) return 0x7fff;
    const uint32_t sign = bits(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)));
    const uint32_t word = bits(size);
    return sign | (word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13;
  }
};

#include "trtkern_surrogates.h"
#include "lif_math.h"

}  // namespace cuda
}  // namespace trtkern

#include "lif_cuda_body.h"

using namespace trtkern;
using namespace trtkern::cuda;

// ---- the grid ----

template <class E, class C>
void forward_grid(const LifArgs& a) {
  for (int64_t block = 0; block < index::blocks(a.N, C::V); ++block) {
    for (int thread = 0; thread < index::kThreads; ++thread) {
      const int64_t n = index::first_neuron(block, thread, C::V);
      if (n >= a.N) continue;
      const uint32_t one = 1;
      if (!forward_thread<E, C::V, C::K, C::LOOP>(a, n) && a.flag != 0) write<4>(a.flag, &one);
    }
  }
}

template <class E, class C, int SURROGATE = 0>
void backward_grid(const LifArgs& a) {
  if constexpr (SURROGATE < kSurrogates) {
    if (a.surrogate != SURROGATE) return backward_grid<E, C, SURROGATE + 1>(a);
    using S = Slots<E, C::V, C::K>;
    const bool learn = a.gparams != 0;
    const int64_t blocks = index::blocks(a.N, C::V);
    for (int64_t block = 0; block < blocks; ++block) {
      // Shared memory comes with whatever was there: here NaN.
      std::vector<uint32_t> shared((learn ? S::kEnd : S::kSum) * index::kThreads, 0x7fc00000u);
      float sums[kSums] = {};
      for (int thread = 0; thread < index::kThreads; ++thread) {
        const S slots{shared.data() + thread, index::kThreads};
        const int64_t n = index::first_neuron(block, thread, C::V);
        if (learn) clear_sums(slots);
        if (n < a.N) backward_thread<E, C::V, C::K, C::LOOP, SURROGATE>(a, n, slots);
        if (learn && a.C > 1 && n < a.N) store_sums(a, n, slots);
        for (int r = 0; learn && r < kSums; ++r) sums[r] += sum_of(slots, r);
      }
      for (int r = 0; learn && a.C == 1 && r < kSums; ++r)
        store_one(a.workspace, index::offset(r, block, blocks), sums[r]);
    }
  }
}

static void reduce_grid(const LifArgs& a) {
  const index::Reduction r = reduction(a);
  for (int64_t block = 0; block < r.blocks(kSums); ++block) {
    const index::Reduction::Place place = r.place(block, kSums);
    float lanes[index::kReduceLanes] = {};
    for (int thread = 0; thread < index::kReduceThreads; ++thread) {
      lanes[r.narrow() ? thread % index::kReduceLanes : 0] += segment_sum(r, a.workspace, block, thread);
    }
    for (int lane = 0; lane < (r.narrow() ? index::kReduceLanes : 1); ++lane) {
      const int64_t channel = r.channel(place.tile, lane);
      const int64_t row = place.segment * kSums + place.row;
      if (channel < r.C) store_one(a.workspace, kSums * r.M + index::offset(row, channel, r.C), lanes[lane]);
    }
  }
  for (int64_t i = 0; i < kSums * r.C; ++i) finish_sum(a, r, i);
}

template <class E>
void run_as(const LifArgs& a, bool backward) {
  choose<E>(a, [&](auto c) { backward ? backward_grid<E, decltype(c)>(a) : forward_grid<E, decltype(c)>(a); });
}

static void name_tensors(const LifArgs& a) {
  const int64_t rows = a.T * a.N * (a.dtype == kFloat32 ? 4 : 2), row = a.N * 4, params = kParams * a.C * 4;
  tensors.clear();
  const auto name = [](const char* field, uint64_t begin, int64_t bytes) {
    if (begin != 0) tensors.push_back({field, begin, bytes, 0, 0});
  };
  name("x", a.x, rows), name("s", a.s, rows), name("v", a.v, rows);
  name("gs", a.gs, rows), name("gv", a.gv, rows), name("gx", a.gx, rows);
  name("v0", a.v0, row), name("v_final", a.v_final, row), name("gv_final", a.gv_final, row), name("gv0", a.gv0, row);
  name("edges", a.edges, (a.T - 1) / kChunk * row), name("flag", a.flag, 4);
  name("params", a.params, params), name("gparams", a.gparams, params);
  name("workspace", a.workspace, index::workspace(reduction(a), kSums) * 4);
}

// ---- the two forms of the step ----

static bool same(float a, float b) { return bits(a) == bits(b) || (a != a && b != b); }

template <int SURROGATE>
int64_t step_differences(const float (&of)[15]) {
  int64_t differences = 0;
  for (int i = 0; i < 15 * 15 * 15 * 15; ++i) {
    const float h = of[i % 15], gs = of[i / 15 % 15], gv = of[i / 225 % 15], threshold = of[i / 3375];
    for (int reset : {kHard, kSoft, kNone}) {
      const float to = reset == kNone ? 0.0f : of[(i + 3) % 15];
      const Neuron<float> p{0.5f, 1.0f, 0.0f, to, threshold, to};
      const bool hard = reset == kHard;
      differences += !same(reset_after(p, h, reset), reset_after_flat(p, h, hard));
      for (bool detach : {false, true}) {
        const StepGradient<float> g = step_gradient<SURROGATE>(p, h, gs, gv, 2.0f, reset, detach);
        const auto flat = step_gradient_flat<SURROGATE>(p, h, gs, gv, 2.0f, hard, reset != kNone && !detach);
        differences += !same(g.h, flat.h) + !same(g.threshold, flat.threshold);
        if (reset == kHard) differences += !same(g.v_reset, flat.v_reset);
        if (reset == kSoft) differences += !same(g.reset_amount, -flat.v_reset);
      }
    }
  }
  return differences;
}

extern "C" {

// Where lif_math.h's step and its form for GPUs differ in a bit, over ordinary and extreme numbers.
int64_t flat_differences() {
  const float of[15] = {0.0f,  -0.0f, 1.0f,   -1.0f, 0.3f,     1.7f,      -2.6f, 1e-40f,
                        1e-3f, 3e38f, -3e38f, 1e4f,  INFINITY, -INFINITY, NAN};
  return step_differences<0>(of) + step_differences<1>(of) + step_differences<2>(of) + step_differences<3>(of) +
         step_differences<4>(of) + step_differences<5>(of);
}

// Runs a pass; the number of accesses that were out of bounds or not on a multiple of their size.
int64_t run(const LifArgs* a, int backward) {
  name_tensors(*a);
  strays = misaligned = 0;
  if (a->dtype == kFloat32) run_as<Float32>(*a, backward);
  if (a->dtype == kBFloat16) run_as<BFloat16>(*a, backward);
  if (a->dtype == kFloat16) run_as<Float16>(*a, backward);
  if (backward && a->gparams != 0) reduce_grid(*a);
  return strays + misaligned;
}

// "name loaded stored;" for each tensor of the last run, in bytes.
const char* traffic() {
  static std::string text;
  text.clear();
  for (const Tensor& t : tensors) {
    text += std::string(t.name) + " " + std::to_string(t.loaded) + " " + std::to_string(t.stored) + ";";
  }
  return text.c_str();
}

// "name offset;" for each field of LifArgs, then its size.
const char* layout() {
  static std::string text;
  text.clear();
#define TK_OFFSET(field) text += std::string(#field) + " " + std::to_string(offsetof(LifArgs, field)) + ";"
  TK_OFFSET(x), TK_OFFSET(v0), TK_OFFSET(params), TK_OFFSET(s), TK_OFFSET(v), TK_OFFSET(v_final), TK_OFFSET(edges);
  TK_OFFSET(flag), TK_OFFSET(gs), TK_OFFSET(gv), TK_OFFSET(gv_final), TK_OFFSET(gx), TK_OFFSET(gv0);
  TK_OFFSET(gparams), TK_OFFSET(workspace), TK_OFFSET(T), TK_OFFSET(N), TK_OFFSET(C), TK_OFFSET(inner);
  TK_OFFSET(scalars), TK_OFFSET(alpha), TK_OFFSET(dtype), TK_OFFSET(reset), TK_OFFSET(detach), TK_OFFSET(surrogate);
  TK_OFFSET(threads), TK_OFFSET(device), TK_OFFSET(stream);
  text += "end " + std::to_string(sizeof(LifArgs));
  return text.c_str();
}

int64_t workspace_floats(const LifArgs* a) { return index::workspace(reduction(*a), kSums); }
int neurons_a_thread(const LifArgs* a) { return vec(*a); }
}
