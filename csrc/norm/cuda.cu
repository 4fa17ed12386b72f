// The kernels of BatchNorm + LIF that are not LIF's: statistics and what they are finished into, the coefficients of
// the input's gradient from sums that are known, and that gradient where there is a residual. Two launches make the
// three numbers a channel of x (batch_norm_lif_affine): `statistics` leaves a block's, then a block a channel merges
// them and finishes the channel (norm/finish.h), and the last of these blocks, which sees all channels, moves the
// running statistics.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/dialect.h"

#include "lif/cuda_body.h"

#include "norm/cuda_body.h"
#include "norm/cuda_finish.h"
#include "cuda/device.h"
#include "cuda/last_block.h"

namespace trtkern {
namespace cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kFinishThreads = 256;  // of the block that finishes statistics that are known

// The sum of what all threads of a block of the statistics have, in a fixed order.
__device__ float block_sum(float value) {
  constexpr int kWarps = kStatisticsThreads / 32;
  __shared__ float warps[kWarps];
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAll, value, lane);
  __syncthreads();  // the sum before was read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp];
  return sum;
}

template <int V>
__device__ void leave(uint32_t* words, const Real (&sum)[V]) {
  TK_UNROLL
  for (int j = 0; j < V; ++j) words[j * kStatisticsThreads + threadIdx.x] = Float32::pack(sum[j], sum[j]);
}

template <class E, int V>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics(const __grid_constant__ LifArgs a, const __grid_constant__ index::Tiles t) {
  __shared__ uint32_t words[2][V * kStatisticsThreads];
  __shared__ float means[V > 1 ? 8 * V : index::kReduceLanes];
  clear_counters(a.counters, 1);
  Sample<E, V> own;
  own.load(a, t, blockIdx.x, threadIdx.x);
  Real sum[V], squares[V], mean[V];
  own.add_up(t.lanes, sum);
  const int64_t segment = t.segment(blockIdx.x);
  const double count = static_cast<double>(t.count(segment));
  const float share = 1.0f / static_cast<float>(count);
  if (t.outputs() == 1) {
    const Real near = block_sum(sum[0].value) * share;
    TK_UNROLL
    for (int j = 0; j < V; ++j) mean[j] = near;
    own.deviations(1, mean, sum, squares);
    const float all = block_sum(sum[0].value), all_squares = block_sum(squares[0].value);
    if (threadIdx.x == 0) store_moments(a, t, blockIdx.x, 0, moments_about(count, near, all, all_squares));
    return;
  }
  leave(words[0], sum);
  __syncthreads();
  const int o = threadIdx.x, first = (threadIdx.x & ((1 << t.shift) - 1)) * t.lanes;
  if (o < t.outputs()) means[o] = column_sum(t, words[0], o).value * share;
  __syncthreads();
  TK_UNROLL
  for (int j = 0; j < V; ++j) mean[j] = means[first + (t.lanes == 1 ? 0 : j)];
  own.deviations(t.lanes, mean, sum, squares);
  leave(words[0], sum);
  leave(words[1], squares);
  __syncthreads();
  if (o >= t.outputs()) return;
  const Moments found = moments_about(count, means[o], column_sum(t, words[0], o), column_sum(t, words[1], o));
  store_moments(a, t, blockIdx.x, o, found);
}

// Moves the running statistics of all channels, by one block, unless a statistic is not finite.
__device__ void move_all(const NormArgs& n) {
  if (!__syncthreads_and(all_finite(n, threadIdx.x, blockDim.x))) return;
  auto* const counted = reinterpret_cast<long long*>(n.batches);
  const long long batches = *counted + 1;
  __syncthreads();  // all have read it
  if (threadIdx.x == 0) *counted = batches;
  move_all(n, threadIdx.x, blockDim.x, batches);
}

// One block a channel: its threads' shares of the segments, then those in pairs, always the same ones. Of a norm that
// is finished the channel's numbers besides.
__global__ void __launch_bounds__(kMergeThreads)
    finish_statistics(const __grid_constant__ LifArgs a, const __grid_constant__ index::Tiles t,
                      const __grid_constant__ NormArgs n) {
  __shared__ double shares[3][kMergeThreads];
  Moments own = merge_segments(a, t, blockIdx.x, threadIdx.x);
  TK_ROLLED
  for (int half = kMergeThreads / 2; half > 0; half /= 2) {
    shares[0][threadIdx.x] = own.count, shares[1][threadIdx.x] = own.mean, shares[2][threadIdx.x] = own.squares;
    __syncthreads();
    const int other = threadIdx.x + half;
    if (threadIdx.x < half) own.merge({shares[0][other], shares[1][other], shares[2][other]});
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    store_double(n.mean, blockIdx.x, own.mean);
    store_double(n.spread, blockIdx.x, own.squares);
    if (n.affine != 0) finish_forward(n, blockIdx.x, channel_statistics(n, blockIdx.x));
  }
  if (moves(n) && last_block(a.counters, 0, gridDim.x)) move_all(n);
}

// The same from statistics that are known: one block, for it has to see all channels before it moves one.
__global__ void __launch_bounds__(kFinishThreads) finish_known(const __grid_constant__ NormArgs n) {
  for (int64_t c = threadIdx.x; c < n.C; c += kFinishThreads) finish_forward(n, c, channel_statistics(n, c));
  if (moves(n)) move_all(n);
}

__global__ void __launch_bounds__(index::kThreads) coefficients(const __grid_constant__ NormArgs n) {
  const int64_t c = index::first_neuron(blockIdx.x, threadIdx.x, 1);
  if (c < n.C) finish_sums(n, c);
}

template <class E, int V>
__global__ void __launch_bounds__(index::kThreads) input_grad(const __grid_constant__ LifArgs a) {
  const int64_t n = index::first_neuron(blockIdx.x, threadIdx.x, V);
  if (n < a.N) input_grad_thread<E, V>(a, n);
}

namespace {

// Calls run(E, V) for the element type, V being 1 or what 16 bytes hold.
template <class Run>
void with_type(const LifArgs& a, int vec, const Run& run) {
  const auto chosen = [vec, &run](auto e) {
    constexpr int kWide = 16 / decltype(e)::kBytes;
    vec == 1 ? run(e, std::integral_constant<int, 1>()) : run(e, std::integral_constant<int, kWide>());
  };
  if (a.dtype == kFloat32) chosen(Float32());
  if (a.dtype == kBFloat16) chosen(BFloat16());
  if (a.dtype == kFloat16) chosen(Float16());
}

// The statistics of x, merged into n.mean and n.spread, and finished where n has more.
int start_statistics(const LifArgs& given, const NormArgs& n) {
  LifArgs a = given;
  if (!valid(a) || a.workspace == 0 || a.workspace % 16 != 0) return cudaErrorInvalidValue;
  const index::Tiles t = statistics_tiles(a);
  if (t.blocks() > index::kMaxBlocks || t.C() > index::kMaxBlocks) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  a.counters = known_statistics(a, t) + 16 * t.C();
  with_type(a, t.vec, [&](auto e, auto v) {
    launch(a, statistics<decltype(e), v.value>, t.blocks(), kStatisticsThreads, 0, a, t);
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  launch(a, finish_statistics, t.C(), kMergeThreads, 0, a, t, n);
  return cudaGetLastError();
}

}  // namespace

int64_t statistics_workspace_floats(const LifArgs& a) {
  const index::Tiles t = statistics_tiles(a);
  return 4 * t.segments() * t.C() + 4 * t.C() + 2;
}

int batch_norm_lif_statistics(const LifArgs& a, uint64_t stats) {
  if (stats == 0) return cudaErrorInvalidValue;
  NormArgs n;
  n.mean = stats, n.spread = stats + 8 * a.C;
  return start_statistics(a, n);
}

int batch_norm_lif_affine(const LifArgs& a, const NormArgs& norm) {
  if (norm.C != a.C || norm.affine == 0 || norm.moments == 0) return cudaErrorInvalidValue;
  if (norm.running_mean != 0 && (norm.running_var == 0 || norm.batches == 0)) return cudaErrorInvalidValue;
  NormArgs n = norm;
  n.mean = known_statistics(a, statistics_tiles(a)), n.spread = n.mean + 8 * a.C;
  n.source = kFloat64, n.values = a.T * a.N / a.C;
  return start_statistics(a, n);
}

int batch_norm_lif_finish(const NormArgs& n) {
  if (n.C <= 0 || n.mean == 0 || n.spread == 0 || n.affine == 0 || n.moments == 0) return cudaErrorInvalidValue;
  if (n.running_mean != 0 && (n.running_var == 0 || n.batches == 0)) return cudaErrorInvalidValue;
  const OnDevice guard(n.device);
  if (guard.error() != cudaSuccess) return guard.error();
  launch(n, finish_known, 1, kFinishThreads, 0, n);
  return cudaGetLastError();
}

int batch_norm_lif_coefficients(const NormArgs& n) {
  if (n.C <= 0 || n.sums == 0 || n.affine == 0 || n.moments == 0) return cudaErrorInvalidValue;
  const OnDevice guard(n.device);
  if (guard.error() != cudaSuccess) return guard.error();
  launch(n, coefficients, index::blocks(n.C, 1), index::kThreads, 0, n);
  return cudaGetLastError();
}

int batch_norm_lif_input_grad(const LifArgs& a) {
  if (!valid(a) || a.gs == 0 || a.gx == 0 || a.affine == 0 || a.coef == 0) return cudaErrorInvalidValue;
  const OnDevice guard(a.device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(a, vec(a), [&a](auto e, auto v) {
    launch(a, input_grad<decltype(e), v.value>, index::blocks(a.N, v.value), index::kThreads, 0, a);
  });
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace trtkern
