// Runs the threads of the CUDA kernels on the CPU, one after the other: csrc/lif/cuda_body.h compiled by g++, with
// every access to memory checked against the tensors that LifArgs names and counted (tests/test_cuda_threads.py).
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_threads_dialect.h"

#include "lif/cuda_body.h"

#include "norm/cuda_body.h"
#include "norm/cuda_finish.h"

using namespace trtkern;
using namespace trtkern::cuda;

#include "cuda_threads_grids.h"

// A block's two passes over its numbers; the sums over a block go through shared memory here also where a GPU shuffles.
template <class E, int V>
void statistics_grid(const LifArgs& a, const index::Tiles& t) {
  for (int64_t block = 0; block < t.blocks(); ++block) {
    std::vector<Sample<E, V>> own(t.threads);
    auto words = shared(V, t.threads), more = shared(V, t.threads);
    const auto leave = [&](std::vector<uint32_t>& to, int thread, const float (&sum)[V]) {
      for (int j = 0; j < t.lanes; ++j) to[j * t.threads + thread] = bits(sum[j]);
    };
    float sum[V], squares[V], mean[V];
    for (int thread = 0; thread < t.threads; ++thread) {
      own[thread].load(a, t, block, thread);
      own[thread].add_up(t.lanes, sum);
      leave(words, thread, sum);
    }
    const double count = static_cast<double>(t.count(t.segment(block)));
    std::vector<float> means(t.outputs());
    for (int o = 0; o < t.outputs(); ++o)
      means[o] = column_sum(t, words.data(), o) * (1.0f / static_cast<float>(count));
    for (int thread = 0; thread < t.threads; ++thread) {
      const int first = (thread & ((1 << t.shift) - 1)) * t.lanes;
      for (int j = 0; j < V; ++j) mean[j] = means[first + (t.lanes == 1 ? 0 : j)];
      own[thread].deviations(t.lanes, mean, sum, squares);
      leave(words, thread, sum), leave(more, thread, squares);
    }
    for (int o = 0; o < t.outputs(); ++o) {
      const float all = column_sum(t, words.data(), o), all_squares = column_sum(t, more.data(), o);
      store_moments(a, t, block, o, moments_about(count, means[o], all, all_squares));
    }
  }
}

// What the last block of a finish does.
static void move_grid(const NormArgs& n) {
  if (!moves(n) || !all_finite(n, 0, 1)) return;
  uint32_t words[2];
  int64_t batches;
  read<8>(n.batches, words);
  std::memcpy(&batches, words, 8);
  ++batches;
  std::memcpy(words, &batches, 8);
  write<8>(n.batches, words);
  for (int thread = 0; thread < kMergeThreads; ++thread) move_all(n, thread, kMergeThreads, batches);
}

static void merge_grid(const LifArgs& a, const index::Tiles& t, const NormArgs& n) {
  for (int64_t channel = 0; channel < t.C(); ++channel) {
    Moments own[kMergeThreads];
    for (int thread = 0; thread < kMergeThreads; ++thread) own[thread] = merge_segments(a, t, channel, thread);
    for (int half = kMergeThreads / 2; half > 0; half /= 2) {
      for (int thread = 0; thread < half; ++thread) own[thread].merge(own[thread + half]);
    }
    store_double(n.mean, channel, own[0].mean);
    store_double(n.spread, channel, own[0].squares);
    if (n.affine != 0) finish_forward(n, channel, channel_statistics(n, channel));
  }
  move_grid(n);
}

template <class E>
void statistics_as(const LifArgs& a, const index::Tiles& t) {
  t.vec == 1 ? statistics_grid<E, 1>(a, t) : statistics_grid<E, 16 / E::kBytes>(a, t);
}

template <class E>
void input_grad_as(const LifArgs& a) {
  for (int64_t n = 0; n < a.N; n += vec(a)) {
    vec(a) == 1 ? input_grad_thread<E, 1>(a, n) : input_grad_thread<E, 16 / E::kBytes>(a, n);
  }
}

static void name(const char* field, uint64_t begin, int64_t bytes) {
  if (begin != 0) tensors.push_back({field, begin, bytes, 0, 0});
}

static void name_tensors(const LifArgs& a) {
  const int64_t element = a.dtype == kFloat32 ? 4 : 2, rows = a.T * a.N * element;
  int64_t states = 0;
  for_neuron(a.neuron, [&](auto n) { states = n.kStates; });
  const int64_t row = states * a.N * 4, params = a.P * a.C * 4, affine = kAffine * a.C * 4,
                pooled = a.pool_row != 0 ? rows / 4 : rows;
  tensors.clear();
  name("x", a.x, a.x_stride == 0 ? a.N * element : rows), name("residual", a.residual, rows);
  name("s", a.s, pooled), name("v", a.v, rows), name("packed", a.packed, index::ceil_div(a.T, 8) * a.N);
  name("gs", a.gs, pooled), name("gv", a.gv, rows), name("gx", a.gx, rows);
  name("v0", a.v0, row), name("v_final", a.v_final, row), name("gv_final", a.gv_final, row), name("gv0", a.gv0, row);
  name("edges", a.edges, (a.T - 1) / span(a) * row), name("flag", a.flag, 4);
  name("params", a.params, params), name("gparams", a.gparams, params);
  name("affine", a.affine, affine), name("coef", a.coef, affine), name("norm_sums", a.norm_sums, 2 * a.C * 8);
}

static int64_t bytes_of(int type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// `written`: the sums are written in the same call, by what has their address too.
static void name_norm(const NormArgs& n, bool written = false) {
  const int64_t parameter = n.C * bytes_of(n.type), running = n.C * bytes_of(n.running), row = n.C * 4, wide = n.C * 8;
  if (n.values == 0) name("mean", n.mean, n.C * bytes_of(n.source)), name("spread", n.spread, n.C * bytes_of(n.source));
  name("weight", n.weight, parameter), name("bias", n.bias, parameter);
  name("gweight", n.gweight, parameter), name("gbias", n.gbias, parameter);
  name("running_mean", n.running_mean, running), name("running_var", n.running_var, running);
  name("batches", n.batches, 8), name("moments", n.moments, 2 * wide), name("norm_affine", n.affine, 3 * row);
  name("norm_coef", n.coef, 3 * row), name("own", n.own, 2 * wide);
  if (!written) name("sums", n.sums, 2 * wide);
}

static int64_t launched;  // kernels: one for each grid that is run

// The statistics of x, merged into n.mean and n.spread, and finished where n has more; as start_statistics has it.
static int64_t statistics_of(const LifArgs& a, const index::Tiles& t, const NormArgs& n) {
  strays = misaligned = 0;
  if (a.dtype == kFloat32) statistics_as<Float32>(a, t);
  if (a.dtype == kBFloat16) statistics_as<BFloat16>(a, t);
  if (a.dtype == kFloat16) statistics_as<Float16>(a, t);
  merge_grid(a, t, n);
  launched += 2;
  return strays + misaligned;
}

// ---- the step that a GPU takes, and that of the table of neurons ----

static bool same(float a, float b) { return a == b || (a != a && b != b); }

template <int SURROGATE>
int64_t step_differences(const float (&of)[15]) {
  int64_t differences = 0;
  for (int i = 0; i < 15 * 15 * 15 * 15; ++i) {
    const float h = of[i % 15], gs = of[i / 15 % 15], gv = of[i / 225 % 15], threshold = of[i / 3375];
    if (!std::isfinite(threshold)) continue;  // as parameters are
    for (int reset : {kHard, kSoft, kNone}) {
      const float to = reset == kNone ? 0.0f : of[(i + 3) % 15];
      const Neuron<float> p{0.5f, 1.0f, 0.0f, to, threshold, to};
      const float row[kParams] = {p.decay, p.gain, p.bias, p.reset_amount, p.threshold, p.v_reset};
      const bool hard = reset == kHard, fired = h > threshold;
      float v = 0.0f;
      LIF::settle(reset, &h, fired, row, &v);
      differences += !same(v, reset_after_flat(p, h, hard));
      if (!std::isfinite(to)) continue;
      for (bool detach : {false, true}) {
        const float sg = surrogate<SURROGATE>(h - p.threshold, 2.0f);
        const auto flat = step_gradient_flat(p, h, sg, gs, gv, hard, reset != kNone && !detach);
        float g = 0.0f, sum[kParams] = {};
        LIF::fired_back(reset, detach, &h, fired, row, &gv, gs, sg, &g, sum);
        differences += !same(g, flat.h);
        if (h == h) differences += !same(sum[kThreshold], flat.threshold);
        if (reset == kHard) differences += !same(sum[kVReset], flat.v_reset);
        if (reset == kSoft) differences += !same(sum[kResetAmount], -flat.v_reset);
      }
    }
  }
  return differences;
}

extern "C" {

// Where LIF's step in the table of neurons and lif/cuda_step.h's form for GPUs differ, over ordinary and extreme
// numbers.
int64_t flat_differences() {
  const float of[15] = {0.0f,  -0.0f, 1.0f,   -1.0f, 0.3f,     1.7f,      -2.6f, 1e-40f,
                        1e-3f, 3e38f, -3e38f, 1e4f,  INFINITY, -INFINITY, NAN};
  return step_differences<0>(of) + step_differences<1>(of) + step_differences<2>(of) + step_differences<3>(of) +
         step_differences<4>(of) + step_differences<5>(of);
}

// Runs a pass; the number of accesses that were out of bounds or not on a multiple of their size.
int64_t run(const LifArgs* a, int backward, const NormArgs* norm) {
  const NormArgs n = norm == nullptr ? NormArgs{} : *norm;
  name_tensors(*a);
  name_norm(n, true);
  name("workspace", a->workspace, index::workspace(reduction(*a), sum_rows(*a)) * 4);
  strays = misaligned = 0;
  if (a->dtype == kFloat32) run_as<Float32>(*a, backward);
  if (a->dtype == kBFloat16) run_as<BFloat16>(*a, backward);
  if (a->dtype == kFloat16) run_as<Float16>(*a, backward);
  ++launched;
  if (!backward || (a->gparams | a->norm_sums) == 0) return strays + misaligned;
  add_up_grid(*a, n);
  ++launched;
  return strays + misaligned;
}

int64_t statistics(const LifArgs* a, uint64_t stats) {
  const index::Tiles t = statistics_tiles(*a);
  name_tensors(*a);
  name("stats", stats, 2 * a->C * 8), name("workspace", a->workspace, 2 * t.segments() * t.C() * 8);
  NormArgs n;
  n.mean = stats, n.spread = stats + 8 * a->C;
  return statistics_of(*a, t, n);
}

int64_t affine(const LifArgs* a, const NormArgs* norm) {
  const index::Tiles t = statistics_tiles(*a);
  NormArgs n = *norm;
  n.mean = known_statistics(*a, t), n.spread = n.mean + 8 * a->C;
  n.source = kFloat64, n.values = a->T * a->N / a->C;
  name_tensors(*a);
  name("workspace", a->workspace, 2 * (t.segments() + 1) * t.C() * 8);
  name_norm(n);
  return statistics_of(*a, t, n);
}

int64_t finish(const NormArgs* n) {
  tensors.clear();
  name_norm(*n);
  strays = misaligned = 0;
  for (int64_t c = 0; c < n->C; ++c) finish_forward(*n, c, channel_statistics(*n, c));
  move_grid(*n);
  ++launched;
  return strays + misaligned;
}

int64_t coefficients(const NormArgs* n) {
  tensors.clear();
  name_norm(*n);
  strays = misaligned = 0;
  for (int64_t c = 0; c < n->C; ++c) finish_sums(*n, c);
  ++launched;
  return strays + misaligned;
}

int64_t launches() { return launched; }

int64_t input_grad(const LifArgs* a) {
  name_tensors(*a);
  strays = misaligned = 0;
  if (a->dtype == kFloat32) input_grad_as<Float32>(*a);
  if (a->dtype == kBFloat16) input_grad_as<BFloat16>(*a);
  if (a->dtype == kFloat16) input_grad_as<Float16>(*a);
  ++launched;
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

// "name type count offset;" for each field of LifArgs, or of NormArgs, then its size.
const char* layout(int norm) {
  static std::string text;
  text.clear();
  const auto add = [](const char* name, const char* type, int count, size_t offset) {
    text += std::string(name) + " " + type + " " + std::to_string(count) + " " + std::to_string(offset) + ";";
  };
  if (norm) {
#define TK_FIELD(type, name, value) add(#name, #type, 1, offsetof(NormArgs, name))
#include "norm/fields.h"
    text += std::to_string(sizeof(NormArgs));
    return text.c_str();
  }
#define TK_FIELD(type, name, value) add(#name, #type, 1, offsetof(LifArgs, name))
#define TK_FIELDS(type, name, count) add(#name, #type, count, offsetof(LifArgs, name))
#include "lif/fields.h"
  text += std::to_string(sizeof(LifArgs));
  return text.c_str();
}

// Where a struct has its fields' defaults.
void set_defaults(LifArgs* a, NormArgs* n) {
  if (a) *a = LifArgs{};
  if (n) *n = NormArgs{};
}

int64_t workspace_floats(const LifArgs* a) { return index::workspace(reduction(*a), sum_rows(*a)) + a->C; }
int64_t statistics_workspace_floats(const LifArgs* a) {
  const index::Tiles t = statistics_tiles(*a);
  return 4 * t.segments() * t.C() + 4 * t.C() + 2;
}
int neurons_a_thread(const LifArgs* a) { return vec(*a); }
int reads_ahead(const LifArgs* a) { return ahead(*a); }
}
