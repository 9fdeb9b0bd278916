// What differs between the libraries built from one glue file, and nothing else: namespace and dispatch key, which
// tensors are welcome, and where the work runs. The only place with an #if on the backend.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/op.h"

#if defined(TOKENWEAVE_BACKEND_CUDA)
// Declared here because torch's header hides it unless its own build flag is set.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND {

using torch::stable::Tensor;

#if defined(TOKENWEAVE_BACKEND_SIMT)
inline constexpr const char* kOpNamespace = "tokenweave_simt";
#else
inline constexpr const char* kOpNamespace = "tokenweave";
#endif

// Whether a launcher's work is done when it returns; else it may only have been queued.
#if defined(TOKENWEAVE_BACKEND_CPU)
inline constexpr bool kReturnsWhenDone = true;
#else
inline constexpr bool kReturnsWhenDone = false;
#endif

#if defined(TOKENWEAVE_BACKEND_CUDA)
inline constexpr const char* kDispatchKey = "CUDA";

// Makes the tensor's device current and finds its current stream. Construct it before anything else touches the device.
class ExecutionScope {
 public:
  explicit ExecutionScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context_.stream));
  }
  const ExecutionContext& context() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  ExecutionContext context_;
};
#else
inline constexpr const char* kDispatchKey = "CPU";

class ExecutionScope {
 public:
  explicit ExecutionScope(const Tensor&) {
    context_.parallel_for = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                               void* argument) {
      TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, argument));
    };
  }
  const ExecutionContext& context() const { return context_; }

 private:
  ExecutionContext context_;
};
#endif

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
