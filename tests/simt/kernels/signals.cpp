#include "signals.cuh"

#include "harness.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using host::data_of;
using host::run_kernel;
namespace py = pybind11;

static Peers peers_of(const py::list& buffers, const py::list& pads) {
  Peers peers{};
  for (size_t rank = 0; rank < buffers.size(); ++rank) {
    peers.buffer[rank] = data_of<uint32_t>(buffers[rank]);
    peers.pad[rank] = data_of<uint32_t>(pads[rank]);
  }
  return peers;
}

HOST_BINDINGS(module) {
  py::module_ m = host::submodule(module, "signals");
  m.def("produce", [](py::object data, py::object flag, uint32_t value, int publish, int block) {
    run_kernel({"produce", 1, block}, &produce, reinterpret_cast<Vec16*>(data_of<uint32_t>(data)),
               data_of<uint32_t>(flag), value, static_cast<Publish>(publish));
  });
  m.def("consume", [](py::object data, py::object flag, py::object out, uint32_t value, int how, int block) {
    run_kernel({"consume", 1, block}, &consume, reinterpret_cast<const Vec16*>(data_of<uint32_t>(data)),
               data_of<uint32_t>(flag), data_of<uint32_t>(out), value, static_cast<Consume>(how));
  });
  m.def("all_to_all", [](py::list buffers, py::list pads, py::object out, py::object ok, int rank, int grid, int block,
                         uint32_t late_ns, bool release, bool acquire) {
    run_kernel({"all_to_all", grid, block}, &all_to_all, peers_of(buffers, pads), data_of<uint32_t>(out),
               data_of<uint32_t>(ok), rank, static_cast<int32_t>(buffers.size()), late_ns, release, acquire);
  });
  m.def("grid_barrier", [](py::object cells, py::object counter, py::object out, int grid, int block, int rounds,
                           int barrier, bool cooperative) {
    LaunchConfig config{"grid_barrier", grid, block};
    config.cooperative = cooperative;
    run_kernel(config, &grid_barrier, data_of<uint32_t>(cells), data_of<uint32_t>(counter), data_of<uint32_t>(out),
               rounds, static_cast<GridBarrier>(barrier));
  });
  m.def("wait_in_vain", [](py::object flag, py::object elapsed_ns, py::object result, int how) {
    run_kernel({"wait_in_vain", 2, 64}, &wait_in_vain, data_of<uint32_t>(flag), data_of<uint64_t>(elapsed_ns),
               data_of<uint32_t>(result), static_cast<Wait>(how));
  });
  m.def("record_schedule", [](py::object counter, py::object order, int grid, int block, int steps) {
    run_kernel({"record_schedule", grid, block}, &record_schedule, data_of<uint32_t>(counter), data_of<uint32_t>(order),
               steps);
  });
  m.def("read_own_writes", [](py::object memory, py::object errors, int block, int rounds) {
    run_kernel({"read_own_writes", 1, block}, &read_own_writes, reinterpret_cast<Vec16*>(data_of<uint32_t>(memory)),
               data_of<uint32_t>(errors), rounds);
  });
  m.def("coherence", [](py::object word, py::object errors, int rounds) {
    run_kernel({"coherence", 3, 64, 1, sizeof(CoherenceShared)}, &coherence, data_of<uint32_t>(word),
               data_of<uint32_t>(errors), rounds);
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
