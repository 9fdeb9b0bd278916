// The launch plan, shown to Python for its tests.
#include "core/launch.h"
#include "host/bindings.h"
#include "sinr_field/sample_geometry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  m.def("plan_sample_geometry", &plan_sample_geometry, py::arg("num_densities"), py::arg("num_realisations"),
        py::arg("intervals"), py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
