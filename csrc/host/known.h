// Whether a call finds everything as an earlier one of its kind did: trtkern/ops/_again.py, which says what that is,
// and has the same class in Python where this extension is not.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

namespace trtkern {

// Two kinds of values that no object stands for.
inline PyObject* known_absent() { return Py_Ellipsis; }       // there is no such entry
inline PyObject* known_empty() { return Py_NotImplemented; }  // the entry is a container with nothing in it

class Known {
 public:
  // held: (dict, key, value) each, entries of namespaces; asked: (function, arguments, value) each, what functions say;
  // own: of each dict that `fits` is given, (key, value) of entries; kinds: None or (type, shape, strides, dtype,
  // layout, device, requires_grad) each, those of the tensors that `fits` is given; wrapped: whether a transform of
  // torch left a tensor behind. Values are compared by identity, but numbers, shapes, strides and devices by what they
  // are.
  Known(const pybind11::tuple& held, const pybind11::tuple& asked, const pybind11::tuple& own,
        const pybind11::tuple& kinds, pybind11::object wrapped)
      : wrapped_(std::move(wrapped)) {
    for (const pybind11::handle row : held) held_.push_back(row.cast<Row>());
    for (const pybind11::handle row : asked) asked_.push_back(row.cast<Row>());
    for (const pybind11::handle rows : own) own_.push_back(rows.cast<std::vector<Entry>>());
    for (const pybind11::handle row : kinds) {
      Kind kind;
      if (!row.is_none()) {
        const auto told = pybind11::reinterpret_borrow<pybind11::tuple>(row);
        kind = {told[0], told[1], told[2], told[3], told[4], told[5], told[6]};
      }
      kinds_.push_back(kind);
    }
  }

  // Never an error: what cannot be compared is another call.
  bool fits(const pybind11::tuple& own, const pybind11::tuple& tensors) const {
    const bool same = fits_tensors(tensors.ptr()) && fits_dicts(own.ptr()) && fits_answers();
    if (PyErr_Occurred()) PyErr_Clear();
    return same;
  }

 private:
  using Row = std::tuple<pybind11::object, pybind11::object, pybind11::object>;
  using Entry = std::pair<pybind11::object, pybind11::object>;
  struct Kind {
    pybind11::object type, shape, strides, dtype, layout, device, requires_grad;
  };

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

  static bool is(PyObject* made, PyObject* value) {  // takes `made`
    const bool same = made == value;                 // a null is none of them
    Py_XDECREF(made);
    return same;
  }

  static bool equals(PyObject* made, PyObject* value) {  // takes `made`
    if (made == nullptr) return false;
    const int same = PyObject_RichCompareBool(made, value, Py_EQ);
    Py_DECREF(made);
    return same == 1;
  }

  static bool holds(PyObject* dict, PyObject* key, PyObject* value) {
    PyObject* const found = PyDict_GetItemWithError(dict, key);
    if (found == nullptr) return value == known_absent() && PyErr_Occurred() == nullptr;
    if (value == known_empty()) return PyObject_Size(found) == 0;
    if (found == value) return true;
    if (!PyFloat_CheckExact(found) || !PyFloat_CheckExact(value)) return false;
    const double a = PyFloat_AS_DOUBLE(found), b = PyFloat_AS_DOUBLE(value);
    return std::memcmp(&a, &b, sizeof a) == 0;  // 0.0 and -0.0 are two
  }

  bool fits_tensors(PyObject* tensors) const {
    static PyObject *const shape = name("shape"), *const stride = name("stride"), *const dtype = name("dtype"),
                           *const layout = name("layout"), *const device = name("device"),
                           *const requires_grad = name("requires_grad"), *const is_neg = name("is_neg");
    if (static_cast<size_t>(PyTuple_GET_SIZE(tensors)) != kinds_.size()) return false;
    for (size_t i = 0; i < kinds_.size(); ++i) {
      PyObject* const t = PyTuple_GET_ITEM(tensors, i);
      const Kind& kind = kinds_[i];
      if (!kind.type) {
        if (t != Py_None) return false;
        continue;
      }
      if (reinterpret_cast<PyObject*>(Py_TYPE(t)) != kind.type.ptr() ||
          !equals(PyObject_GetAttr(t, shape), kind.shape.ptr()) || !is(PyObject_GetAttr(t, dtype), kind.dtype.ptr()) ||
          !is(PyObject_GetAttr(t, requires_grad), kind.requires_grad.ptr()) ||
          !is(PyObject_GetAttr(t, layout), kind.layout.ptr()) ||
          !equals(PyObject_CallMethodNoArgs(t, stride), kind.strides.ptr()) ||
          !equals(PyObject_GetAttr(t, device), kind.device.ptr()) ||
          !is(PyObject_CallMethodNoArgs(t, is_neg), Py_False) ||
          !is(PyObject_CallOneArg(wrapped_.ptr(), t), Py_False)) {
        return false;
      }
    }
    return true;
  }

  bool fits_dicts(PyObject* own) const {
    if (static_cast<size_t>(PyTuple_GET_SIZE(own)) != own_.size()) return false;
    for (size_t i = 0; i < own_.size(); ++i) {
      for (const Entry& row : own_[i]) {
        if (!holds(PyTuple_GET_ITEM(own, i), row.first.ptr(), row.second.ptr())) return false;
      }
    }
    for (const Row& row : held_) {
      if (!holds(std::get<0>(row).ptr(), std::get<1>(row).ptr(), std::get<2>(row).ptr())) return false;
    }
    return true;
  }

  bool fits_answers() const {
    for (const Row& row : asked_) {
      PyObject *const function = std::get<0>(row).ptr(), *const arguments = std::get<1>(row).ptr();
      PyObject* const said =
          PyTuple_GET_SIZE(arguments) == 0 ? PyObject_CallNoArgs(function) : PyObject_CallObject(function, arguments);
      if (!is(said, std::get<2>(row).ptr())) return false;
    }
    return true;
  }

  std::vector<Row> held_, asked_;
  std::vector<std::vector<Entry>> own_;
  std::vector<Kind> kinds_;
  pybind11::object wrapped_;
};

inline void bind_known(pybind11::module_& m) {
  pybind11::class_<Known> c(m, "Known", pybind11::module_local(),
                            "What a call of a kind finds as an earlier one did (trtkern/ops/_again.py).");
  c.def(pybind11::init<const pybind11::tuple&, const pybind11::tuple&, const pybind11::tuple&, const pybind11::tuple&,
                       pybind11::object>(),
        pybind11::arg("held"), pybind11::arg("asked"), pybind11::arg("own"), pybind11::arg("kinds"),
        pybind11::arg("wrapped"));
  c.def("fits", &Known::fits, pybind11::arg("own"), pybind11::arg("tensors"),
        "Whether all of it is as it was: entries of the dicts `own` and of others, what functions say, and of the "
        "tensors their type, shape, strides, dtype, device and whether they require a gradient.");
}

}  // namespace trtkern
