// The launch plan, the split of rows over ranks and the time of an emulated link, shown to Python: tested with sizes no
// test could allocate.
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
  m.def(
      "link_ns",
      [](double gigabytes_per_s, double latency_us, bool is_gather, int64_t op_bytes, int32_t world_size) {
        const Collective collective = is_gather ? Collective::gather : Collective::allreduce;
        return link_ns({gigabytes_per_s, latency_us}, collective, op_bytes, world_size);
      },
      py::arg("gigabytes_per_s"), py::arg("latency_us"), py::arg("is_gather"), py::arg("op_bytes"),
      py::arg("world_size"));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
