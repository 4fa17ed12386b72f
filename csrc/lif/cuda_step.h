// The step of a LIF neuron as the kernels of lif/cuda_body.h take it: charge and fire of the table of neurons, its
// reset and its gradient in a form without branches. Included by cuda/pack.h.
#pragma once

namespace trtkern {
namespace cuda {

#include "trtkern_neurons.h"

template <class F>
struct Neuron {
  F decay, gain, bias, reset_amount, threshold, v_reset;
};

// The row of parameters that the table takes.
template <class F>
struct LifRow {
  F at[kParams];

  TK_INLINE explicit LifRow(const Neuron<F>& p) : at{p.decay, p.gain, p.bias, p.reset_amount, p.threshold, p.v_reset} {}
};

// h[t] = decay * v[t-1] + gain * x[t] + bias
template <class F>
TK_INLINE F charge(const Neuron<F>& p, F v, F x) {
  F h;
  LIF::charge(x, &v, LifRow<F>(p).at, &h);
  return h;
}

// s[t] = 1 if h[t] > threshold else 0; NaN does not fire
template <class F>
TK_INLINE F fire(const Neuron<F>& p, F h) {
  F potential, threshold;
  LIF::fire(&h, LifRow<F>(p).at, potential, threshold);
  return where_(potential > threshold, lit<F>(1.0f), lit<F>(0.0f));
}

// What one step hands back: gh, and its contributions to the gradients of threshold, reset_amount and v_reset.
template <class F>
struct StepGradient {
  F h, threshold, reset_amount, v_reset;
};

// The reset and the gradient of a step, as trtkern/neurons.py and its derived backward pass have them, without a
// branch, for a GPU: uniform choices are selects, so that the steps of a chunk are one straight line. The reset's
// number stands in both v_reset and reset_amount, and is 0 where there is no reset; `attached`: there is one and it is
// not detached; sg: the surrogate at h - threshold. carry * s is handed back for whichever of the two is in use,
// without its sign. A test compares the two.
template <class F>
TK_INLINE F reset_after_flat(const Neuron<F>& p, F h, bool hard) {
  return where_(h > p.threshold, where_(hard, p.v_reset, h - p.reset_amount), h);
}

template <class F>
TK_INLINE StepGradient<F> step_gradient_flat(const Neuron<F>& p, F h, F sg, F gs, F carry, bool hard, bool attached) {
  const F s = fire(p, h);
  const F spike = where_(attached, fma_(carry, where_(hard, p.v_reset - h, -p.reset_amount), gs), gs);
  const F through = sg * spike;
  const F passed = where_(hard, carry * (lit<F>(1.0f) - s), carry);
  const F reset = carry * s;
  return {where_(h == h, through + passed, h), -through, reset, reset};
}

}  // namespace cuda
}  // namespace trtkern
