// The Python classes of LifArgs and NormArgs, for both extensions (module_local: each has its own). A field that one
// does not have is an AttributeError.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "norm/args.h"
#include "trtkern_tables.h"

namespace trtkern {

// A field that is an array: a sequence of as many numbers.
template <class Number, size_t COUNT>
void bind_numbers(pybind11::class_<LifArgs>& c, const char* name, Number (LifArgs::*field)[COUNT]) {
  using Numbers = std::array<Number, COUNT>;
  const auto get = [field](const LifArgs& a) {
    Numbers values;
    std::copy(a.*field, a.*field + COUNT, values.begin());
    return values;
  };
  const auto set = [field](LifArgs& a, const Numbers& values) { std::copy(values.begin(), values.end(), a.*field); };
  c.def_property(name, get, set);
}

inline void bind_lif_args(pybind11::module_& m) {
  pybind11::class_<LifArgs> c(
      m, "LifArgs", pybind11::module_local(),
      "Addresses, sizes and numbers of one LIF launch (csrc/lif/fields.h). Set the attributes.");
  c.def(pybind11::init<>());
  c.def("copy", [](const LifArgs& a) { return a; });
#define TK_FIELD(type, name, value) c.def_readwrite(#name, &LifArgs::name)
#define TK_FIELDS(type, name, count) bind_numbers<type, count>(c, #name, &LifArgs::name)
#include "lif/fields.h"
  pybind11::class_<NormArgs> n(
      m, "NormArgs", pybind11::module_local(),
      "What is done between the passes of a BatchNorm + neuron (csrc/norm/fields.h). Set the attributes.");
  n.def(pybind11::init<>());
  n.def("copy", [](const NormArgs& a) { return a; });
#define TK_FIELD(type, name, value) n.def_readwrite(#name, &NormArgs::name)
#include "norm/fields.h"
  m.attr("CHUNK") = kChunk;
  m.attr("TABLES") = TK_TABLES;  // what trtkern.dialect.headers() printed for this build
}

}  // namespace trtkern
