// The launch plan and the split of rows over ranks, shown to Python: tested with sizes no test could allocate.
#include "allreduce_rmsnorm/allreduce.h"
#include "host/bindings.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  py::class_<AllreducePlan>(m, "AllreducePlan")
      .def_readonly("packs_per_thread", &AllreducePlan::packs_per_thread)
      .def_readonly("rows_in_flight", &AllreducePlan::rows_in_flight)
      .def_readonly("block_x", &AllreducePlan::block_x)
      .def_readonly("grid", &AllreducePlan::grid);
  m.def(
      "plan_allreduce",
      [](int64_t num_tokens, int64_t hidden, const std::string& dtype, int32_t world_size, int32_t max_ctas) {
        return plan_allreduce(num_tokens, hidden, host::dtype_of(dtype), world_size, max_ctas);
      },
      py::arg("num_tokens"), py::arg("hidden"), py::arg("dtype"), py::arg("world_size"), py::arg("max_ctas"));
  m.def(
      "owned_rows",
      [](int64_t num_tokens, int32_t world_size, int32_t rank) {
        const RowRange range = owned_rows(num_tokens, world_size, rank);
        return py::make_tuple(range.begin, range.end);
      },
      py::arg("num_tokens"), py::arg("world_size"), py::arg("rank"));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
