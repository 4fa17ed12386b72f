// The Python class of DelayArgs, and the functions that take it.
#pragma once
#include <pybind11/pybind11.h>

#include "cpu/launch.h"

namespace trtkern {

inline void bind_delay(pybind11::module_& m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<DelayArgs> c(m, "DelayArgs", py::module_local(),
                          "Addresses and sizes of one launch of delays (csrc/delay/fields.h). Set the attributes.");
  c.def(py::init<>());
#define TK_FIELD(type, name, value) c.def_readwrite(#name, &DelayArgs::name)
#include "delay/fields.h"
  m.def("delay_forward", &cpu_delay_forward, py::arg("args"), Unlocked());
  m.def("delay_backward", &cpu_delay_backward, py::arg("args"), Unlocked());
}

}  // namespace trtkern
