// The CPU launchers: pick the instruction set, split the work over threads, own the scratch memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "delay/args.h"
#include "norm/args.h"

namespace trtkern {

std::vector<std::string> cpu_isas();        // what this processor runs, best first
std::string cpu_isa();                      // the one in use
std::string cpu_maker();                    // "amd", "intel", or "" for others
void cpu_use_isa(const std::string& name);  // "": the best; std::invalid_argument for one that does not run here
// Memory for one launch, aligned to a page; kept by the calling thread, since fresh pages cost more than a launch.
constexpr int64_t kScratchPage = 4096;
char* cpu_scratch(int64_t bytes);
// The number by which LifArgs::neuron has the neuron of that library (cpu/own_rows.h); std::runtime_error where it does
// not load.
int cpu_load_rows(const std::string& path);
void cpu_stream_from(int64_t bytes);  // outputs from this size on bypass the caches (default 4 MiB)

// Writes s, v, v_final, edges, packed and flag, each unless its address is 0.
void cpu_lif_forward(const LifArgs& args);
// Writes gx, gv0, gparams ([6, C] float32) and norm_sums, each unless its address is 0.
// With `norm` also what that asks for, from the sums of the norm (norm/cpu_finish.h).
void cpu_lif_backward(const LifArgs& args, const NormArgs* norm);

// Of x [T, N]: stats, double [2, C], is the mean of each channel and the sum of squared deviations from it.
void cpu_batch_norm_lif_statistics(const LifArgs& args, uint64_t stats);
// The same, finished at once (norm/cpu_finish.h): of `norm`, mean and spread are not read.
void cpu_batch_norm_lif_affine(const LifArgs& args, const NormArgs& norm);
// gx = coef[0] * gs + coef[1] * (x - center) + coef[2], gs being the gradient of the input current.
void cpu_batch_norm_lif_input_grad(const LifArgs& args);
// packed from s [T, N]: bit = s is not 0.
void cpu_spikes_pack(const LifArgs& args);
// s, T steps from `first` on, from packed; with pool_row their averages.
void cpu_spikes_unpack(const LifArgs& args, int64_t first);

// out from x and v0.
void cpu_delay_forward(const DelayArgs& args);
// gx, gv0 and gdelays from g (gdelays with x and v0), each unless its address is 0; the same for any number of threads.
void cpu_delay_backward(const DelayArgs& args);

// A list of float32 tensors as addresses and lengths; grads is empty or has an address each.
struct RegularizerList {
  std::vector<uint64_t> weights, grads;
  std::vector<int64_t> sizes;
  int64_t timesteps = 1;
  double lam = 0, delta = 0, eps = 0, scale = 1;
  bool accumulate = false;
  int threads = 1;
};
// (lam / T) sum_t sum_w w^2 / (1 + (e^(delta t) - 1) (|w| + eps)); writes or adds scale times its gradient.
double cpu_regularizer(const RegularizerList& list);

}  // namespace trtkern
