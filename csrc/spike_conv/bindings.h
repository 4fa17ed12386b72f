// The Python class of SpikeConvArgs, and the functions that take it.
#pragma once
#include <pybind11/pybind11.h>

#include "spike_conv/cpu_launch.h"

namespace trtkern {

inline void bind_spike_conv(pybind11::module_& m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<SpikeConvArgs> c(m, "SpikeConvArgs", py::module_local(),
                              "A convolution over packed spikes (csrc/spike_conv/fields.h). Set the attributes.");
  c.def(py::init<>());
#define TK_FIELD(type, name, value) c.def_readwrite(#name, &SpikeConvArgs::name)
#include "spike_conv/fields.h"
  py::list names;
  for (const char* name : kSpikeKernelNames) names.append(name);
  m.attr("SPIKE_KERNELS") = py::tuple(names);
  m.attr("SPIKE_PASSES") = py::make_tuple("forward", "weight_grad", "input_grad");
  m.def(
      "spike_conv_takes", [](const SpikeConvArgs& a, int pass) { return cpu_spike_conv_takes(a, SpikePass(pass)); },
      py::arg("args"), py::arg("spike_pass"),
      "Whether the kernel, with the instruction set in use, takes these sizes in the pass of SPIKE_PASSES.");
  m.def("spike_conv_forward", &cpu_spike_conv_forward, py::arg("args"), Unlocked(),
        "Write y; False: a weight is not finite, and y means nothing.");
  m.def("spike_conv_weight_grad", &cpu_spike_conv_weight_grad, py::arg("args"), Unlocked(),
        "Write gweight; False: a gradient is not finite, and gweight means nothing.");
  m.def("spike_conv_input_grad", &cpu_spike_conv_input_grad, py::arg("args"), Unlocked(),
        "Write gx; False: a gradient or a weight is not finite, and gx means nothing.");
  m.def("spikes_count", &cpu_spikes_count, py::arg("words"), py::arg("bytes"), py::arg("threads"), Unlocked(),
        "How many of these bits are 1.");
  m.def("all_spikes", &cpu_all_spikes, py::arg("x"), py::arg("n"), py::arg("threads"), Unlocked(),
        "Whether n floats are 0 or 1, all of them.");
}

}  // namespace trtkern
