// rayleigh_conditional on a GPU.
// Mapping: as in sampler.cuh, but a walk serves 8 thresholds of one density. The strongest cell keeps its gains in
// shared memory, each read by the thread that wrote it.
// Limit: issue of arithmetic, a few instructions for each point and threshold; for the strongest cell, for each pair of
// points and threshold.
#pragma once

#include "sinr_field/rayleigh.cuh"
#include "sinr_field/sampler.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int kRayleighThresholds = 8;
constexpr int32_t kRayleighBlocksPerSm = 2;  // for the nearest cell

template <bool kStrongest>
struct RayleighShared {
  arch::Array<uint32_t, kRayleighThresholds * kMetaBins> counts;
  arch::Array<float, kStrongest ? kMaxServers * kSamplerThreads : 1> gains;
};

struct GainTables {
  const RayleighParams& p;
  TW_MEMBER float gain(float s) const { return interpolate(find(p.gain_keys, s), ReadGlobal{p.gain}); }
  TW_MEMBER float far_mean(float s) const { return interpolate(find(p.far_keys, s), ReadGlobal{p.far}); }
  TW_MEMBER float far_deviation(float s) const {
    return interpolate(find(p.far_keys, s), ReadGlobal{p.far + int64_t{4} * p.far_keys.count});
  }
};

template <class Array>
struct SharedGains {
  Array& gains;
  TW_MEMBER void set(int32_t i, float gain) { gains[i * kSamplerThreads + arch::thread_index()] = gain; }
  TW_MEMBER float get(int32_t i) const { return gains[i * kSamplerThreads + arch::thread_index()]; }
};

// registers: <= 168
template <bool kStrongest>
TW_KERNEL void __launch_bounds__(kSamplerThreads, kStrongest ? 1 : kRayleighBlocksPerSm)
    rayleigh_kernel(const RayleighParams p, const SamplerPlan plan) {
  using Shared = RayleighShared<kStrongest>;
  Shared& shared = arch::shared<Shared>();
  for (int32_t bin = arch::thread_index(); bin < kRayleighThresholds * kMetaBins; bin += kSamplerThreads) {
    shared.counts[bin] = 0;
  }
  arch::sync_block();
  const GainTables tables{p};
  SharedGains<decltype(shared.gains)> gains{shared.gains};
  const int64_t cells = num_cells(p.num_realisations);
  const int64_t groups_per_density = (p.num_thresholds + kRayleighThresholds - 1) / kRayleighThresholds;
  int64_t group = -1;
  const auto first_row = [&] {  // of density and threshold
    return group / groups_per_density * p.num_thresholds + group % groups_per_density * kRayleighThresholds;
  };
  const auto num_thresholds = [&] {
    const int64_t left = p.num_thresholds - group % groups_per_density * kRayleighThresholds;
    return left < kRayleighThresholds ? static_cast<int32_t>(left) : kRayleighThresholds;
  };
  const auto flush_group = [&] {
    arch::sync_block();
    flush_counts(shared.counts, num_thresholds() * kMetaBins, p.histogram + first_row() * kMetaBins);
    arch::sync_block();
  };
  for (int64_t tile = blockIdx.x; tile < plan.num_tiles; tile += gridDim.x) {
    if (tile / plan.tiles_per_group != group) {
      if (group >= 0) flush_group();
      group = tile / plan.tiles_per_group;
    }
    const int64_t cell = tile % plan.tiles_per_group * kSamplerWarps + arch::warp_index();
    if (cell >= cells) continue;
    const int64_t density = group / groups_per_density;
    const int32_t thresholds = num_thresholds();
    float log2_thresholds[kRayleighThresholds];
#pragma unroll
    for (int t = 0; t < kRayleighThresholds; ++t) {
      const int64_t first = group % groups_per_density * kRayleighThresholds;
      log2_thresholds[t] = p.log2_thresholds[first + (t < thresholds ? t : 0)];
    }
    LaneSum sums[kRayleighThresholds];
    for (int row = 0; row < kCellRows; ++row) {
      const int64_t index = cell * kCell + row * arch::kWarpSize + arch::lane_index();
      const bool is_live = index < p.num_realisations;
      Rayleigh<float, kRayleighThresholds, GainTables, decltype(gains)> walker(p, tables, gains, p.scales + 2 * density,
                                                                               log2_thresholds);
      if constexpr (kStrongest) {
        walker.walk_strongest(realisation(p, index));
      } else {
        walker.walk_nearest(realisation(p, index));
      }
#pragma unroll
      for (int t = 0; t < kRayleighThresholds; ++t) {
        const double coverage = walker.coverage[t];
        sums[t].add(is_live, coverage);
        if (!is_live || t >= thresholds) continue;
        arch::add_shared(shared.counts[t * kMetaBins + meta_bin(coverage)], 1);
        if (p.samples == nullptr) continue;
        p.samples[(first_row() + t) * p.num_realisations + index] = static_cast<float>(coverage);
      }
    }
    double* destination = p.cell_sums + 2 * (cell * p.num_densities * p.num_thresholds + first_row());
#pragma unroll
    for (int t = 0; t < kRayleighThresholds; ++t) {
      if (t < thresholds) sums[t].store(destination + 2 * t);
    }
  }
  if (group >= 0) flush_group();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
