// The fields of LifArgs: its struct (lif/args.h), its Python class (lif/bindings.h) and the tests are made of this
// list, and trtkern/backends/_args.py fills them by name. Who includes it defines TK_FIELD(type, name, default) and,
// for an array, TK_FIELDS(type, name, count) before; they are undefined at the end.
//
// Shapes: [T, N] in x's dtype for x, residual, s, v, gs, gv, gx; [S, N] float32 for v0, v_final, gv_final, gv0, S being
// the numbers of a neuron's state; [P, C] float32 for params, P being its parameters; [3, C] float32 for affine and
// coef; [edges, S, N] float32 for edges, row j = the state after (j + 1) * kChunk / S steps; [ceil(T / 8), N] bytes for
// packed, bit t % 8 of row t / 8 being the spike of step t.
// An address of 0 means: absent (v0, residual: zeros; gradients: zeros; outputs: not wanted).
// Channel of neuron n: (n / inner) % C. With affine, params is absent or has the same C.
//
// With affine the input current is scale * (x - center) + shift (+ residual), in float32: fma(scale, x - center,
// shift), then the residual added. With coef, what is written as gx is coef[0] * gx + coef[1] * (x - center) + coef[2].
//
// With lengths, sample i (the neurons from i * sample on) has lengths[i] steps: v_final is the state after them,
// gv_final its gradient, and of the steps behind nothing is read; what is written for them is 0, but for edges.
//
// With pool_row, s and gs are [T, N / 4]: averages of 2 x 2 neurons, and their gradients. Neurons are rows of pool_row,
// rows 2k and 2k + 1 make one row of pool_row / 2; pool_side neurons lie side by side for each place in a row (1, or
// the number of channels where they come last), places 2j and 2j + 1 make one.

// Forward and backward read
TK_FIELD(uint64_t, x, 0);
TK_FIELD(uint64_t, v0, 0);
TK_FIELD(uint64_t, params, 0);
TK_FIELD(uint64_t, affine, 0);
TK_FIELD(uint64_t, residual, 0);
// forward writes
TK_FIELD(uint64_t, s, 0);
TK_FIELD(uint64_t, v, 0);
TK_FIELD(uint64_t, v_final, 0);
TK_FIELD(uint64_t, edges, 0);
TK_FIELD(uint64_t, packed, 0);
TK_FIELD(uint64_t, flag, 0);  // int32, set to 1 if any h, or any v as it is written, is not finite
// gradients that come in
TK_FIELD(uint64_t, gs, 0);
TK_FIELD(uint64_t, gv, 0);
TK_FIELD(uint64_t, gv_final, 0);
TK_FIELD(uint64_t, coef, 0);
// backward writes
TK_FIELD(uint64_t, gx, 0);
TK_FIELD(uint64_t, gv0, 0);
TK_FIELD(uint64_t, gparams, 0);    // see the launcher
TK_FIELD(uint64_t, norm_sums, 0);  // double [2, C], sums over steps and neurons of gx and of gx * (x - center)
TK_FIELD(uint64_t, workspace, 0);  // CUDA, with sums: scratch (cuda/launch.h)
TK_FIELD(uint64_t, counters, 0);   // CUDA: uint32 [C] in it, of the blocks that are through (cuda/last_block.h)
// sizes
TK_FIELD(int64_t, T, 0);
TK_FIELD(int64_t, N, 0);
TK_FIELD(int64_t, C, 1);
TK_FIELD(int64_t, inner, 1);
TK_FIELD(int64_t, x_stride, 0);  // elements from one step of x to the next: N, or 0 where x is the same at every step
TK_FIELD(uint64_t, lengths, 0);  // int32, the steps of each sample, at most T; 0: each has T
TK_FIELD(int64_t, sample, 0);    // neurons of a sample, side by side, where there are lengths
TK_FIELD(int64_t, pool_row, 0);
TK_FIELD(int64_t, pool_side, 1);
// numbers and choices
TK_FIELDS(float, scalars, kMostParams);  // the first P are used when params is 0
TK_FIELD(float, alpha, 1.0f);
TK_FIELD(int, dtype, kFloat32);
TK_FIELD(int, reset, kHard);
TK_FIELD(int, detach, 0);
TK_FIELD(int, surrogate, 0);
TK_FIELD(int, neuron, 0);   // its position in trtkern/neurons.py
TK_FIELD(int, P, kParams);  // its parameters
TK_FIELD(int, before, 0);   // v, and the v that gv is the gradient of, is h: the potential before the reset
// where it runs
TK_FIELD(int, threads, 1);      // CPU
TK_FIELD(int, device, 0);       // CUDA
TK_FIELD(int, processors, 0);   // CUDA: the device's multiprocessors, which N fills or not; 0: not known
TK_FIELD(uint64_t, stream, 0);  // CUDA

#undef TK_FIELD
#undef TK_FIELDS
