#include "sinr_field/sample_power_domain.cuh"
#include "sinr_field/sampler_launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

SamplerPlan plan_sample_power_domain(int64_t num_densities, int64_t num_realisations, int64_t intervals,
                                     int64_t max_grid) {
  return plan_densities(num_densities, num_realisations, intervals,
                        power_blocks_per_sm(densities_per_walk(num_densities)), max_grid);
}

Status sample_power_domain(const PowerDomainParams& params, const ExecutionContext& context) {
  const int64_t intervals = int64_t{params.inverse_keys.count} + params.measure_keys.count;
  const SamplerPlan plan =
      plan_sample_power_domain(params.num_densities, params.num_realisations, intervals, max_grid());
  const Status status = with_plan(plan, [&]<int kDensities, int kIntervals>() {
    const LaunchConfig config{.kernel = "sample_power_domain",
                              .grid = plan.grid,
                              .block_x = plan.block_x,
                              .shared_bytes = sizeof(SamplerShared<kDensities, kIntervals>)};
    return launch(config, context, power_domain_kernel<kDensities, kIntervals>, params, plan);
  });
  return status.is_ok() ? fold_cells(params, context) : status;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
