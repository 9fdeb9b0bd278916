#include "core/launch.h"
#include "template_op/scale_rows.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

ScaleRowsPlan plan_scale_rows(int64_t num_rows, int64_t hidden, int64_t max_grid) {
  ScaleRowsPlan plan;
  plan.block_x = hidden >= 256 ? 256 : static_cast<int32_t>((hidden + 31) / 32 * 32);
  plan.grid = num_rows < max_grid ? num_rows : max_grid;
  return plan;
}

Status scale_rows(const ScaleRowsParams& params, const ExecutionContext& context) {
  const ScaleRowsPlan plan = plan_scale_rows(params.num_rows, params.hidden, max_grid());
  const LaunchConfig config{.kernel = "scale_rows", .grid = plan.grid, .block_x = plan.block_x};
  return with_dtype(params.dtype, [&]<class T>() { return launch(config, context, scale_rows_kernel<T>, params); });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
