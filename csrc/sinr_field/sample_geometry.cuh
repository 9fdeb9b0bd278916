// sample_geometry on a GPU: the marks' table and the gain's, if it is one, in shared memory, the far field's, read once
// for each realisation, in global memory. Mapping, bytes and limit: sampler.cuh.
#pragma once

#include "sinr_field/geometry.cuh"
#include "sinr_field/sampler.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <class Shared>
struct GeometryTables {
  const SampleGeometryParams& p;
  const Shared& shared;

  TW_MEMBER float mark(uint32_t word) const {
    return interpolate(find_quantile<float>(p.fading_keys, word),
                       ReadShared<decltype(shared.tables)>{shared.tables, 0});
  }
  TW_MEMBER float gain(float s) const {
    return interpolate(find(p.gain_keys, s),
                       ReadShared<decltype(shared.tables)>{shared.tables, 2 * p.fading_keys.count});
  }
  TW_MEMBER float far_mean(float s) const { return interpolate(find(p.far_keys, s), ReadGlobal{p.far}); }
  TW_MEMBER float far_deviation(float s) const {
    return interpolate(find(p.far_keys, s), ReadGlobal{p.far + int64_t{4} * p.far_keys.count});
  }
};

constexpr int32_t kGeometryBlocksPerSm = 2;

// registers: <= 128
template <int kDensities, int kIntervals>
TW_KERNEL void __launch_bounds__(kSamplerThreads, kGeometryBlocksPerSm)
    geometry_kernel(const SampleGeometryParams p, const SamplerPlan plan) {
  using Shared = SamplerShared<kDensities, kIntervals>;
  Shared& shared = arch::shared<Shared>();
  load_table(shared, 0, p.fading, 2 * p.fading_keys.count);
  if (p.num_slopes == 0) load_table(shared, 2 * p.fading_keys.count, p.gain, p.gain_keys.count);
  const GeometryTables<Shared> tables{p, shared};
  sample_tiles<Geometry<float, kDensities, GeometryTables<Shared>>, kDensities>(p, plan, tables, shared);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
