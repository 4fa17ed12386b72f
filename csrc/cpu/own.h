// Neurons of a user's own, each compiled at first use into a library of its own (trtkern/backends/_compiled.py).
#pragma once
#include "cpu/kernels.h"
#include "recurrent/args.h"

namespace trtkern {

// What a library offers that was compiled at first use, for one neuron (cpu/own_rows.h); its functions are those of a
// Kernels and of RecurrentKernels. The sizes have to be the extension's own.
struct OwnRows {
  int64_t size, args, forward_scratch, backward_scratch;
  decltype(Kernels::lif_forward) lif_forward;
  decltype(Kernels::lif_backward) lif_backward;
  int64_t recurrent_args;
  decltype(RecurrentKernels::own) recurrent_own;
  decltype(RecurrentKernels::forward) recurrent_forward;
  decltype(RecurrentKernels::backward) recurrent_backward;
};
constexpr int kOwnNeurons = 1 << 16;  // LifArgs::neuron from here on: the libraries in the order in which they came

// Those of a neuron from kOwnNeurons on (cpu/own_rows.cpp).
const OwnRows& own_rows(int neuron);

}  // namespace trtkern
