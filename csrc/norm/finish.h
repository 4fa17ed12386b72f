// What is done between the passes of a BatchNorm + neuron, for one channel c: g++ and nvcc compile it. All of it is
// float64, which costs nothing here: neither a large mean nor a small variance loses anything.
//
// Who includes it gives it, in its own namespace TK_SPACE and over its TK_INLINE, load_number(address, element, type)
// and store_number(address, element, type, value), load_double, store_double and store_float, and reciprocal_root.
#pragma once
#include "norm/args.h"

namespace trtkern::TK_SPACE {

struct ChannelStatistics {
  double mean, var;
  TK_INLINE bool finite() const { return mean - mean == 0.0 && var - var == 0.0; }
};

TK_INLINE ChannelStatistics channel_statistics(const NormArgs& n, int64_t c) {
  const double spread = load_number(n.spread, c, n.source);
  return {load_number(n.mean, c, n.source), n.values ? spread / static_cast<double>(n.values) : spread};
}

// center, scale, shift: the normalisation is scale * (x - center) + shift. The center is the mean as float32 has it,
// and the shift makes up for the rest: exact however large the mean is.
TK_INLINE void finish_forward(const NormArgs& n, int64_t c, const ChannelStatistics& of) {
  const double rstd = reciprocal_root(of.var + n.eps);
  const double scale = n.weight ? rstd * load_number(n.weight, c, n.type) : rstd;
  const float center = static_cast<float>(of.mean);
  double shift = (static_cast<double>(center) - of.mean) * scale;
  if (n.bias) shift += load_number(n.bias, c, n.type);
  store_double(n.moments, c, of.mean), store_double(n.moments, n.C + c, rstd);
  store_float(n.affine, c, center);
  store_float(n.affine, n.C + c, static_cast<float>(scale));
  store_float(n.affine, 2 * n.C + c, static_cast<float>(shift));
  if (!n.coef) return;
  store_float(n.coef, c, static_cast<float>(scale));
  store_float(n.coef, n.C + c, 0.0f), store_float(n.coef, 2 * n.C + c, 0.0f);
}

// The running statistics after a batch, as torch's BatchNorm has them. `batches`: how many there were, with this one.
TK_INLINE void move_running(const NormArgs& n, int64_t c, const ChannelStatistics& of, int64_t batches) {
  const double factor = n.momentum < 0.0 ? 1.0 / static_cast<double>(batches) : n.momentum;
  const double count = static_cast<double>(n.count), mean = load_number(n.running_mean, c, n.running);
  const double var = load_number(n.running_var, c, n.running), unbiased = of.var * (count / (count - 1.0));
  store_number(n.running_mean, c, n.running, mean + factor * (of.mean - mean));
  store_number(n.running_var, c, n.running, var + factor * (unbiased - var));
}

// coef, with which gx is coef[0] * gx + coef[1] * (x - center) + coef[2], and the gradients of weight and bias. With
// xhat = (x - mean) * rstd: scale * (gx - mean(gx) - xhat * mean(gx * xhat)). The gradients of the two are those of
// this process alone.
TK_INLINE void finish_backward(const NormArgs& n, int64_t c, double sum, double product) {
  const double mean = load_double(n.moments, c), rstd = load_double(n.moments, n.C + c);
  const double offset = mean - static_cast<double>(load_float(n.affine, c));
  if (n.coef) {
    const double scale = static_cast<double>(load_float(n.affine, n.C + c)), count = static_cast<double>(n.count);
    const double slope = scale * rstd * rstd * (product - offset * sum) / count;
    store_float(n.coef, c, static_cast<float>(scale));
    store_float(n.coef, n.C + c, static_cast<float>(-slope));
    store_float(n.coef, 2 * n.C + c, static_cast<float>(slope * offset - scale * sum / count));
  }
  if (n.own) sum = load_double(n.own, c), product = load_double(n.own, n.C + c);
  if (n.gweight) store_number(n.gweight, c, n.type, rstd * (product - offset * sum));
  if (n.gbias) store_number(n.gbias, c, n.type, sum);
}

}  // namespace trtkern::TK_SPACE
