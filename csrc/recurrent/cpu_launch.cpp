// The launchers of neurons that feed each other: the weights are laid out once, then groups of samples go through
// all steps on all threads.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/own.h"
#include "cpu/launch.h"
#include "recurrent/args.h"

namespace trtkern {
namespace {

constexpr int64_t kLeastTiles = 32;  // neurons from which tiles are filled

// Those of the instruction set in use for the neurons that are built in.
RecurrentKernels built_in() {
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

// The same with the functions of the neuron.
RecurrentKernels kernels_of(int neuron) {
  RecurrentKernels made = built_in();
  if (neuron < kOwnNeurons) return made;
  const OwnRows& own = own_rows(neuron);
  made.own = own.recurrent_own, made.forward = own.recurrent_forward, made.backward = own.recurrent_backward;
  return made;
}

constexpr int64_t kHugePage = 2 << 20;

int64_t whole_pages(int64_t bytes, int64_t page) { return (bytes + page - 1) / page * page; }

// Scratch memory that begins at a huge page, where the system has those: the weights are most of the L2 cache, and
// single pages of them would push each other out.
char* in_huge_pages(int64_t bytes) {
  char* const memory = cpu_scratch(bytes + kHugePage);
  char* const first = memory + (-reinterpret_cast<uintptr_t>(memory) & (kHugePage - 1));
#if defined(MADV_HUGEPAGE)
  madvise(first, whole_pages(bytes, kScratchPage) / kHugePage * kHugePage, MADV_HUGEPAGE);  // else nothing is lost
#endif
  return first;
}

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

// Lays the weights out and runs the groups: run(kernels, first unit, units, memory).
template <class Run>
void on_groups(const RecurrentArgs& a, bool back, Run run) {
  const RecurrentKernels k = kernels_of(a.lif.neuron);
  const int threads = std::max(1, a.lif.threads);
  const int64_t units = std::clamp<int64_t>(a.units / threads, 1, kMostUnits);
  const int64_t groups = (a.units + units - 1) / units, team = std::min<int64_t>(groups, threads);
  const bool tiles = back && k.tiles.lay && a.width >= kLeastTiles;
  const RecurrentProduct* product = tiles ? &k.tiles : &k.vectors;
  const int64_t shared = whole_pages(std::max(k.vectors.bytes(a.width), tiles ? k.tiles.bytes(a.width) : 0), kHugePage);
  const int64_t scratch = std::max(k.vectors.own(a.width, units), tiles ? k.tiles.own(a.width, units) : 0);
  const int64_t own = whole_pages(k.own(a, back, units) + scratch, kScratchPage);
  char* const memory = in_huge_pages(shared + team * own);
  int nonfinite = 0;
  const auto lay = [&] {
    on_team(product->items(a.width), threads, [&](int64_t i, int) { product->lay(a, back, i, memory, &nonfinite); });
  };
  lay();
  if (nonfinite && tiles) product = &k.vectors, lay();
  on_team(groups, threads, [&](int64_t i, int thread) {
    run(k, i * units, units, RecurrentMemory{product, memory, !nonfinite, memory + shared + thread * own});
  });
}

}  // namespace

void cpu_recurrent_forward(const RecurrentArgs& a) {
  on_groups(a, false, [&](const RecurrentKernels& k, auto... group) { k.forward(a, group...); });
}

void cpu_recurrent_backward(const RecurrentArgs& a) {
  const int64_t cells = a.lif.gparams ? a.lif.P * a.lif.C : 0;
  std::vector<double> sums(a.units * cells);
  on_groups(a, true, [&](const RecurrentKernels& k, auto... group) { k.backward(a, group..., sums.data()); });
  for (int64_t c = 0; c < cells; ++c) {  // in the order of the units
    double total = 0.0;
    for (int64_t i = 0; i < a.units; ++i) total += sums[i * cells + c];
    reinterpret_cast<float*>(a.lif.gparams)[c] = static_cast<float>(total);
  }
}

}  // namespace trtkern
