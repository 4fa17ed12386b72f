// The fields of NormArgs: its struct (norm/args.h) and its Python class (lif/bindings.h) are made of this list, and
// trtkern/backends/_args.py fills them by name. Who includes it defines TK_FIELD(type, name, default); it is undefined
// at the end.
//
// What stands between the passes of a BatchNorm + neuron, channel by channel ([C]): statistics become the three numbers
// that the kernels take (forward), sums of gradients become those that the input's gradient takes (backward). An
// address of 0 means: absent. The types of numbers are those of Dtype (lif/args.h), and kFloat64.

// Tensors. Forward reads: the mean, and the sum of squared deviations from it, which is that of `values` numbers, or
// with values = 0 the variance
TK_FIELD(uint64_t, mean, 0);
TK_FIELD(uint64_t, spread, 0);
TK_FIELD(uint64_t, weight, 0);  // backward reads it too
TK_FIELD(uint64_t, bias, 0);    // in weight's type
// forward moves, unless a statistic is not finite
TK_FIELD(uint64_t, running_mean, 0);
TK_FIELD(uint64_t, running_var, 0);
TK_FIELD(uint64_t, batches, 0);  // int64 [1]
// forward writes, backward reads
TK_FIELD(uint64_t, affine, 0);   // float [3, C]: center, scale, shift
TK_FIELD(uint64_t, moments, 0);  // double [2, C]: the mean, and 1 / sqrt(variance + eps)
// forward writes with running statistics (scale, 0, 0), backward with those of a batch: float [3, C]
TK_FIELD(uint64_t, coef, 0);
// backward reads and writes
TK_FIELD(uint64_t, sums, 0);  // double [2, C]: of gx and of gx * (x - center), over all processes
TK_FIELD(uint64_t, own, 0);   // the same of this process; 0: there is no other
TK_FIELD(uint64_t, gweight, 0);
TK_FIELD(uint64_t, gbias, 0);
// numbers and choices
TK_FIELD(int64_t, C, 0);
TK_FIELD(int64_t, count, 0);  // numbers behind each mean of a batch; 0: a running mean, to which no gradient flows
TK_FIELD(int64_t, values, 0);
TK_FIELD(int, source, kFloat64);   // the type of mean and spread
TK_FIELD(int, type, kFloat32);     // of weight, bias and their gradients
TK_FIELD(int, running, kFloat32);  // of running_mean and running_var
TK_FIELD(double, eps, 0.0);
TK_FIELD(double, momentum, 0.0);  // below 0: plain averages over all batches
// where it runs
TK_FIELD(int, device, 0);       // CUDA
TK_FIELD(uint64_t, stream, 0);  // CUDA

#undef TK_FIELD
