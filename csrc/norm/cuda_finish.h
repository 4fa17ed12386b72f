// What a thread does between the passes of a BatchNorm + neuron (norm/finish.h), and the numbers of any type that it is
// over. Include after a dialect; g++ compiles it too (tests/test_cuda_threads.py).
#pragma once
#include "norm/args.h"

namespace trtkern {
namespace cuda {

TK_INLINE double load_number(uint64_t base, int64_t element, int type) {
  if (type == kFloat32) return static_cast<double>(load_float(base, element));
  if (type == kFloat64) return load_double(base, element);
  const uint32_t word = load_short(base, element);
  return widen(type == kBFloat16 ? BFloat16::unpack(word, 0) : Float16::unpack(word, 0));
}
TK_INLINE void store_number(uint64_t base, int64_t element, int type, double value) {
  if (type == kFloat64) return store_double(base, element, value);
  const float narrow = static_cast<float>(value);
  if (type == kFloat32) return store_float(base, element, narrow);
  const uint32_t word = type == kBFloat16 ? BFloat16::pack(narrow, narrow) : Float16::pack(narrow, narrow);
  write<2>(base + 2 * element, &word);
}

}  // namespace cuda
}  // namespace trtkern

#include "norm/finish.h"

namespace trtkern {
namespace cuda {

// Whether running statistics move at all.
TK_INLINE bool moves(const NormArgs& n) { return n.running_mean != 0 && n.count != 0; }

// Of channels `thread`, thread + threads, ...: whether all statistics are finite.
TK_INLINE bool all_finite(const NormArgs& n, int thread, int threads) {
  bool finite = true;
  for (int64_t c = thread; c < n.C; c += threads) finite = finite && channel_statistics(n, c).finite();
  return finite;
}

TK_INLINE void move_all(const NormArgs& n, int thread, int threads, int64_t batches) {
  for (int64_t c = thread; c < n.C; c += threads) move_running(n, c, channel_statistics(n, c), batches);
}

// Channel c from the sums of both rows, n.sums.
TK_INLINE void finish_sums(const NormArgs& n, int64_t c) {
  finish_backward(n, c, load_double(n.sums, c), load_double(n.sums, n.C + c));
}

}  // namespace cuda
}  // namespace trtkern
