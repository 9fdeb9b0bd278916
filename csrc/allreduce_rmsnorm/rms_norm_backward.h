// The gradient of RMSNorm (and of the residual add in front of it): the contract of rms_norm_backward.
// With a = grad_y * (weight + weight_bias) and n = h * rstd, everything in fp32:
//   grad_x = round(rstd * (a - n * mean(a * n)) + grad_h),   grad_weight = round(sum over rows of grad_y * n)
#pragma once

#include "core/op.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct RmsNormBackwardParams {
  int64_t num_rows = 0;
  int64_t hidden = 0;
  DType dtype = DType::bf16;
  float weight_bias = 0.0f;

  // All rows contiguous: [num_rows, hidden].
  const void* grad_y = nullptr;
  const void* grad_h = nullptr;  // null: zero
  const void* h = nullptr;
  const void* weight = nullptr;  // [hidden]
  const float* rstd = nullptr;   // [num_rows]
  void* grad_x = nullptr;
  void* grad_weight = nullptr;  // [hidden]
  float* partials = nullptr;    // scratch, [rms_norm_backward_groups(num_rows), rms_norm_backward_pitch(hidden)]
};

// The weight gradient is summed within groups of consecutive rows, then over the groups in order: the sum's order, and
// so its bits, are a function of num_rows alone.
constexpr int64_t rms_norm_backward_groups(int64_t num_rows) { return num_rows < 256 ? num_rows : 256; }
constexpr int64_t rms_norm_backward_group_begin(int64_t num_rows, int64_t group) {
  const int64_t groups = rms_norm_backward_groups(num_rows);
  return num_rows / groups * group + (group < num_rows % groups ? group : num_rows % groups);
}

// Floats from one group's partial sums to the next: whole vectors, so that a kernel may leave its lanes in its own
// order.
constexpr int64_t rms_norm_backward_pitch(int64_t hidden) { return (hidden + 31) / 32 * 32; }

Status rms_norm_backward(const RmsNormBackwardParams& params, const ExecutionContext& context);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
