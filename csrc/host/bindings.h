// How a file adds functions to the Python module `_host` without touching a central one:
//   HOST_BINDINGS(module) { submodule(module, "my_op").def("plan", &plan); }
// For launch plans (csrc/<family>/*_host.cpp) and emulated test kernels (tests/simt/kernels/*.cpp). No torch here:
// memory comes as buffers (numpy arrays) or as addresses.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/op.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::host {

namespace py = pybind11;

using AddBindings = void (*)(py::module_&);
struct Registrar {
  explicit Registrar(AddBindings add_bindings) : add(add_bindings), next(first) { first = this; }
  AddBindings add;
  Registrar* next;
  static Registrar* first;
};

#define HOST_BINDINGS(module)                                                                                 \
  static void add_host_bindings(::pybind11::module_& module);                                                 \
  static const ::tokenweave::TOKENWEAVE_BACKEND::host::Registrar host_bindings_registrar(&add_host_bindings); \
  static void add_host_bindings([[maybe_unused]] ::pybind11::module_& module)

// `_host.<name>`, made at first use: several files may add to one submodule.
inline py::module_ submodule(py::module_& module, const char* name) {
  if (py::hasattr(module, name)) return py::reinterpret_borrow<py::module_>(module.attr(name));
  return module.def_submodule(name);
}

// A launch that failed, in Python: `_host.simt.Fault`, a RuntimeError.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void raise_unless_ok(const Status& status) {
  if (!status.is_ok()) throw Fault(status.message());
}

// "bf16", "fp16" or "fp32".
inline DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype must be bf16, fp16 or fp32, got " + name);
}

// The data of a contiguous array whose elements are as wide as T; None gives null.
template <class T>
T* data_of(const py::object& object) {
  if (object.is_none()) return nullptr;
  const auto array = py::cast<py::array>(object);
  if (array.itemsize() != static_cast<py::ssize_t>(sizeof(T)) || (array.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument("expected a contiguous array of " + std::to_string(sizeof(T)) + "-byte elements");
  }
  return static_cast<T*>(const_cast<void*>(array.data()));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::host
