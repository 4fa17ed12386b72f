// The fields of DelayArgs: its struct (delay/args.h) and its Python class (delay/bindings.h) are made of this list, and
// trtkern/backends/cpu.py fills them by name. Who includes it defines TK_FIELD(type, name, default); it is undefined at
// the end.
//
// Shapes: [T, N] in x's dtype for x, out, g, gx; [most, N] in it for v0 and gv0, the steps before the first one, the
// last of them last; [C] float32 for delays and gdelays. An address of 0 means: absent (v0: zeros; outputs: not
// wanted). Channel of neuron n: (n / inner) % C.

TK_FIELD(uint64_t, x, 0);  // backward reads it for gdelays alone, and so v0
TK_FIELD(uint64_t, v0, 0);
TK_FIELD(uint64_t, delays, 0);
TK_FIELD(uint64_t, out, 0);  // forward writes
TK_FIELD(uint64_t, g, 0);    // backward: the gradient of out
TK_FIELD(uint64_t, gx, 0);   // backward writes
TK_FIELD(uint64_t, gv0, 0);
TK_FIELD(uint64_t, gdelays, 0);
TK_FIELD(int64_t, T, 0);
TK_FIELD(int64_t, N, 0);
TK_FIELD(int64_t, C, 1);
TK_FIELD(int64_t, inner, 1);
TK_FIELD(int64_t, most, 0);  // no delay is longer
TK_FIELD(int, rounded, 0);   // whole steps
TK_FIELD(int, dtype, 0);
TK_FIELD(int, threads, 1);

#undef TK_FIELD
