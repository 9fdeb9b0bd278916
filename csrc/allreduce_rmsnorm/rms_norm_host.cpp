// The launch plan, shown to Python: it is tested with sizes no test could allocate.
#include "allreduce_rmsnorm/rms_norm.h"
#include "core/launch.h"
#include "host/bindings.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  py::class_<RmsNormPlan>(m, "RmsNormPlan")
      .def_readonly("packs_per_thread", &RmsNormPlan::packs_per_thread)
      .def_readonly("block_x", &RmsNormPlan::block_x)
      .def_readonly("block_y", &RmsNormPlan::block_y)
      .def_readonly("grid", &RmsNormPlan::grid);
  m.def(
      "plan_rms_norm",
      [](int64_t num_rows, int64_t hidden, const std::string& dtype, bool aligned, int64_t max_grid) {
        return plan_rms_norm(num_rows, hidden, host::dtype_of(dtype), aligned, max_grid);
      },
      py::arg("num_rows"), py::arg("hidden"), py::arg("dtype"), py::arg("aligned"), py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
