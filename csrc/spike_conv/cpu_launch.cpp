#include "spike_conv/cpu_launch.h"

#include <omp.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace trtkern {
namespace {

int64_t whole_pages(int64_t bytes) { return (bytes + kScratchPage - 1) / kScratchPage * kScratchPage; }

SpikePlan plan_of(const SpikeConvArgs& a, SpikePass pass) {
  if (a.kernel < 0 || a.kernel >= kSpikeKernels) throw std::invalid_argument("spike_conv: no kernel of that number");
  const SpikeConvKernels* kernels = cpu_kernels().spike_conv;
  if (!kernels) return {};
  const SpikePlanner* of_pass[] = {kernels->forward, kernels->weight_grad, kernels->input_grad};
  const SpikePlanner planner = of_pass[pass][a.kernel];
  return planner ? planner(a) : SpikePlan{};
}

bool run(const SpikeConvArgs& a, SpikePass pass) {
  const SpikePlan plan = plan_of(a, pass);
  if (!plan.phases)
    throw std::invalid_argument(std::string("spike_conv: ") + kSpikeKernelNames[a.kernel] +
                                " does not take these sizes with " + cpu_isa());
  const int threads = a.threads < 1 ? 1 : a.threads;
  const int64_t shared = whole_pages(plan.shared), own = whole_pages(plan.own);
  char* memory = cpu_scratch(shared + threads * own);
  int nonfinite = 0;
  for (int64_t phase = 0; phase < plan.phases; ++phase) {
    const int64_t items = plan.items(a, phase);
    const int team = static_cast<int>(items < threads ? items : threads);
    if (team <= 1) {
      for (int64_t i = 0; i < items; ++i) plan.run(a, phase, i, {memory, memory + shared, &nonfinite});
      continue;
    }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t i = 0; i < items; ++i)
      plan.run(a, phase, i, {memory, memory + shared + omp_get_thread_num() * own, &nonfinite});
  }
  return !nonfinite;
}

}  // namespace

bool cpu_spike_conv_takes(const SpikeConvArgs& a, SpikePass pass) { return plan_of(a, pass).phases > 0; }
bool cpu_spike_conv_forward(const SpikeConvArgs& a) { return run(a, kForwardPass); }
bool cpu_spike_conv_weight_grad(const SpikeConvArgs& a) { return run(a, kWeightGradPass); }
bool cpu_spike_conv_input_grad(const SpikeConvArgs& a) { return run(a, kInputGradPass); }

int64_t cpu_spikes_count(uint64_t words, int64_t bytes, int threads) {
  const auto* from = reinterpret_cast<const uint8_t*>(words);
  int64_t count = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : count) if (bytes > 1 << 20)
  for (int64_t i = 0; i < bytes / 8; ++i) {
    uint64_t eight;
    __builtin_memcpy(&eight, from + 8 * i, 8);
    count += __builtin_popcountll(eight);
  }
  for (int64_t i = bytes / 8 * 8; i < bytes; ++i) count += __builtin_popcount(from[i]);
  return count;
}

bool cpu_all_spikes(uint64_t x, int64_t n, int threads) {
  constexpr int64_t kRun = 4096;
  constexpr uint32_t kOne = 0x3f800000, kMinusZero = 0x80000000;
  const auto* bits = reinterpret_cast<const uint32_t*>(x);
  int others = 0;
#pragma omp parallel for num_threads(threads) reduction(| : others) if (n > 1 << 18)
  for (int64_t run = 0; run < n; run += kRun) {
    if (others) continue;
    const int64_t end = run + kRun < n ? run + kRun : n;
    uint32_t found = 0;
    for (int64_t i = run; i < end; ++i) found |= (bits[i] & ~kMinusZero) != 0 && bits[i] != kOne;
    others |= static_cast<int>(found);
  }
  return !others;
}

}  // namespace trtkern
