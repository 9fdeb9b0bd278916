#include "sinr_field/sample_geometry.cuh"
#include "sinr_field/sampler_launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

SamplerPlan plan_sample_geometry(int64_t num_densities, int64_t num_realisations, int64_t intervals, int64_t max_grid) {
  return plan_densities(num_densities, num_realisations, intervals, kGeometryBlocksPerSm, max_grid);
}

Status sample_geometry(const SampleGeometryParams& params, const ExecutionContext& context) {
  const int64_t intervals = 2 * int64_t{params.fading_keys.count} + params.gain_keys.count;
  const SamplerPlan plan = plan_sample_geometry(params.num_densities, params.num_realisations, intervals, max_grid());
  const Status status = with_plan(plan, [&]<int kDensities, int kIntervals>() {
    const LaunchConfig config{.kernel = "sample_geometry",
                              .grid = plan.grid,
                              .block_x = plan.block_x,
                              .shared_bytes = sizeof(SamplerShared<kDensities, kIntervals>)};
    return launch(config, context, geometry_kernel<kDensities, kIntervals>, params, plan);
  });
  return status.is_ok() ? fold_cells(params, context) : status;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
