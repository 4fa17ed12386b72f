// The functions for neurons that feed each other.
#pragma once
#include <pybind11/pybind11.h>

#include "lif/bindings.h"
#include "recurrent/args.h"

namespace trtkern {

inline RecurrentArgs recurrent_args(const LifArgs& lif, int64_t width, const pybind11::tuple& tensors) {
  if (tensors.size() != 4) throw pybind11::value_error("recurrent: expected (x, s0, weight, bias)");
  RecurrentArgs a;
  a.lif = lif, a.width = width;
  a.samples = lif.N / width, a.units = (a.samples + kSamples - 1) / kSamples;
  uint64_t* const addresses[] = {&a.x, &a.s0, &a.weight, &a.bias};
  for (int i = 0; i < 4; ++i) *addresses[i] = address_of(pybind11::object(tensors[i]).ptr());
  return a;
}

inline void bind_recurrent(pybind11::module_& m) {
  namespace py = pybind11;
  const auto define = [&m](const char* name, void (*run)(const RecurrentArgs&), const char* doc) {
    m.def(
        name,
        [run](const LifArgs& lif, int64_t width, const py::tuple& tensors) {
          const RecurrentArgs a = recurrent_args(lif, width, tensors);
          const py::gil_scoped_release unlocked;
          run(a);
        },
        py::arg("args"), py::arg("width"), py::arg("tensors"), doc);
  };
  define("recurrent_forward", &cpu_recurrent_forward,
         "Write s, the current and the rest, from (x, s0, weight, bias); a sample has `width` neurons.");
  define("recurrent_backward", &cpu_recurrent_backward,
         "Write gx, gv0 and gparams, from (None, None, weight, None) and the current.");
}

}  // namespace trtkern
