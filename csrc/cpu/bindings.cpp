#include <optional>

#include "lif/bindings.h"
#include "cpu/launch.h"
#include "delay/bindings.h"
#include "host/known.h"
#include "host/rows.h"
#include "norm/cpu_finish.h"
#include "recurrent/bindings.h"
#include "spike_conv/bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  using namespace trtkern;
  m.doc() = "CPU kernels of trtkern. Addresses are not checked here: trtkern.ops has checked the tensors behind them.";
  bind_lif_args(m);
  bind_spike_conv(m);
  bind_delay(m);
  bind_recurrent(m);
  bind_known(m);
  bind_param_rows(m);
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("lif_forward", &cpu_lif_forward, Unlocked());
  m.def("lif_backward", &cpu_lif_backward, py::arg("args"), py::arg("norm") = nullptr, Unlocked());
  m.def(
      "lif_forward_at",
      [](const LifArgs& fixed, const py::tuple& tensors, int threads) {
        LifArgs args = with_tensors(fixed, tensors);
        args.threads = threads;
        const py::gil_scoped_release unlocked;
        cpu_lif_forward(args);
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("threads"), "lif_forward(fixed.at(tensors)), in one call.");
  m.def(
      "lif_backward_at",
      [](const LifArgs& fixed, const py::tuple& tensors, int threads, const NormArgs* norm,
         const std::optional<py::tuple>& norm_tensors) {
        LifArgs args = with_tensors(fixed, tensors);
        args.threads = threads;
        NormArgs finish;
        if (norm != nullptr && norm_tensors) finish = with_tensors(*norm, *norm_tensors);
        const py::gil_scoped_release unlocked;
        cpu_lif_backward(args, norm == nullptr ? nullptr : &finish);
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("threads"), py::arg("norm") = nullptr,
      py::arg("norm_tensors") = py::none(), "lif_backward(fixed.at(tensors), norm.at(norm_tensors)), in one call.");
  m.def(
      "batch_norm_lif_affine_at",
      [](const LifArgs& fixed, const py::tuple& tensors, int threads, const NormArgs& norm,
         const py::tuple& norm_tensors) {
        LifArgs args = with_tensors(fixed, tensors);
        args.threads = threads;
        const NormArgs finish = with_tensors(norm, norm_tensors);
        const py::gil_scoped_release unlocked;
        cpu_batch_norm_lif_affine(args, finish);
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("threads"), py::arg("norm"), py::arg("norm_tensors"),
      "batch_norm_lif_affine(fixed.at(tensors), norm.at(norm_tensors)), in one call.");
  m.def("batch_norm_lif_statistics", &cpu_batch_norm_lif_statistics, py::arg("args"), py::arg("stats"), Unlocked());
  m.def("batch_norm_lif_affine", &cpu_batch_norm_lif_affine, py::arg("args"), py::arg("norm"), Unlocked());
  m.def("batch_norm_lif_finish", &cpu_finish_forward, Unlocked());
  m.def("batch_norm_lif_coefficients", &cpu_finish_backward, Unlocked());
  m.def("batch_norm_lif_input_grad", &cpu_batch_norm_lif_input_grad, Unlocked());
  m.def("spikes_pack", &cpu_spikes_pack, Unlocked());
  m.def("spikes_unpack", &cpu_spikes_unpack, py::arg("args"), py::arg("first"), Unlocked());
  m.def(
      "regularizer",
      [](std::vector<uint64_t> weights, std::vector<int64_t> sizes, std::vector<uint64_t> grads, int64_t timesteps,
         double lam, double delta, double eps, bool accumulate, double scale, int threads) {
        const py::gil_scoped_release unlocked;
        return cpu_regularizer({std::move(weights), std::move(grads), std::move(sizes), timesteps, lam, delta, eps,
                                scale, accumulate, threads});
      },
      py::arg("weights"), py::arg("sizes"), py::arg("grads"), py::arg("timesteps"), py::arg("lam"), py::arg("delta"),
      py::arg("eps"), py::arg("accumulate"), py::arg("scale"), py::arg("threads"));
  m.def("load_rows", &cpu_load_rows, py::arg("path"),
        "The number of the neuron in a library that was compiled at first use (trtkern.backends._compiled).");
  m.def("isas", &cpu_isas, "Instruction sets that this processor runs, best first ('wide' is for tests, of float32).");
  m.def("isa", &cpu_isa, "The instruction set in use.");
  m.def("maker", &cpu_maker, "Who made the processor: 'amd', 'intel', or ''.");
  m.def("stream_from", &cpu_stream_from, py::arg("bytes"),
        "Outputs from this size on are written past the caches (default 4 MiB); for tests.");
  m.def("use_isa", &cpu_use_isa, py::arg("name"), "Use that instruction set; '' is the best.");
}
