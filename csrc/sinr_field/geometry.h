// What sample_geometry and rayleigh_conditional know of a network: its path gain and its far field.
#pragma once

#include "sinr_field/arithmetic.cuh"
#include "sinr_field/sampler.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int64_t kMaxSlopes = 64;

struct GeometryParams : SamplerParams {
  int32_t num_points = 0;
  bool nearest = false;
  int32_t num_slopes = 0;       // 0: `gain` is a table
  const float* gain = nullptr;  // [slopes, 2] or [1, intervals, 4]
  LogTableKeys gain_keys;
  const float* far = nullptr;  // [2, intervals, 4]: log2 of the integral of gain beyond s, half that of gain^2
  LogTableKeys far_keys;
  float height2 = 0.0f, min_distance2 = 0.0f;
  float end2 = 0.0f;  // stations exist for s = r^2 below it
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
