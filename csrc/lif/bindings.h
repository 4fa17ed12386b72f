// The Python classes of LifArgs and NormArgs, for both extensions (module_local: each has its own). A field that one
// does not have is an AttributeError.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

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

// The address of a tensor's first element; 0 for None.
inline uint64_t address_of(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const number = PyObject_CallMethodNoArgs(tensor, data_ptr);
  if (number == nullptr) throw pybind11::error_already_set();
  const uint64_t address = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return address;
}

// The addresses of tensors come first among the fields.
template <class Args>
constexpr size_t kTensors = 0;
template <>
constexpr size_t kTensors<LifArgs> = offsetof(LifArgs, norm_sums) / sizeof(uint64_t) + 1;
template <>
constexpr size_t kTensors<NormArgs> = offsetof(NormArgs, gbias) / sizeof(uint64_t) + 1;
static_assert(offsetof(LifArgs, workspace) == kTensors<LifArgs> * sizeof(uint64_t));
static_assert(offsetof(NormArgs, C) == kTensors<NormArgs> * sizeof(uint64_t));

// A copy for tensors, in the order of the fields.
template <class Args>
Args with_tensors(const Args& args, const pybind11::tuple& tensors) {
  if (tensors.size() > kTensors<Args>) throw pybind11::value_error("at: more tensors than there are addresses");
  uint64_t addresses[kTensors<Args>] = {};
  for (size_t i = 0; i < tensors.size(); ++i) addresses[i] = address_of(tensors[i].ptr());
  Args made = args;
  std::memcpy(&made, addresses, sizeof addresses);
  return made;
}

inline void bind_lif_args(pybind11::module_& m) {
  pybind11::class_<LifArgs> c(
      m, "LifArgs", pybind11::module_local(),
      "Addresses, sizes and numbers of one LIF launch (csrc/lif/fields.h). Set the attributes.");
  c.def(pybind11::init<>());
  c.def("at", &with_tensors<LifArgs>, pybind11::arg("tensors"),
        "A copy for those tensors, in the order of the fields.");
#define TK_FIELD(type, name, value) c.def_readwrite(#name, &LifArgs::name)
#define TK_FIELDS(type, name, count) bind_numbers<type, count>(c, #name, &LifArgs::name)
#include "lif/fields.h"
  pybind11::class_<NormArgs> n(
      m, "NormArgs", pybind11::module_local(),
      "What is done between the passes of a BatchNorm + neuron (csrc/norm/fields.h). Set the attributes.");
  n.def(pybind11::init<>());
  n.def("at", &with_tensors<NormArgs>, pybind11::arg("tensors"),
        "A copy for those tensors, in the order of the fields.");
#define TK_FIELD(type, name, value) n.def_readwrite(#name, &NormArgs::name)
#include "norm/fields.h"
  m.attr("CHUNK") = kChunk;
  m.attr("TABLES") = TK_TABLES;  // what trtkern.dialect.headers() printed for this build
}

}  // namespace trtkern
