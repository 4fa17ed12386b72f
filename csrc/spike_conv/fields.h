// The fields of SpikeConvArgs: its struct (spike_conv/args.h) and its Python class (spike_conv/bindings.h) are made of
// this list, and trtkern/backends/cpu.py fills them by name. Who includes it defines TK_FIELD(type, name, default); it
// is undefined at the end.
//
// A convolution over packed spikes, of a stack of T * B images, image t * B + b being step t of sample b. What it
// convolves at a place is
//
//   value = scale * (the bits of that step in `addends` words, or in `addends` words of each of 2 x 2 places)
//
// so 0 or 1 for spikes, k / 4 for their 2 x 2 averages (pool), and 0 to `addends` for sums of spikes. A matrix product
// is a convolution of images of one place.
//
// Shapes, all dense with channels last: words [addends, ceil(T / 8), B, words_h, words_w, C] bytes, bit t % 8 of plane
// t / 8 being the spike of step t; y and g [T * B, out_h, out_w, K] float32, gx [T * B, H, W, C]; bias [K] float32.
// weight and gweight are [K, kernel_h, kernel_w, C] float32 in any dense order, which their strides say.

// Forward and the weight's gradient read
TK_FIELD(uint64_t, words, 0);
// forward reads and writes
TK_FIELD(uint64_t, weight, 0);
TK_FIELD(uint64_t, bias, 0);  // 0: none
TK_FIELD(uint64_t, y, 0);
// the weight's gradient reads and writes
TK_FIELD(uint64_t, g, 0);
TK_FIELD(uint64_t, gweight, 0);
// the image's gradient reads g and weight, and writes
TK_FIELD(uint64_t, gx, 0);
// sizes
TK_FIELD(int64_t, T, 0);
TK_FIELD(int64_t, B, 0);
TK_FIELD(int64_t, C, 0);
TK_FIELD(int64_t, K, 0);
TK_FIELD(int64_t, addends, 1);
TK_FIELD(int64_t, words_h, 1);
TK_FIELD(int64_t, words_w, 1);
TK_FIELD(int64_t, pool, 1);  // 2: the image is 2 x 2 averages of the words; an odd last row or column is dropped
TK_FIELD(int64_t, H, 1);     // of the image that is convolved
TK_FIELD(int64_t, W, 1);
TK_FIELD(int64_t, out_h, 1);
TK_FIELD(int64_t, out_w, 1);
TK_FIELD(int64_t, kernel_h, 1);
TK_FIELD(int64_t, kernel_w, 1);
TK_FIELD(int64_t, stride_h, 1);
TK_FIELD(int64_t, stride_w, 1);
TK_FIELD(int64_t, padding_h, 0);  // rows of zeros above the image; below it as many as the last output row needs
TK_FIELD(int64_t, padding_w, 0);
// elements from one output channel, kernel row, kernel column, input channel of the weight to the next
TK_FIELD(int64_t, weight_k, 0);
TK_FIELD(int64_t, weight_h, 0);
TK_FIELD(int64_t, weight_w, 0);
TK_FIELD(int64_t, weight_c, 1);
// choices, and where it runs
TK_FIELD(int, kernel, 0);  // its position in SPIKE_KERNELS (spike_conv/args.h)
TK_FIELD(int, threads, 1);

#undef TK_FIELD
