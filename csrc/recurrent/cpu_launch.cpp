// The launchers of neurons that feed each other: the weights are laid out once, then blocks of samples go through all
// steps on all threads.
#include <omp.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/launch.h"
#include "recurrent/args.h"

namespace trtkern {
namespace {

constexpr int64_t kLeastTiles = 32;  // neurons from which tiles are filled

// Those of the instruction set in use.
RecurrentKernels kernels() {
  const std::string isa = cpu_isa();
#if defined(__x86_64__)
#if defined(TRTKERN_AMX)
  if (isa == "amx") {
    RecurrentKernels made = kRecurrentAvx512;
    made.tiles = kRecurrentTiles;
    return made;
  }
#endif
  if (isa == "avx512") return kRecurrentAvx512;
  if (isa == "avx2") return kRecurrentAvx2;
#endif
#if defined(TRTKERN_CPU_WIDE)
  if (isa == "wide") return kRecurrentWide;
#endif
  return kRecurrentBaseline;
}

int64_t whole_pages(int64_t bytes) { return (bytes + kScratchPage - 1) / kScratchPage * kScratchPage; }

// task(i, thread) for i in [0, count).
template <class Task>
void on_team(int64_t count, int threads, Task task) {
  const int team = static_cast<int>(std::min<int64_t>(count, std::max(1, threads)));
  if (team <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) task(i, omp_get_thread_num());
}

// Lays the weights out and runs the blocks: run(kernels, block, memory).
template <class Run>
void on_blocks(const RecurrentArgs& a, bool back, Run run) {
  const RecurrentKernels k = kernels();
  const int threads = std::max(1, a.lif.threads);
  const int64_t blocks = a.blocks, team = std::min<int64_t>(blocks, threads);
  const bool tiles = k.tiles.lay && a.width >= kLeastTiles;
  const RecurrentProduct* product = tiles ? &k.tiles : &k.vectors;
  const auto larger = [&](int64_t (*of)(int64_t), int64_t (*of_tiles)(int64_t)) {
    return std::max(of(a.width), tiles ? of_tiles(a.width) : 0);
  };
  const int64_t shared = whole_pages(larger(k.vectors.bytes, k.tiles.bytes));
  const int64_t own = whole_pages(k.own(a, back) + larger(k.vectors.own, k.tiles.own));
  char* const memory = cpu_scratch(shared + team * own);
  int nonfinite = 0;
  const auto lay = [&] {
    on_team(product->items(a.width), threads, [&](int64_t i, int) { product->lay(a, back, i, memory, &nonfinite); });
  };
  lay();
  if (nonfinite && tiles) product = &k.vectors, lay();
  on_team(blocks, threads, [&](int64_t i, int thread) {
    run(k, i, RecurrentMemory{product, memory, !nonfinite, memory + shared + thread * own});
  });
}

}  // namespace

void cpu_recurrent_forward(const RecurrentArgs& a) {
  on_blocks(a, false, [&](const RecurrentKernels& k, int64_t block, const RecurrentMemory& memory) {
    k.forward(a, block, memory);
  });
}

void cpu_recurrent_backward(const RecurrentArgs& a) {
  const int64_t cells = a.lif.gparams ? a.lif.P * a.lif.C : 0;
  std::vector<double> sums(a.blocks * cells);
  on_blocks(a, true, [&](const RecurrentKernels& k, int64_t block, const RecurrentMemory& memory) {
    k.backward(a, block, memory, cells ? sums.data() + block * cells : nullptr);
  });
  for (int64_t c = 0; c < cells; ++c) {  // in the order of the blocks
    double total = 0.0;
    for (int64_t i = 0; i < a.blocks; ++i) total += sums[i * cells + c];
    reinterpret_cast<float*>(a.lif.gparams)[c] = static_cast<float>(total);
  }
}

}  // namespace trtkern
