#include "barriers.cuh"

#include "harness.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using host::data_of;
using host::run_kernel;
namespace py = pybind11;

// Deep recursion in the last thread, when the threads whose stacks lie below have ended.
static __attribute__((noinline)) float recurse(int depth) {
  volatile float frame[256];
  for (int i = 0; i < 256; ++i) frame[i] = static_cast<float>(depth);
  return depth == 0 ? frame[3] : recurse(depth - 1) + frame[depth % 256];
}

static void deep_stack(float* out, int32_t depth) {
  if (arch::thread_index() != static_cast<int>(blockDim.x) - 1) return;
  arch::nanosleep(1000);  // until the others have ended: an overflow then hits nothing alive
  *out = recurse(depth);
}

static void throws() {
  if (arch::thread_index() == 11) throw std::runtime_error("thrown by a kernel");
  arch::sync_block();
}

HOST_BINDINGS(module) {
  py::module_ m = host::submodule(module, "barriers");
  m.def("reverse", [](py::object in, py::object out, int grid, int block, int rounds, int barriers) {
    run_kernel({"reverse", grid, block, 1, sizeof(ReverseShared)}, &reverse, data_of<float>(in), data_of<float>(out),
               rounds, static_cast<Barriers>(barriers));
  });
  m.def("barrier_fault",
        [](int fault) { run_kernel({"barrier_fault", 3, 32, 2}, &barrier_fault, static_cast<BarrierFault>(fault)); });
  m.def("shared_fault", [](int fault, int missing_bytes) {
    const auto bytes = static_cast<int64_t>(sizeof(ReverseShared)) - missing_bytes;
    run_kernel({"shared_fault", 1, 64, 1, bytes}, &shared_fault, static_cast<SharedFault>(fault));
  });
  m.def("warp_fault", [](py::object out, int block, int fault) {
    run_kernel({"warp_fault", 1, block}, &warp_fault, data_of<uint32_t>(out), static_cast<WarpFault>(fault));
  });
  m.def("deep_stack",
        [](py::object out, int depth) { run_kernel({"deep_stack", 1, 32}, &deep_stack, data_of<float>(out), depth); });
  m.def("throws", [] { run_kernel({"throws", 1, 64}, &throws); });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
