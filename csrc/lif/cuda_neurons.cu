// The kernels of the neurons of the table that are not LIF (lif/cuda_neurons.h): of each one forward, and two backward,
// with the sums of the parameters' gradients and without.
#include "lif/cuda_kernels.h"

namespace trtkern {
namespace cuda {

template <class Kernel>
__global__ void __launch_bounds__(index::kThreads, kBlocks) neuron_forward(const __grid_constant__ LifArgs a) {
  extern __shared__ uint32_t shared[];
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, 1);
  if (n >= (a.pool_row != 0 ? a.N / 4 : a.N)) return;
  const Words words{shared + threadIdx.x, index::kThreads};
  if (!forward_neuron<Kernel>(a, n, words) && a.flag != 0) *reinterpret_cast<int*>(a.flag) = 1;
}

template <class Kernel, bool LEARN>
__global__ void __launch_bounds__(index::kThreads, kBlocks)
    neuron_backward(const __grid_constant__ LifArgs a, const __grid_constant__ index::Tiles t, int rows) {
  extern __shared__ uint32_t shared[];
  const Slots<Kernel> slots(shared + threadIdx.x, index::kThreads, Slots<Kernel>::more_rows(a));
  const int64_t n =
      t.groups != 0 ? t.first_neuron(blockIdx.x, threadIdx.x, 0) : index::first_neuron(blockIdx.x, threadIdx.x, 1);
  clear_sums(a, slots);
  if (n < a.N) backward_neuron<LEARN>(a, n, slots);
  leave_sums(a, t, rows, slots, n, shared);
}

void start_forward_neurons(const LifArgs& a) {
  choose_neuron(a, [&a](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t blocks = index::blocks(a.pool_row != 0 ? a.N / 4 : a.N, 1);
    launch(a, neuron_forward<Kernel>, blocks, index::kThreads, shared_bytes<Float32>(a, false), a);
  });
}

void start_backward_neurons(const LifArgs& a) {
  choose_neuron(a, [&a](auto kernel) {
    using Kernel = decltype(kernel);
    start_fused_backward<Kernel>(a, a.gparams != 0 ? neuron_backward<Kernel, true> : neuron_backward<Kernel, false>);
  });
}

}  // namespace cuda
}  // namespace trtkern
