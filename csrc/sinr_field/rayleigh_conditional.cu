#include "sinr_field/rayleigh_conditional.cuh"
#include "sinr_field/sampler_launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

SamplerPlan plan_rayleigh_conditional(int64_t num_densities, int64_t num_thresholds, int64_t num_realisations,
                                      int64_t max_grid) {
  const int64_t groups = (num_thresholds + kRayleighThresholds - 1) / kRayleighThresholds;
  return plan_tiles(num_realisations, kRayleighThresholds, groups * num_densities, kRayleighBlocksPerSm, max_grid);
}

Status rayleigh_conditional(const RayleighParams& params, const ExecutionContext& context) {
  const SamplerPlan plan =
      plan_rayleigh_conditional(params.num_densities, params.num_thresholds, params.num_realisations, max_grid());
  const auto launch_kernel = [&]<bool kStrongest>() {
    const LaunchConfig config{.kernel = "rayleigh_conditional",
                              .grid = plan.grid,
                              .block_x = plan.block_x,
                              .shared_bytes = sizeof(RayleighShared<kStrongest>)};
    return launch(config, context, rayleigh_kernel<kStrongest>, params, plan);
  };
  const Status status =
      params.nearest ? launch_kernel.template operator()<false>() : launch_kernel.template operator()<true>();
  return status.is_ok() ? fold_cells(params, context) : status;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
