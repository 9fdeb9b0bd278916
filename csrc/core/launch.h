// The one way to start a kernel. nvcc builds it on cudaLaunchKernelEx, every other compiler on the SIMT emulator, so a
// launcher (<op>.cu) reads the same for both and `<<<...>>>` stands nowhere.
#pragma once

#include <type_traits>

#include "core/op.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <cstring>

#include "simt/simt.h"
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct LaunchConfig {
  const char* kernel = "";  // named in every error message
  int64_t grid = 0;         // blocks; at most 2^31 - 1
  int32_t block_x = 0;      // threads: x is fastest and a multiple of a warp
  int32_t block_y = 1;
  int64_t shared_bytes = 0;  // sizeof of the struct the kernel takes from arch::shared<>
  bool cooperative = false;  // all blocks resident at once, or an error
};

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

// The most blocks a launch may have: the hardware's limit, or the emulator's option, which tests lower so that kernels
// stride over their work.
inline int64_t max_grid() {
#if defined(__CUDACC__)
  return kMaxGrid;
#else
  return static_cast<int64_t>(simt::options().max_grid);
#endif
}

template <class... Parameters>
Status launch(const LaunchConfig& config, const ExecutionContext& context, void (*kernel)(Parameters...),
              std::type_identity_t<Parameters>... arguments) {
  if (config.grid == 0) return Status::ok();
  if (config.grid < 0 || config.grid > kMaxGrid || config.block_x * config.block_y > 1024) {
    return Status::error("%s: cannot launch %lld blocks of %d x %d threads", config.kernel,
                         static_cast<long long>(config.grid), config.block_x, config.block_y);
  }
#if defined(__CUDACC__)
  if (config.shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // clear it: the next caller must not inherit this launch's error
      return Status::error("%s: %lld bytes of shared memory refused: %s", config.kernel,
                           static_cast<long long>(config.shared_bytes), cudaGetErrorString(error));
    }
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t cuda_config{};
  cuda_config.gridDim = dim3(static_cast<unsigned>(config.grid));
  cuda_config.blockDim = dim3(config.block_x, config.block_y);
  cuda_config.dynamicSmemBytes = config.shared_bytes;
  cuda_config.stream = static_cast<cudaStream_t>(context.stream);
  cuda_config.attrs = &attribute;
  cuda_config.numAttrs = config.cooperative ? 1 : 0;
  cudaError_t error = cudaLaunchKernelEx(&cuda_config, kernel, arguments...);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return Status::error("%s: launch of %lld blocks of %d x %d threads failed: %s", config.kernel,
                         static_cast<long long>(config.grid), config.block_x, config.block_y,
                         cudaGetErrorString(error));
  }
  return Status::ok();
#else
  (void)context;
  simt::Launch emulated;
  emulated.kernel = config.kernel;
  emulated.grid = {static_cast<uint32_t>(config.grid), 1, 1};
  emulated.block = {static_cast<uint32_t>(config.block_x), static_cast<uint32_t>(config.block_y), 1};
  emulated.shared_bytes = static_cast<size_t>(config.shared_bytes);
  emulated.cooperative = config.cooperative;
  emulated.function = reinterpret_cast<const void*>(kernel);
  // Copied by value, as a real launch copies its parameters: a queued launch outlives this frame.
  char report[900];
  if (!simt::run(emulated, [=] { kernel(arguments...); }, report, sizeof(report))) return Status::error("%s", report);
  return Status::ok();
#endif
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
