// The parameters of a neuron as the CPU's kernels read them, [P, C] float32, made of numbers and of tensors that hold
// one float32 number, or C, in the host's memory: what stack and parameter_values in trtkern/ops do with torch's
// operations.
#pragma once
#include <cfloat>
#include <string>
#include <utility>
#include <vector>

#include "lif/bindings.h"

namespace trtkern {

class ParamRows {
 public:
  // numbers: one for each row; learned: (row, count, range) for each row that a tensor has, in the order of the
  // tensors, the range being "" (finite), "[0, 1]", ">= 0" or "> 0".
  ParamRows(std::vector<float> numbers, std::vector<std::tuple<int64_t, int64_t, std::string>> learned, int64_t C)
      : numbers_(std::move(numbers)), learned_(std::move(learned)), C_(C) {}

  // Fills `params`; whether each number of the tensors lies in its range.
  bool fill(const pybind11::handle& params, const pybind11::tuple& tensors) const {
    if (tensors.size() != learned_.size()) throw pybind11::value_error("fill: another number of tensors");
    float* const to = reinterpret_cast<float*>(address_of(params.ptr()));
    for (size_t p = 0; p < numbers_.size(); ++p) std::fill(to + p * C_, to + (p + 1) * C_, numbers_[p]);
    bool within = true;
    for (size_t i = 0; i < learned_.size(); ++i) {
      const auto& [row, count, range] = learned_[i];
      const float* const from = reinterpret_cast<const float*>(address_of(tensors[i].ptr()));
      const float low = range.empty() ? -FLT_MAX : 0.0f;
      const bool above = range == "> 0";
      const float high = range == "[0, 1]" ? 1.0f : FLT_MAX;
      for (int64_t c = 0; c < C_; ++c) {
        const float value = from[count == 1 ? 0 : c];
        within = within && value >= low && value <= high && !(above && value == 0.0f);  // NaN is not
        to[row * C_ + c] = value;
      }
    }
    return within;
  }

 private:
  std::vector<float> numbers_;
  std::vector<std::tuple<int64_t, int64_t, std::string>> learned_;
  int64_t C_;
};

inline void bind_param_rows(pybind11::module_& m) {
  pybind11::class_<ParamRows> c(m, "ParamRows", pybind11::module_local(), "Parameters [P, C] (csrc/host/rows.h).");
  c.def(pybind11::init<std::vector<float>, std::vector<std::tuple<int64_t, int64_t, std::string>>, int64_t>(),
        pybind11::arg("numbers"), pybind11::arg("learned"), pybind11::arg("channels"));
  c.def("fill", &ParamRows::fill, pybind11::arg("params"), pybind11::arg("tensors"),
        "Fill params from the tensors of the learned rows; whether each of their numbers lies in its range.");
}

}  // namespace trtkern
