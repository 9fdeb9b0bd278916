// RMSNorm with an optional residual add: the contract shared by rms_norm, rms_norm_out, add_rms_norm_ and the training
// forms. The meaning stands in tokenweave_ops/reference/allreduce_rmsnorm.py; the glue has checked everything stated
// here.
#pragma once

#include "core/op.h"
#include "core/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int64_t kMaxHidden = 65536;

struct RmsNormParams {
  int64_t num_rows = 0;
  int64_t hidden = 0;  // 1 .. kMaxHidden
  DType dtype = DType::bf16;
  float eps = 0.0f;          // >= 0
  float weight_bias = 0.0f;  // 1 for models that store weight - 1 (Gemma)

  const void* x = nullptr;
  const void* residual = nullptr;  // null: h = x, and h below is not written
  const void* weight = nullptr;    // [hidden], contiguous
  void* y = nullptr;               // may be x
  void* h = nullptr;               // may be residual
  float* rstd = nullptr;           // [num_rows] or null
  RowLayout x_rows, residual_rows, y_rows, h_rows;
};

// y = round((h * rstd) * (weight + weight_bias)), h = round(x + residual), rstd = 1 / sqrt(mean(h^2) + eps).
Status rms_norm(const RmsNormParams& params, const ExecutionContext& context);

// How the CUDA launcher maps rows to the grid: a pure function of the sizes, the element type and the alignment.
struct RmsNormPlan {
  int32_t packs_per_thread = 0;  // 16-byte packs of a row each thread keeps in registers; 0: the scalar two-pass kernel
  int32_t block_x = 0;           // threads on one row
  int32_t block_y = 0;           // rows of a block
  int64_t grid = 0;              // blocks; each strides over the rows if there are more
};
RmsNormPlan plan_rms_norm(int64_t num_rows, int64_t hidden, DType dtype, bool aligned, int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
