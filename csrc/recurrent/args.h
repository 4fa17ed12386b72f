// Neurons that feed each other: what crosses from Python beside the LifArgs of the neurons, and what an instruction set
// offers for them.
//
// Samples share nothing but the weights and the parameters. They are taken in units of kSamples, which follow from the
// sizes alone: each has a sum of its own for the gradients of the parameters. A few units make a group, which goes
// through all steps together: the more there are, the more often weights are used when they are read. Any thread takes
// any group, and no result depends on which units are in one.
#pragma once
#include <cstdint>

#include "lif/args.h"

namespace trtkern {

constexpr int64_t kSamples = 16;   // of a unit: rows of a tile
constexpr int64_t kMostUnits = 4;  // of a group

struct RecurrentArgs {
  LifArgs lif;          // of the neurons: x, v, ... are [T, samples * width]; x is the current (0: not wanted)
  uint64_t x = 0;       // forward: what comes from outside, [T, samples, width] in the dtype of all
  uint64_t s0 = 0;      // forward: the spikes before the first step, [samples, width]; 0: none
  uint64_t weight = 0;  // float [width, width]: from neuron k to neuron j at [j, k]
  uint64_t bias = 0;    // forward: float [width]; 0: none
  int64_t width = 1;    // neurons of a sample
  int64_t samples = 1, units = 1;
};

// Rows of floats times the weights: out[r, j] = sum over k of from[r, k] weight[j, k], or with `back` of from[r, k]
// weight[k, j]. Every sum is taken in an order that follows from the width alone.
struct RecurrentProduct {
  int64_t (*bytes)(int64_t width) = nullptr;               // of the weights as they are laid out
  int64_t (*own)(int64_t width, int64_t units) = nullptr;  // of scratch memory
  int64_t (*items)(int64_t width) = nullptr;               // parts that are laid out one by one
  // `nonfinite` is set to 1 where a weight is not finite.
  void (*lay)(const RecurrentArgs&, bool back, int64_t item, char* weights, int* nonfinite) = nullptr;
  // Rows are `width` floats apart, of `out` product_pitch(width), to whose ends they may be written. `spikes`: each
  // number is 0 or 1, and each weight finite, so that what is 0 may be left out. Bit i is set where a number of unit i
  // is not finite: its rows mean nothing then.
  unsigned (*multiply)(const char* weights, const float* from, int64_t rows, int64_t width, bool spikes, float* out,
                       char* own) = nullptr;
};

struct RecurrentMemory {
  const RecurrentProduct* product;
  const char* weights;
  bool finite;  // all weights
  char* own;    // of the thread
};

struct RecurrentKernels {
  int64_t (*own)(const RecurrentArgs&, bool back, int64_t units) = nullptr;  // bytes, the product's besides
  void (*forward)(const RecurrentArgs&, int64_t first, int64_t units, const RecurrentMemory&) = nullptr;
  // sums: double [units, P, C], of all units, added to; or null.
  void (*backward)(const RecurrentArgs&, int64_t first, int64_t units, const RecurrentMemory&, double* sums) = nullptr;
  RecurrentProduct vectors;  // takes any numbers
  RecurrentProduct tiles;    // AMX, backward; empty where there is none
};

extern const RecurrentKernels kRecurrentBaseline;
#if defined(__x86_64__)
extern const RecurrentKernels kRecurrentAvx512, kRecurrentAvx2;
extern const RecurrentProduct kRecurrentTiles;  // with AMX
#endif
#if defined(TRTKERN_CPU_WIDE)
extern const RecurrentKernels kRecurrentWide;
#endif

// Fills what lif asks for: s, current, v, v_final, edges, packed and the flag.
void cpu_recurrent_forward(const RecurrentArgs& args);
// gx, gv0 and gparams from gs, gv and gv_final; the gradient of s[t] is gs[t] plus gx[t + 1] times the weights.
void cpu_recurrent_backward(const RecurrentArgs& args);

}  // namespace trtkern
