#include "multimem.cuh"

#include "harness.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using host::data_of;
using host::run_kernel;
namespace py = pybind11;

// A multicast address is a number here: nothing stands behind it.
template <class T = Vec16>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T = Vec16>
static T* pieces_of(const py::object& array) {
  return reinterpret_cast<T*>(data_of<uint32_t>(array));
}

HOST_BINDINGS(module) {
  py::module_ m = host::submodule(module, "multimem");
  m.def("load_add", [](const std::string& dtype, uintptr_t multicast, uintptr_t out, int num_pieces) {
    with_dtype(host::dtype_of(dtype),
               [&]<class T>() { run_kernel({"load_add", 1, num_pieces}, &load_add<T>, at(multicast), at(out)); });
  });
  m.def("broadcast", [](py::object in, uintptr_t multicast, int num_pieces) {
    run_kernel({"broadcast", 1, num_pieces}, &broadcast, pieces_of(in), at(multicast));
  });
  m.def("count", [](uintptr_t multicast, int grid, int block, int rounds) {
    run_kernel({"count", grid, block}, &count, at<uint64_t>(multicast), rounds);
  });
  m.def("read_own_stores", [](py::object rank0, py::object rank1, uintptr_t multicast, py::object errors, int block) {
    run_kernel({"read_own_stores", 1, block}, &read_own_stores, data_of<float>(rank0), data_of<float>(rank1),
               at(multicast), data_of<uint32_t>(errors));
  });
  m.def("watch", [](py::object rank0, py::object rank1, uintptr_t multicast, py::object ahead, int reach) {
    run_kernel({"watch", 2, 1}, &watch, data_of<uint64_t>(rank0), data_of<uint64_t>(rank1), at<uint64_t>(multicast),
               data_of<uint32_t>(ahead), static_cast<Reach>(reach));
  });
  m.def("all_reduce", [](py::list buffers, py::list pads, uintptr_t multicast_buffer, uintptr_t multicast_pad, int rank,
                         py::object in, py::object out, py::object ok, int num_pieces, int what) {
    MultimemPeers peers{};
    for (size_t peer = 0; peer < buffers.size(); ++peer) {
      peers.buffer[peer] = pieces_of(buffers[peer]);
      peers.pad[peer] = data_of<uint64_t>(pads[peer]);
    }
    peers.multicast_buffer = at(multicast_buffer);
    peers.multicast_pad = at<uint64_t>(multicast_pad);
    peers.rank = rank;
    peers.num_ranks = static_cast<int32_t>(buffers.size());
    run_kernel({"multimem_all_reduce", 1, num_pieces}, &multimem_all_reduce, peers, pieces_of(in), pieces_of(out),
               data_of<uint32_t>(ok), static_cast<Break>(what));
  });
  m.def("misuse", [](uintptr_t address, int what) {
    run_kernel({"misuse", 1, 32}, &misuse, at(address), static_cast<Misuse>(what));
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
