// sample_power_domain on a GPU: the powers' table and the measure's in shared memory, the two tables of the residual,
// read once for each realisation, in global memory. Mapping, bytes and limit: sampler.cuh.
#pragma once

#include "sinr_field/power_domain.cuh"
#include "sinr_field/sampler.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <class Shared>
struct PowerTables {
  const PowerDomainParams& p;
  const Shared& shared;

  TW_MEMBER float power(float g) const {
    return interpolate(find(p.inverse_keys, g), ReadShared<decltype(shared.tables)>{shared.tables, 0});
  }
  TW_MEMBER float rest_mean(float g) const { return plane(g, 1); }
  TW_MEMBER float rest_deviation(float g) const { return plane(g, 2); }
  TW_MEMBER float measure(float z) const {
    return interpolate(find(p.measure_keys, z),
                       ReadShared<decltype(shared.tables)>{shared.tables, p.inverse_keys.count});
  }
  TW_MEMBER float plane(float g, int i) const {
    return interpolate(find(p.inverse_keys, g), ReadGlobal{p.inverse + int64_t{4} * p.inverse_keys.count * i});
  }
};

// Two densities at once need 100 registers: fewer warps, but no spills.
constexpr int32_t power_blocks_per_sm(int32_t densities) { return densities == 1 ? 3 : 2; }

// registers: <= 104
template <int kDensities, int kIntervals>
TW_KERNEL void __launch_bounds__(kSamplerThreads, power_blocks_per_sm(kDensities))
    power_domain_kernel(const PowerDomainParams p, const SamplerPlan plan) {
  using Shared = SamplerShared<kDensities, kIntervals>;
  Shared& shared = arch::shared<Shared>();
  load_table(shared, 0, p.inverse, p.inverse_keys.count);
  load_table(shared, p.inverse_keys.count, p.measure, p.measure_keys.count);
  const PowerTables<Shared> tables{p, shared};
  sample_tiles<PowerDomain<float, kDensities, PowerTables<Shared>>, kDensities>(p, plan, tables, shared);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
