// rayleigh_conditional: coverage given the distances of all base stations, under Rayleigh fading, see sinr_field.py.
#pragma once

#include "sinr_field/geometry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int kMaxServers = 64;  // stations that may serve as the strongest

struct RayleighParams : GeometryParams {};

// Defined once per backend: rayleigh_conditional.cu (CUDA and emulated) and rayleigh_conditional_cpu.cpp.
Status rayleigh_conditional(const RayleighParams& params, const ExecutionContext& context);

SamplerPlan plan_rayleigh_conditional(int64_t num_densities, int64_t num_thresholds, int64_t num_realisations,
                                      int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
