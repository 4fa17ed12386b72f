// What the steps of neurons are made of on the CPU and on CUDA alike: the surrogates, and the input current of a
// normalised x. The steps themselves are printed from trtkern/neurons.py (trtkern_neurons.h).
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

// The input current of a normalised x: scale * (x - center) + shift; a residual is added to it.
template <class F>
TK_INLINE F current_of(F x, F center, F scale, F shift) {
  return fma_(scale, x - center, shift);
}

}  // namespace trtkern::TK_SPACE
