// The words an op's contract (<op>.h) is written in: element type, where the work runs, how it reports.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

enum class DType : int32_t { bf16, fp16, fp32 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }
constexpr const char* name_of(DType dtype) {
  return dtype == DType::bf16 ? "bf16" : dtype == DType::fp16 ? "fp16" : "fp32";
}

// Runs body(begin, end, argument) over disjoint pieces of [begin, end), each at least `grain` long, on the caller's
// thread pool. Kernels get it as a pointer because they know no torch and must not bring a second pool.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* argument), void* argument);

struct ExecutionContext {
  void* stream = nullptr;              // CUDA: the stream to launch on
  ParallelFor parallel_for = nullptr;  // CPU: the thread pool
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
