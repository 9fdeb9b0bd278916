// scale_rows: y[r, :] = x[r, :] * scale[r]. The template for a new op: trivial on purpose, complete in every file.
#pragma once

#include "core/op.h"
#include "core/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct ScaleRowsParams {
  int64_t num_rows = 0;
  int64_t hidden = 0;
  DType dtype = DType::bf16;
  const void* x = nullptr;
  const float* scale = nullptr;  // [num_rows]
  void* y = nullptr;             // contiguous
  RowLayout x_rows;
};

// y = round(fp32(x) * scale). Defined once per backend: scale_rows.cu (CUDA and emulated) and scale_rows_cpu.cpp.
Status scale_rows(const ScaleRowsParams& params, const ExecutionContext& context);

struct ScaleRowsPlan {
  int32_t block_x = 0;  // threads on one row
  int64_t grid = 0;     // blocks; each strides over the rows if there are more
};
ScaleRowsPlan plan_scale_rows(int64_t num_rows, int64_t hidden, int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
