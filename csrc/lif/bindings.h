// The Python class of LifArgs, for both extensions (module_local: each has its own).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "lif/args.h"

namespace trtkern {

inline void bind_lif_args(pybind11::module_& m) {
  pybind11::class_<LifArgs> c(m, "LifArgs", pybind11::module_local(),
                              "Addresses, sizes and numbers of one LIF launch (csrc/lif/args.h). Set the attributes.");
  c.def(pybind11::init<>());
#define TK_FIELD(name) c.def_readwrite(#name, &LifArgs::name)
  TK_FIELD(x), TK_FIELD(v0), TK_FIELD(params), TK_FIELD(s), TK_FIELD(v), TK_FIELD(v_final), TK_FIELD(edges);
  TK_FIELD(flag), TK_FIELD(gs), TK_FIELD(gv), TK_FIELD(gv_final), TK_FIELD(gx), TK_FIELD(gv0), TK_FIELD(gparams);
  TK_FIELD(T), TK_FIELD(N), TK_FIELD(C), TK_FIELD(inner), TK_FIELD(alpha), TK_FIELD(dtype), TK_FIELD(reset);
  TK_FIELD(affine), TK_FIELD(residual), TK_FIELD(packed), TK_FIELD(coef), TK_FIELD(norm_sums), TK_FIELD(x_stride);
  TK_FIELD(pool_row), TK_FIELD(pool_inner), TK_FIELD(detach), TK_FIELD(before), TK_FIELD(surrogate), TK_FIELD(threads),
      TK_FIELD(device), TK_FIELD(processors), TK_FIELD(stream), TK_FIELD(neuron), TK_FIELD(P);
#undef TK_FIELD
  c.def_property(
      "scalars",
      [](const LifArgs& a) {
        return std::vector<float>(a.scalars, a.scalars + a.P);
      },
      [](LifArgs& a, const std::vector<float>& values) {
        if (values.size() > kMostParams) throw std::length_error("LifArgs: expected at most kMostParams scalars");
        std::copy(values.begin(), values.end(), a.scalars);
      });
  m.attr("CHUNK") = kChunk;
}

}  // namespace trtkern
