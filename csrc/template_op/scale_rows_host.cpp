// The launch plan, shown to Python for its tests.
#include "core/launch.h"
#include "host/bindings.h"
#include "template_op/scale_rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  py::class_<ScaleRowsPlan>(m, "ScaleRowsPlan")
      .def_readonly("block_x", &ScaleRowsPlan::block_x)
      .def_readonly("grid", &ScaleRowsPlan::grid);
  m.def("plan_scale_rows", &plan_scale_rows, py::arg("num_rows"), py::arg("hidden"), py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
