// How the launchers of the samplers make their plans and fold their cells.
#pragma once

#include "core/launch.h"
#include "sinr_field/sampler.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// `group`: densities or thresholds that one walk serves; `num_groups` of them.
inline SamplerPlan plan_tiles(int64_t num_realisations, int32_t group, int64_t num_groups, int32_t blocks_per_sm,
                              int64_t max_grid) {
  SamplerPlan plan;
  plan.block_x = kSamplerThreads;
  plan.densities = group;
  plan.tiles_per_group = (num_cells(num_realisations) + kSamplerWarps - 1) / kSamplerWarps;
  plan.num_tiles = plan.tiles_per_group * num_groups;
  // Four waves on 132 SMs: tables are loaded rarely, and a last wave that is not full costs little.
  const int64_t enough = int64_t{4} * blocks_per_sm * 132;
  plan.grid = plan.num_tiles < enough ? plan.num_tiles : enough;
  if (plan.grid > max_grid) plan.grid = max_grid;
  return plan;
}

constexpr int32_t densities_per_walk(int64_t num_densities) { return num_densities > 1 ? 2 : 1; }

inline SamplerPlan plan_densities(int64_t num_densities, int64_t num_realisations, int64_t intervals,
                                  int32_t blocks_per_sm, int64_t max_grid) {
  const int32_t group = densities_per_walk(num_densities);
  SamplerPlan plan = plan_tiles(num_realisations, group, (num_densities + group - 1) / group, blocks_per_sm, max_grid);
  plan.intervals = intervals <= kFewIntervals ? kFewIntervals : kManyIntervals;
  return plan;
}

// The second launch of every sampler: cells into batches.
inline Status fold_cells(const SamplerParams& p, const ExecutionContext& context) {
  const int64_t sums = num_batches(p.num_realisations) * 2 * p.num_items * p.num_densities;
  const int64_t blocks = (sums + kSamplerThreads - 1) / kSamplerThreads;
  const int64_t most = max_grid() < 65536 ? max_grid() : 65536;
  const LaunchConfig config{.kernel = "fold_cells", .grid = blocks < most ? blocks : most, .block_x = kSamplerThreads};
  return launch(config, context, fold_cells_kernel<kSamplerThreads>, p);
}

// launch.operator()<kDensities, kIntervals>() for what the plan chose.
template <class Launch>
Status with_plan(const SamplerPlan& plan, const Launch& launch) {
  if (plan.densities == 1) {
    return plan.intervals == kFewIntervals ? launch.template operator()<1, kFewIntervals>()
                                           : launch.template operator()<1, kManyIntervals>();
  }
  return plan.intervals == kFewIntervals ? launch.template operator()<2, kFewIntervals>()
                                         : launch.template operator()<2, kManyIntervals>();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
