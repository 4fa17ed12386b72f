// The libraries of neurons that were compiled at first use, by the numbers that LifArgs::neuron has for them.
#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <stdexcept>

#include "cpu/own.h"
#include "cpu/launch.h"

namespace trtkern {
namespace {

constexpr int kMostLibraries = 4096;
std::atomic<const OwnRows*> libraries[kMostLibraries];

}  // namespace

const OwnRows& own_rows(int neuron) { return *libraries[neuron - kOwnNeurons].load(std::memory_order_acquire); }

int cpu_load_rows(const std::string& path) {
  static std::mutex one_at_a_time;
  static int count = 0;
  const std::lock_guard<std::mutex> held(one_at_a_time);
  if (count == kMostLibraries) throw std::runtime_error("no room for more neurons in this process");
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const void* const found = library ? dlsym(library, "trtkern_own_rows") : nullptr;
  if (!found) throw std::runtime_error(dlerror());
  const OwnRows& rows = *static_cast<const OwnRows*>(found);
  if (rows.size != sizeof(OwnRows) || rows.args != sizeof(LifArgs) || rows.forward_scratch != kForwardScratch ||
      rows.backward_scratch != kBackwardScratch || rows.recurrent_args != sizeof(RecurrentArgs))
    throw std::runtime_error("trtkern._cpu was built from other headers than lie in csrc; install trtkern again");
  libraries[count].store(&rows, std::memory_order_release);
  return kOwnNeurons + count++;
}

}  // namespace trtkern
