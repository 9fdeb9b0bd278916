// The launch plan, shown to Python for its tests.
#include "core/launch.h"
#include "host/bindings.h"
#include "sinr_field/sample_power_domain.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  py::class_<SamplerPlan>(m, "SamplerPlan")
      .def_readonly("block_x", &SamplerPlan::block_x)
      .def_readonly("densities", &SamplerPlan::densities)
      .def_readonly("intervals", &SamplerPlan::intervals)
      .def_readonly("tiles_per_group", &SamplerPlan::tiles_per_group)
      .def_readonly("num_tiles", &SamplerPlan::num_tiles)
      .def_readonly("grid", &SamplerPlan::grid);
  m.def("plan_sample_power_domain", &plan_sample_power_domain, py::arg("num_densities"), py::arg("num_realisations"),
        py::arg("intervals"), py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
