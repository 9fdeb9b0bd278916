// The launch plan, shown to Python for its tests.
#include "core/launch.h"
#include "host/bindings.h"
#include "sinr_field/rayleigh_conditional.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  m.def("plan_rayleigh_conditional", &plan_rayleigh_conditional, py::arg("num_densities"), py::arg("num_thresholds"),
        py::arg("num_realisations"), py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
