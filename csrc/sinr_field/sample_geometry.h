// sample_geometry: base stations by distance, each with its own mark, see sinr_field.py.
#pragma once

#include "sinr_field/geometry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct SampleGeometryParams : GeometryParams {
  const float* fading = nullptr;  // [2, intervals, 4]: log2 of the mark; planes as find_quantile
  LogTableKeys fading_keys;
  float log2_mark_mean = 0.0f, log2_mark_second_moment = 0.0f;
};

// Defined once per backend: sample_geometry.cu (CUDA and emulated) and sample_geometry_cpu.cpp.
Status sample_geometry(const SampleGeometryParams& params, const ExecutionContext& context);

// `intervals`: of all tables in shared memory.
SamplerPlan plan_sample_geometry(int64_t num_densities, int64_t num_realisations, int64_t intervals, int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
