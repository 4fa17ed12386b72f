#include <optional>
#include <stdexcept>
#include <string>

#include "lif/bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {

// cudaError_t's of a machine or a build that cannot run the kernels at all.
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInsufficientDriver = 35, kNoDevice = 100, kInvalidDevice = 101;
constexpr int kNoKernelImage = 209, kUnsupportedPtx = 222;

const char* remedy(int error) {
  switch (error) {
    case kInvalidValue:
      return "the arguments were not those that trtkern.ops passes: call the public function";
    case kOutOfMemory:
      return "free memory on the device, or use a smaller batch";
    case kInsufficientDriver:
    case kUnsupportedPtx:
      return "install or update the NVIDIA driver";
    case kNoDevice:
    case kInvalidDevice:
      return "check CUDA_VISIBLE_DEVICES and nvidia-smi";
    case kNoKernelImage:
      return "build trtkern for this GPU (TRTKERN_CUDA_ARCHS, e.g. '80;90'), or use backend='triton'";
    default:
      return "run again with CUDA_LAUNCH_BLOCKING=1: the fault may be an earlier kernel's";
  }
}

void check(const char* op, int error) {
  if (error == 0) return;
  const trtkern::cuda::Error what = trtkern::cuda::describe(error);
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + " (" + what.name + ": " +
                           what.text + "); " + remedy(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using trtkern::LifArgs;
  using trtkern::NormArgs;
  m.doc() = "CUDA kernels of trtkern. Addresses are not checked here: trtkern.ops has checked the tensors behind them.";
  trtkern::bind_lif_args(m);
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "lif_forward", [](const LifArgs& a) { check("lif_forward", trtkern::cuda::lif_forward(a)); }, Unlocked(),
      "Launches the forward pass on args.stream of args.device. RuntimeError: a CUDA error.");
  m.def(
      "lif_backward",
      [](LifArgs a, uint64_t workspace, const NormArgs* norm) {
        a.workspace = workspace;
        check("lif_backward", trtkern::cuda::lif_backward(a, norm));
      },
      py::arg("args"), py::arg("workspace") = 0, py::arg("norm") = nullptr, Unlocked(),
      "Launches the backward pass; workspace: address of workspace_floats(args) float32 numbers, where args.gparams "
      "or args.norm_sums is set; norm: what the latter are finished into. RuntimeError: a CUDA error.");
  m.def(
      "lif_forward_at",
      [](const LifArgs& fixed, const py::tuple& tensors, uint64_t stream) {
        LifArgs a = trtkern::with_tensors(fixed, tensors);
        a.stream = stream;
        const py::gil_scoped_release unlocked;
        check("lif_forward", trtkern::cuda::lif_forward(a));
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("stream"), "lif_forward(fixed.at(tensors)), in one call.");
  m.def(
      "lif_backward_at",
      [](const LifArgs& fixed, const py::tuple& tensors, uint64_t stream, const py::object& room, const NormArgs* norm,
         const std::optional<py::tuple>& norm_tensors) {
        LifArgs a = trtkern::with_tensors(fixed, tensors);
        a.stream = stream;
        py::object workspace;  // freed behind the launch: the caching allocator gives it to later ones of the stream
        if ((a.gparams | a.norm_sums) != 0) {
          workspace = room(trtkern::cuda::workspace_floats(a));
          a.workspace = trtkern::address_of(workspace.ptr());
        }
        NormArgs finish;
        if (norm != nullptr && norm_tensors) finish = trtkern::with_tensors(*norm, *norm_tensors);
        const py::gil_scoped_release unlocked;
        check("lif_backward", trtkern::cuda::lif_backward(a, norm == nullptr ? nullptr : &finish));
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("stream"), py::arg("room") = py::none(), py::arg("norm") = nullptr,
      py::arg("norm_tensors") = py::none(),
      "lif_backward(fixed.at(tensors), workspace, norm.at(norm_tensors)), in one call; room(n): a tensor of n float32 "
      "numbers, "
      "where there are sums.");
  m.def(
      "batch_norm_lif_affine_at",
      [](const LifArgs& fixed, const py::tuple& tensors, uint64_t stream, const py::object& room, const NormArgs& norm,
         const py::tuple& norm_tensors) {
        LifArgs a = trtkern::with_tensors(fixed, tensors);
        a.stream = stream;
        const py::object workspace = room(trtkern::cuda::statistics_workspace_floats(a));
        a.workspace = trtkern::address_of(workspace.ptr());
        const NormArgs finish = trtkern::with_tensors(norm, norm_tensors);
        const py::gil_scoped_release unlocked;
        check("batch_norm_lif_affine", trtkern::cuda::batch_norm_lif_affine(a, finish));
      },
      py::arg("fixed"), py::arg("tensors"), py::arg("stream"), py::arg("room"), py::arg("norm"),
      py::arg("norm_tensors"), "batch_norm_lif_affine(fixed.at(tensors), norm.at(norm_tensors), workspace) likewise.");
  m.def("workspace_floats", &trtkern::cuda::workspace_floats, "Scratch that lif_backward needs for sums.");
  m.def("lif_shared_bytes", &trtkern::cuda::lif_shared_bytes, py::arg("args"), py::arg("backward"),
        "Bytes of shared memory that a block of the pass is launched with.");
  m.def(
      "batch_norm_lif_statistics",
      [](LifArgs a, uint64_t stats, uint64_t workspace) {
        a.workspace = workspace;
        check("batch_norm_lif_statistics", trtkern::cuda::batch_norm_lif_statistics(a, stats));
      },
      py::arg("args"), py::arg("stats"), py::arg("workspace"), Unlocked(),
      "Mean and squared deviations of each channel of args.x into float64 [2, C]; workspace: address of "
      "statistics_workspace_floats(args) float32 numbers. RuntimeError: a CUDA error.");
  m.def("statistics_workspace_floats", &trtkern::cuda::statistics_workspace_floats,
        "Scratch that batch_norm_lif_statistics and batch_norm_lif_affine need.");
  m.def(
      "batch_norm_lif_affine",
      [](LifArgs a, const NormArgs& norm, uint64_t workspace) {
        a.workspace = workspace;
        check("batch_norm_lif_affine", trtkern::cuda::batch_norm_lif_affine(a, norm));
      },
      py::arg("args"), py::arg("norm"), py::arg("workspace"), Unlocked(),
      "The statistics of args.x, finished into norm.moments and norm.affine, and moved into the running ones. "
      "RuntimeError: a CUDA error.");
  m.def(
      "batch_norm_lif_finish",
      [](const NormArgs& norm) { check("batch_norm_lif_finish", trtkern::cuda::batch_norm_lif_finish(norm)); },
      Unlocked(), "The same from norm.mean and norm.spread. RuntimeError: a CUDA error.");
  m.def(
      "batch_norm_lif_coefficients",
      [](const NormArgs& norm) {
        check("batch_norm_lif_coefficients", trtkern::cuda::batch_norm_lif_coefficients(norm));
      },
      Unlocked(), "norm.coef, norm.gweight and norm.gbias from norm.sums. RuntimeError: a CUDA error.");
  m.def("launches", &trtkern::cuda::launches, "Kernels launched since this was imported.");
  m.def(
      "batch_norm_lif_input_grad",
      [](const LifArgs& a) { check("batch_norm_lif_input_grad", trtkern::cuda::batch_norm_lif_input_grad(a)); },
      Unlocked(), "args.gx from args.gs and args.x by args.coef. RuntimeError: a CUDA error.");
}
