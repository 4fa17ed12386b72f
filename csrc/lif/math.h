// The step of a LIF neuron and its gradient (docs/design.md, "The maths") as CUDA takes it, over F: a float. What the
// CPU runs is printed from trtkern/neurons.py; a test compares the two.
//
// It is written over a dialect, whose namespace TK_SPACE it joins: TK_INLINE and, for its F, lit<F>, fma_, abs_, exp_,
// maximum_, where_. Each CPU instruction set has one (cpu/simd.h), CUDA has one (cuda/dialect.h), and so have the
// tests. Contraction is off everywhere and every fma is written out, so all of them agree on h bit for bit.
#pragma once
#include "lif/args.h"
#ifndef TK_SPACE  // CUDA's dialects include this at their end
#include "cpu/simd.h"
#endif

namespace trtkern::TK_SPACE {

#include "trtkern_surrogates.h"

template <class F>
struct Neuron {
  F decay, gain, bias, reset_amount, threshold, v_reset;
};

// The input current of a normalised x: scale * (x - center) + shift; a residual is added to it.
template <class F>
TK_INLINE F current_of(F x, F center, F scale, F shift) {
  return fma_(scale, x - center, shift);
}

// h[t] = decay * v[t-1] + gain * x[t] + bias
template <class F>
TK_INLINE F charge(const Neuron<F>& p, F v, F x) {
  return fma_(p.decay, v, fma_(p.gain, x, p.bias));
}

// s[t] = 1 if h[t] > threshold else 0; NaN does not fire
template <class F>
TK_INLINE F fire(const Neuron<F>& p, F h) {
  return where_(h > p.threshold, lit<F>(1.0f), lit<F>(0.0f));
}

// What one step hands back: gh, and its contributions to the gradients of threshold, reset_amount and v_reset.
template <class F>
struct StepGradient {
  F h, threshold, reset_amount, v_reset;
};

// The reset and the gradient of a step, as trtkern/neurons.py and its derived backward pass have them, without a branch,
// for a GPU: uniform choices are selects, so that the steps of a chunk are one straight line. The reset's number stands
// in both v_reset and reset_amount, and is 0 where there is no reset; `attached`: there is one and it is not detached;
// sg: the surrogate at h - threshold. gv * s is handed back for whichever of the two is in use, without its sign.
template <class F>
TK_INLINE F reset_after_flat(const Neuron<F>& p, F h, bool hard) {
  return where_(h > p.threshold, where_(hard, p.v_reset, h - p.reset_amount), h);
}

template <class F>
TK_INLINE StepGradient<F> step_gradient_flat(const Neuron<F>& p, F h, F sg, F gs, F gv, bool hard, bool attached) {
  const F s = fire(p, h);
  const F spike = where_(attached, fma_(gv, where_(hard, p.v_reset - h, -p.reset_amount), gs), gs);
  const F through = sg * spike;
  const F passed = where_(hard, gv * (lit<F>(1.0f) - s), gv);
  const F reset = gv * s;
  return {where_(h == h, through + passed, h), -through, reset, reset};
}

}  // namespace trtkern::TK_SPACE
