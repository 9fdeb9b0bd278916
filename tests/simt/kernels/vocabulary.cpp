#include "vocabulary.cuh"

#include "harness.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using host::data_of;
using host::run_kernel;
namespace py = pybind11;

static int64_t blocks_for(int64_t n, int block) { return (n + block - 1) / block; }

HOST_BINDINGS(module) {
  py::module_ m = host::submodule(module, "vocabulary");
  m.def("warp_sums", [](py::object in, py::object out, int grid, int block) {
    run_kernel({"warp_sums", grid, block}, &warp_sums, data_of<float>(in), data_of<float>(out));
  });
  m.def("warp_sums_fp64", [](py::object in, py::object out, int grid, int block) {
    run_kernel({"warp_sums_fp64", grid, block}, &warp_sums_fp64, data_of<double>(in), data_of<double>(out));
  });
  m.def("count_shared", [](py::object in, py::object out, int64_t n, int grid, int block) {
    run_kernel({"count_shared", grid, block, 1, sizeof(CountsStorage)}, &count_shared, data_of<uint32_t>(in),
               data_of<uint32_t>(out), n);
  });
  m.def("block_sums", [](py::object in, py::object out, int grid, int block_x, int block_y) {
    run_kernel({"block_sums", grid, block_x, block_y, sizeof(BlockSumStorage)}, &block_sums, data_of<float>(in),
               data_of<float>(out));
  });
  // By address: the arrays start at any element.
  m.def("copy_packs", [](int dtype, uintptr_t in, uintptr_t out, py::object unpacked, int64_t num_packs) {
    with_dtype(static_cast<DType>(dtype), [&]<class T>() {
      run_kernel({"copy_packs", 1, 64}, &copy_packs<T>, reinterpret_cast<const T*>(in), reinterpret_cast<T*>(out),
                 data_of<float>(unpacked), num_packs);
    });
  });
  m.def("pack_set", [](const std::string& dtype, py::object words, int place, float value) {
    with_dtype(host::dtype_of(dtype), [&]<class T>() {
      run_kernel({"set_element", 1, 32}, &set_element<T>, data_of<uint32_t>(words), place, value);
    });
  });
  m.def("philox", [](py::object counters, py::object keys, py::object out, py::object uniforms, int64_t n) {
    run_kernel({"philox", blocks_for(n, 32), 32}, &philox,
               reinterpret_cast<const PhiloxBlock*>(data_of<uint32_t>(counters)), data_of<uint32_t>(keys),
               reinterpret_cast<PhiloxBlock*>(data_of<uint32_t>(out)), data_of<float>(uniforms), n);
  });
  m.def("widen", [](int dtype, py::object in, py::object out, int64_t n) {
    const LaunchConfig config{"widen", blocks_for(n, 256), 256};
    if (static_cast<DType>(dtype) == DType::bf16) {
      run_kernel(config, &widen<bf16>, reinterpret_cast<const bf16*>(data_of<uint16_t>(in)), data_of<float>(out), n);
    } else {
      run_kernel(config, &widen<fp16>, reinterpret_cast<const fp16*>(data_of<uint16_t>(in)), data_of<float>(out), n);
    }
  });
  m.def("narrow", [](int dtype, py::object in, py::object out, int64_t n) {
    const LaunchConfig config{"narrow", blocks_for(n, 256), 256};
    if (static_cast<DType>(dtype) == DType::bf16) {
      run_kernel(config, &narrow<bf16>, data_of<float>(in), reinterpret_cast<bf16*>(data_of<uint16_t>(out)), n);
    } else {
      run_kernel(config, &narrow<fp16>, data_of<float>(in), reinterpret_cast<fp16*>(data_of<uint16_t>(out)), n);
    }
  });
  m.def("warp_op", [](py::object values, py::object operands, py::object masks, py::object out, int op) {
    run_kernel({"warp_op", 1, 32}, &warp_op, data_of<uint32_t>(values), data_of<uint32_t>(operands),
               data_of<uint32_t>(masks), data_of<uint32_t>(out), static_cast<WarpOp>(op));
  });
  m.def("memory_ops", [](int bytes, py::object words, py::object ops, py::object which, py::object a, py::object b,
                         py::object results, int steps, bool sys_scope) {
    const LaunchConfig config{"memory_ops", 1, 32};
    const auto run = [&]<class T>() {
      run_kernel(config, &memory_ops<T>, data_of<T>(words), data_of<int32_t>(ops), data_of<int32_t>(which),
                 data_of<T>(a), data_of<T>(b), data_of<T>(results), steps, sys_scope);
    };
    bytes == 4 ? run.operator()<uint32_t>() : run.operator()<uint64_t>();
  });
  m.def("arithmetic", [](py::object a, py::object b, py::object c, py::object out, int64_t n, int op) {
    run_kernel({"arithmetic", blocks_for(n, 128), 128}, &arithmetic, data_of<float>(a), data_of<float>(b),
               data_of<float>(c), data_of<float>(out), n, static_cast<Arithmetic>(op));
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
