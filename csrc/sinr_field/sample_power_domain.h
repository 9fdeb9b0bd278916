// sample_power_domain: the strongest powers of a Poisson field as L1^-1(arrival / density), see sinr_field.py.
#pragma once

#include "sinr_field/arithmetic.cuh"
#include "sinr_field/sampler.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct PowerDomainParams : SamplerParams {
  int32_t num_terms = 0;
  int32_t rate_nodes = 0;
  float cut = 0.0f;                // powers exist for arrival / density < cut
  const float* inverse = nullptr;  // [3, intervals, 4]: log2 of power, of the rest's mean, of its deviation
  LogTableKeys inverse_keys;
  const float* measure = nullptr;  // [intervals, 4]: log2 of L1 by log2 of power
  TwoSidedKeys measure_keys;
};

// Defined once per backend: sample_power_domain.cu (CUDA and emulated) and sample_power_domain_cpu.cpp.
Status sample_power_domain(const PowerDomainParams& params, const ExecutionContext& context);

// `intervals`: of all tables in shared memory.
SamplerPlan plan_sample_power_domain(int64_t num_densities, int64_t num_realisations, int64_t intervals,
                                     int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
