// The launch plan, shown to Python: it is tested with sizes no test could allocate.
#include "anchor_decoding/decode_step.h"
#include "core/launch.h"
#include "host/bindings.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

HOST_BINDINGS(m) {
  namespace py = pybind11;
  py::class_<DecodeStepPlan>(m, "DecodeStepPlan")
      .def_readonly("block_x", &DecodeStepPlan::block_x)
      .def_readonly("segments_per_block", &DecodeStepPlan::segments_per_block)
      .def_readonly("blocks_per_row", &DecodeStepPlan::blocks_per_row)
      .def_readonly("grid", &DecodeStepPlan::grid)
      .def_readonly("features", &DecodeStepPlan::features);
  m.def("plan_decode_step", &plan_decode_step, py::arg("batch"), py::arg("block_length"), py::arg("vocab"),
        py::arg("features") = 0, py::arg("max_grid") = kMaxGrid);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
