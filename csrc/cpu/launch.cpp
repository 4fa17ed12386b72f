// The CPU launchers. The path of a call, a forward pass of the LIF:
//
//   trtkern/ops/lif.py         has seen every tensor, and makes what the pass will write
//   trtkern/backends/cpu.py    fills a LifArgs by name (backends/_args.py; the fields: lif/fields.h)
//   cpu/bindings.cpp           the Python functions, which let go of Python's lock
//   cpu/launch.cpp (here)      cpu_lif_forward: the table of the instruction set in use (kernels), the neurons split
//                              over threads (Split), scratch memory for each, whether outputs bypass the caches
//   cpu/isa_avx512.cpp, ...    one translation unit an instruction set: the table Kernels of its functions
//                              (of a neuron of a user's own: one library a neuron, cpu/own_rows.h)
//   lif/cpu_forward.h          forward_blocks: a block of neurons at a time (block_at in cpu/rows.h) through all steps;
//                              forward_step: one step of it; ForwardRow: its whole spans of neurons, and the odd ends
//   trtkern_neurons.h          charge, fire and settle of each neuron, printed by the build from trtkern/neurons.py; F
//                              is a vector of cpu/simd.h
//
// Short sequences go through all steps a vector at a time instead: lif/cpu_short.h, ShortForward and ShortBackward.
//
// Backward, cpu_lif_backward: backward_blocks in lif/cpu_backward.h, a chunk of 16 steps at a time, the last first;
// recompute_chunk makes its h again, backward_step walks back through them (BackwardRow, then backward_run, which is
// compiled for each surrogate and case: backward_run_of), fired_back and charge_back of the neuron. Each thread adds up
// what belongs to the parameters for itself; it is put together here, in the order of the threads.
//
// What computes on packed spikes is launched by spike_conv/cpu_launch.cpp. The other launchers go the same way, to
// norm/cpu.h (statistics, gradient of the input), spikes/cpu.h (packing), delay/cpu.h and cpu/regularizer.h. What is
// done between the passes of a norm, channel by channel, is norm/cpu_finish.cpp.
#include "cpu/launch.h"

#if defined(TRTKERN_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>

#include "cpu/own.h"
#include "norm/cpu_finish.h"

namespace trtkern {
namespace {

constexpr int64_t kOneThread = 32768;       // elements up to which a parallel region costs more than it saves
constexpr int64_t kSumBytes = 256ll << 20;  // all threads' sums together
constexpr int64_t kLongColumn = 64;         // neighbours of one channel whose statistics are taken by themselves

#if defined(TRTKERN_AMX)
// Whether this process may use the tiles of AMX: a processor that has them, and a kernel that saves them.
bool amx_runs() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Those of AVX-512, and what computes on packed spikes in tiles.
const Kernels& amx_kernels() {
  static const SpikeConvKernels conv = [] {
    SpikeConvKernels made = kSpikeConvAvx512;
    made.forward[kTiles] = kTilesForward;
    made.weight_grad[kTiles] = kTilesWeightGrad;
    made.input_grad[kTiles] = kTilesInputGrad;
    return made;
  }();
  static const Kernels kernels = [] {
    Kernels made = kAvx512;
    made.name = "amx";
    made.spike_conv = &conv;
    return made;
  }();
  return kernels;
}
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(TRTKERN_AMX)
  if (avx512 && amx_runs()) found.push_back(&amx_kernels());
#endif
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#if defined(TRTKERN_CPU_WIDE)
  if (avx2) found.push_back(&kWide);
#endif
#endif
  found.push_back(&kBaseline);
  return found;
}

std::atomic<const Kernels*> in_use{nullptr};
std::atomic<int64_t> stream_from{4 << 20};  // bytes of an output

}  // namespace

const Kernels& cpu_kernels() {
  const Kernels* chosen = in_use.load(std::memory_order_relaxed);
  if (!chosen) in_use.store(chosen = runnable().front(), std::memory_order_relaxed);
  return *chosen;
}

char* cpu_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    capacity = 0;
    memory.reset(
        static_cast<char*>(std::aligned_alloc(kScratchPage, (bytes + kScratchPage - 1) / kScratchPage * kScratchPage)));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  return memory.get();
}

namespace {

float* scratch_memory(int64_t floats) { return reinterpret_cast<float*>(cpu_scratch(floats * sizeof(float))); }

// task(i) for i in [0, count), thread i taking task i.
void on_threads(int count, const std::function<void(int)>& task) {
  if (count == 1) return task(0);
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int i = 0; i < count; ++i) task(i);
}

// A range split evenly over threads, each share starting on a cache line of its own; with pooling, at a pair of rows.
struct Split {
  int64_t size, grain;
  int count;

  Split(int64_t size, int64_t grain, int64_t work, int most) : size(size), grain(grain) {
    const int64_t wanted = work <= kOneThread ? 1 : std::min<int64_t>(most, (size + grain - 1) / grain);
    count = static_cast<int>(std::max<int64_t>(1, wanted));
  }
  Split(const LifArgs& a, int most)
      : Split(a.N,
              a.pool_row    ? 2 * a.pool_row
              : a.N >= 4096 ? 64
                            : 16,
              a.T * a.N, most) {}
  int64_t begin(int i) const { return i == count ? size : size / grain * i / count * grain; }
};

// Whether outputs of so many bytes bypass the caches. They gain from 1 MiB on some processors, from 8 MiB on others.
bool is_large(int64_t bytes) { return bytes >= stream_from.load(std::memory_order_relaxed); }
int64_t element_bytes(const LifArgs& a) { return a.dtype == kFloat32 ? 4 : 2; }
bool is_large(const LifArgs& a) { return is_large(a.T * a.N * element_bytes(a)); }

// Blocks of neurons on all threads, forward scratch memory each.
template <class Run>
void on_neurons(const LifArgs& a, Run run) {
  const Split split(a, a.threads);
  float* scratch = scratch_memory(split.count * kForwardScratch);
  on_threads(split.count,
             [&](int i) { run(split.begin(i), split.begin(i + 1), scratch + i * kForwardScratch, is_large(a)); });
}

// run(a, begin, end) for neurons [begin, end); with lengths for one stretch of them after the other whose samples have
// as many steps, which is T of the `a` that it is given.
template <class Run>
void by_length(const LifArgs& a, int64_t begin, int64_t end, Run run) {
  if (!a.lengths) return run(a, begin, end);
  const int32_t* const lengths = reinterpret_cast<const int32_t*>(a.lengths);
  const auto steps_at = [&](int64_t n) { return std::clamp<int64_t>(lengths[n / a.sample], 0, a.T); };
  LifArgs part = a;
  while (begin < end) {
    int64_t to = begin;
    part.T = steps_at(begin);
    while (to < end && steps_at(to) == part.T) to = std::min(end, (to / a.sample + 1) * a.sample);
    run(part, begin, to);
    begin = to;
  }
}

// Zeros in rows [from, to) of a tensor [.., N] of `bytes` an element, for neurons [begin, end).
void clear_rows(uint64_t tensor, int64_t bytes, int64_t N, int64_t from, int64_t to, int64_t begin, int64_t end) {
  char* const at = reinterpret_cast<char*>(tensor);
  for (int64_t t = from; tensor && t < to; ++t) std::memset(at + (t * N + begin) * bytes, 0, (end - begin) * bytes);
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

std::string cpu_isa() { return cpu_kernels().name; }

std::string cpu_maker() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "";
}

void cpu_use_isa(const std::string& name) {
  std::string choices;
  for (const Kernels* k : runnable()) {
    if (name.empty() || name == k->name) return in_use.store(k);
    choices += (choices.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("TRTKERN_CPU_ISA: expected one of " + choices + " on this processor, got '" + name + "'");
}

void cpu_stream_from(int64_t bytes) { stream_from.store(bytes); }

void cpu_lif_forward(const LifArgs& a) {
  const auto forward = a.neuron < kOwnNeurons ? cpu_kernels().lif_forward : own_rows(a.neuron).lif_forward;
  on_neurons(a, [&](int64_t begin, int64_t end, float* scratch, bool streaming) {
    by_length(a, begin, end, [&](const LifArgs& part, int64_t from, int64_t to) {
      forward(part, from, to, scratch, streaming);
      const int64_t pooled = a.pool_row ? 4 : 1;
      clear_rows(a.s, element_bytes(a), a.N / pooled, part.T, a.T, from / pooled, to / pooled);
      clear_rows(a.v, element_bytes(a), a.N, part.T, a.T, from, to);
      clear_rows(a.packed, 1, a.N, (part.T + 7) / 8, (a.T + 7) / 8, from, to);
    });
  });
}

void cpu_lif_backward(const LifArgs& a, const NormArgs* norm) {
  const auto backward = a.neuron < kOwnNeurons ? cpu_kernels().lif_backward : own_rows(a.neuron).lif_backward;
  const int64_t cells = a.gparams || a.norm_sums ? kSums * a.C : 0;
  const int64_t affordable = cells ? std::max<int64_t>(1, kSumBytes / (8 * cells)) : a.threads;
  const Split split(a, static_cast<int>(std::min<int64_t>(a.threads, affordable)));
  float* scratch = scratch_memory(split.count * kBackwardScratch);
  std::vector<double> totals(split.count * cells);
  on_threads(split.count, [&](int i) {
    double* mine = cells ? totals.data() + i * cells : nullptr;
    by_length(a, split.begin(i), split.begin(i + 1), [&](const LifArgs& part, int64_t from, int64_t to) {
      backward(part, from, to, scratch + i * kBackwardScratch, is_large(a), mine);
      clear_rows(a.gx, element_bytes(a), a.N, part.T, a.T, from, to);
    });
  });
  const int64_t params = a.P * a.C;
  for (int64_t c = 0; c < cells; ++c) {  // in the order of the threads: repeatable at an equal count of them
    double total = 0.0;
    for (int i = 0; i < split.count; ++i) total += totals[i * cells + c];
    const int64_t norm = c - kMostParams * a.C;
    if (norm >= 0 && a.norm_sums) reinterpret_cast<double*>(a.norm_sums)[norm] = total;
    if (c < params && a.gparams) reinterpret_cast<float*>(a.gparams)[c] = static_cast<float>(total);
  }
  if (norm) cpu_finish_backward(*norm);
}

namespace {

// Mean and sum of squared deviations of n more numbers into those of `count`: how many there are then.
double merge(double count, double* mean, double* m2, double n, double other_mean, double other_m2) {
  if (n == 0.0) return count;
  const double all = count + n, delta = other_mean - *mean;
  *mean += delta * (n / all);
  *m2 += other_m2 + delta * delta * (count * n / all);
  return all;
}

// Channels that are long: each thread takes elements as they lie, and keeps the moments of every channel.
void run_statistics(const LifArgs& a, double* stats) {
  const Kernels& k = cpu_kernels();
  const int64_t cells = 3 * a.C;
  const int most = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.threads, kSumBytes / (8 * cells))));
  const Split split(a.T * a.N, 1024, a.T * a.N, most);
  std::vector<double> moments(split.count * cells);
  on_threads(split.count, [&](int i) { k.run_moments(a, split.begin(i), split.begin(i + 1), &moments[i * cells]); });
  for (int64_t c = 0; c < a.C; ++c) {
    double count = 0.0;
    stats[c] = stats[a.C + c] = 0.0;
    for (int i = 0; i < split.count; ++i) {
      const double* m = &moments[i * cells + c];
      count = merge(count, &stats[c], &stats[a.C + c], m[0], m[a.C], m[2 * a.C]);
    }
  }
}

// Channels that are short: [rows, K] with a column for each of the C * inner neurons of an image. Each thread takes
// some rows, or some columns where there are few rows.
void column_statistics(const LifArgs& a, double* stats) {
  const Kernels& k = cpu_kernels();
  const int64_t K = a.C * a.inner, rows = a.T * a.N / K;
  const bool by_rows = rows / kRowTile >= std::min<int64_t>(a.threads, kSumBytes / (16 * K));
  const Split split(by_rows ? rows : K, by_rows ? kRowTile : 64, a.T * a.N, a.threads);
  const int64_t cells = 2 * K, shift = by_rows ? cells : 0;
  float* scratch = scratch_memory(split.count * kColumnScratch);
  std::vector<double> moments(by_rows ? split.count * cells : cells);
  on_threads(split.count, [&](int i) {
    const int64_t from = split.begin(i), to = split.begin(i + 1);
    float* mine = scratch + i * kColumnScratch;
    if (by_rows) {
      k.column_moments(a, from, to, 0, K, mine, &moments[i * shift]);
    } else {
      k.column_moments(a, 0, rows, from, to, mine, &moments[0]);
    }
  });
  for (int64_t c = 0; c < a.C; ++c) {
    double count = 0.0;
    stats[c] = stats[a.C + c] = 0.0;
    for (int i = 0; i < (by_rows ? split.count : 1); ++i) {
      const double n = static_cast<double>(by_rows ? split.begin(i + 1) - split.begin(i) : rows);
      for (int64_t j = c * a.inner; j < (c + 1) * a.inner; ++j) {
        const double* m = &moments[i * shift + j];
        count = merge(count, &stats[c], &stats[a.C + c], n, m[0], m[K]);
      }
    }
  }
}

}  // namespace

void cpu_batch_norm_lif_statistics(const LifArgs& a, uint64_t stats) {
  (a.C == 1 || a.inner >= kLongColumn ? run_statistics : column_statistics)(a, reinterpret_cast<double*>(stats));
}

void cpu_batch_norm_lif_affine(const LifArgs& a, const NormArgs& norm) {
  std::vector<double> stats(2 * a.C);
  NormArgs n = norm;
  n.mean = reinterpret_cast<uint64_t>(stats.data()), n.spread = reinterpret_cast<uint64_t>(stats.data() + a.C);
  n.source = kFloat64, n.values = a.T * a.N / a.C;
  cpu_batch_norm_lif_statistics(a, n.mean);
  cpu_finish_forward(n);
}

void cpu_batch_norm_lif_input_grad(const LifArgs& a) {
  on_neurons(a, [&](auto... part) { cpu_kernels().input_grad(a, part...); });
}

void cpu_spikes_pack(const LifArgs& a) {
  on_neurons(a, [&](auto... part) { cpu_kernels().spikes_pack(a, part...); });
}

void cpu_spikes_unpack(const LifArgs& a, int64_t first) {
  on_neurons(a, [&](auto... part) { cpu_kernels().spikes_unpack(a, first, part...); });
}

namespace {

constexpr int64_t kDelayNeurons = 128, kFewestDelayed = 16;
constexpr int64_t kDelayRing = 16384;  // floats of a ring, where that does not make the neurons too few

DelayPlan delay_plan(const DelayArgs& a) {
  DelayPlan plan{kDelayNeurons, 1};
  while (plan.ring <= a.most) plan.ring *= 2;
  while (plan.neurons > kFewestDelayed && plan.neurons * plan.ring > kDelayRing) plan.neurons /= 2;
  return plan;
}

// run(begin, end, scratch, streaming) for the neurons of all threads.
template <class Run>
void on_delays(const DelayArgs& a, const DelayPlan& plan, Run run) {
  const Split split(a.N, a.N >= 4096 ? 64 : 16, a.T * a.N, a.threads);
  const int64_t each = plan.neurons * (plan.ring + 9);  // DelayBlock
  float* scratch = scratch_memory(split.count * each);
  const bool streaming = is_large(a.T * a.N * (a.dtype == kFloat32 ? 4 : 2));
  on_threads(split.count, [&](int i) { run(split.begin(i), split.begin(i + 1), scratch + i * each, streaming); });
}

}  // namespace

void cpu_delay_forward(const DelayArgs& a) {
  const DelayPlan plan = delay_plan(a);
  on_delays(a, plan, [&](auto... part) { cpu_kernels().delay->forward(a, plan, part...); });
}

void cpu_delay_backward(const DelayArgs& a) {
  const DelayPlan plan = delay_plan(a);
  std::vector<double> sums(a.gdelays ? a.N : 0), totals(a.gdelays ? a.C : 0);
  on_delays(a, plan,
            [&](auto... part) { cpu_kernels().delay->backward(a, plan, part..., a.gdelays ? sums.data() : nullptr); });
  for (int64_t n = 0; n < static_cast<int64_t>(sums.size());)  // in the order of the neurons
    for (int64_t c = 0; c < a.C; ++c)
      for (int64_t i = 0; i < a.inner; ++i) totals[c] += sums[n++];
  for (size_t c = 0; c < totals.size(); ++c) reinterpret_cast<float*>(a.gdelays)[c] = static_cast<float>(totals[c]);
}

double cpu_regularizer(const RegularizerList& list) {
  const Kernels& k = cpu_kernels();
  const auto finite = [](double value) { return static_cast<float>(std::min<double>(value, FLT_MAX)); };
  const int64_t T = list.timesteps;
  std::vector<float> slope(T), offset(T), root(T);
  // Beyond float's range of c, |w| is scaled up and c down, so that 1 / d still goes to 0 smoothly.
  const double shift = std::expm1(list.delta * (T - 1)) > 1e30 ? 0x1p64 : 1.0;
  for (int64_t t = 0; t < T; ++t) {
    const double c = std::min(std::expm1(list.delta * t), 1e300), divisor = std::sqrt(1.0 + c * list.eps);
    slope[t] = finite(c / divisor / shift);
    offset[t] = finite(divisor);
    root[t] = static_cast<float>(1.0 / divisor);
  }
  const double factor = list.lam / static_cast<double>(T);
  const RegularizerArgs args = {
      slope.data(),   offset.data(), root.data(), static_cast<float>(shift), static_cast<float>(factor * list.scale), T,
      list.accumulate};
  struct Piece {
    const float* w;
    float* g;
    int64_t n;
    bool streaming;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (const int64_t size : list.sizes) total += size;
  for (size_t i = 0; i < list.sizes.size(); ++i) {
    const float* w = reinterpret_cast<const float*>(list.weights[i]);
    float* g = list.grads.empty() ? nullptr : reinterpret_cast<float*>(list.grads[i]);
    const bool streaming = g && !list.accumulate && is_large(total * 4) && list.grads[i] % 64 == 0;
    for (int64_t at = 0; at < list.sizes[i]; at += kPiece)
      pieces.push_back({w + at, g ? g + at : nullptr, std::min(kPiece, list.sizes[i] - at), streaming});
  }
  std::vector<double> values(pieces.size());
  const int64_t count = static_cast<int64_t>(pieces.size());
  const auto run = [&](int64_t i) {
    values[i] = k.regularizer(args, pieces[i].w, pieces[i].g, pieces[i].n, pieces[i].streaming);
  };
  const int threads = total <= kOneThread ? 1 : static_cast<int>(std::min<int64_t>(list.threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) run(i);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < count; ++i) run(i);
  }
  double value = 0.0;  // in the order of the pieces: the same for any number of threads
  for (const double v : values) value += v;
  return value * factor;
}

}  // namespace trtkern
