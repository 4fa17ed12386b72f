// The weight as the lists need it, and its gradient back: from [K, kernel_h, kernel_w, C] in any dense order to rows of
// kListOutputs outputs, one for each tap and input channel.
#pragma once
#include "spike_conv/cpu_lists_taps.h"

namespace trtkern::TK_ISA {

constexpr int64_t kLine = 16;  // floats of a cache line
typedef float vfour __attribute__((vector_size(16)));

TK_INLINE void transpose_four(vfour& a, vfour& b, vfour& c, vfour& d) {
  const vfour ac = __builtin_shufflevector(a, c, 0, 4, 1, 5), AC = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  const vfour bd = __builtin_shufflevector(b, d, 0, 4, 1, 5), BD = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ac, bd, 0, 4, 1, 5), b = __builtin_shufflevector(ac, bd, 2, 6, 3, 7);
  c = __builtin_shufflevector(AC, BD, 0, 4, 1, 5), d = __builtin_shufflevector(AC, BD, 2, 6, 3, 7);
}

// Part of the weight, for kListOutputs outputs: input channels [c, c + channels), in each tap.
struct WeightPart {
  int64_t outputs;  // that there are
  int64_t channels;
  int64_t tap_rows;  // rows from one tap to the next
  float* weight;     // of its first output and channel
  float* rows;       // of its first channel, in the first tap
};

// Channels (and taps) whose weights lie side by side, as one run: those of a tap where channels are the last, and
// channel by channel all taps where they are not.
struct WeightRun {
  int64_t runs, length;
  bool taps_last;
};
TK_INLINE WeightRun weight_run(const SpikeConvArgs& a, int64_t channels) {
  const int64_t taps = tap_count(a);
  if (a.weight_c == taps && (a.kernel_w == 1 || a.weight_w == 1) && (a.kernel_h == 1 || a.weight_h == a.kernel_w))
    return {1, channels * taps, true};
  return {taps, channels, false};
}

// Sixteen elements, four of a run of four outputs, or less of both; a sum that is NaN once one is not finite.
template <bool kBack>
TK_INLINE vfour move_square(float* weight, int64_t step_k, int64_t step, int64_t outputs, int64_t n, float* const* rows,
                            int64_t k, vfour watch) {
  if (outputs == 4 && n == 4 && step == 1) {
    vfour at[4];
    for (int i = 0; i < 4; ++i) at[i] = load_as<vfour>(kBack ? rows[i] + k : weight + i * step_k);
    if (!kBack)
      for (int i = 0; i < 4; ++i) watch += at[i] * 0.0f;
    transpose_four(at[0], at[1], at[2], at[3]);
    for (int i = 0; i < 4; ++i) __builtin_memcpy(kBack ? weight + i * step_k : rows[i] + k, &at[i], sizeof at[i]);
    return watch;
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < outputs; ++j) {
      float& value = weight[j * step_k + i * step];
      if (kBack) {
        value = rows[i][k + j];
      } else {
        rows[i][k + j] = value;
        watch[0] += value * 0.0f;
      }
    }
  return watch;
}

// Move a part from the weight to rows, or back. False: it is not finite (seen on the way to rows).
template <bool kBack>
TK_NOINLINE bool move_weights(const SpikeConvArgs& a, const WeightPart& part) {
  const WeightRun run = weight_run(a, part.channels);
  const int64_t step = run.taps_last ? 1 : a.weight_c, taps = run.taps_last ? tap_count(a) : 1;
  vfour watch = {};
  for (int64_t at = 0; at < run.runs; ++at) {
    float *weight = part.weight, *first = part.rows + at * part.tap_rows * kListOutputs;
    if (!run.taps_last) weight += at / a.kernel_w * a.weight_h + at % a.kernel_w * a.weight_w;
    for (int64_t k = 0; k < part.outputs; k += kLine) {  // the lines of so many outputs side by side
      const int64_t end = lesser(part.outputs, k + kLine);
      int64_t tap = 0, channel = 0;
      for (int64_t i = 0; i < run.length; i += kLine) {
        float* rows[kLine];
        const int64_t n = lesser(kLine, run.length - i);
        for (int64_t j = 0; j < n; ++j) {
          rows[j] = first + (tap * part.tap_rows + channel) * kListOutputs;
          if (++tap == taps) tap = 0, ++channel;
        }
        for (int64_t kk = k; kk < end; kk += 4)
          for (int64_t j = 0; j < n; j += 4)
            watch = move_square<kBack>(weight + kk * a.weight_k + (i + j) * step, a.weight_k, step, lesser(4, end - kk),
                                       lesser(4, n - j), rows + j, kk, watch);
      }
    }
  }
  return watch[0] == 0.0f && watch[1] == 0.0f && watch[2] == 0.0f && watch[3] == 0.0f;
}

}  // namespace trtkern::TK_ISA
