// The plain struct that says what is done between the passes of a BatchNorm + neuron (norm/fields.h).
#pragma once
#include "lif/args.h"

namespace trtkern {

constexpr int kFloat64 = 3;  // after those of Dtype: parameters of a norm may be of it, x may not

struct NormArgs {
#define TK_FIELD(type, name, value) type name = value
#include "norm/fields.h"
};

}  // namespace trtkern
