// The glue that sample_geometry and rayleigh_conditional share: checks of path gain, far field and distances.
#pragma once

#include "sinr_field/geometry.h"
#include "sinr_field/sampler_torch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct GeometryArguments {
  const Tensor &gain, &far;
  int64_t gain_key, gain_steps, far_key, far_steps;
  double height, min_distance, r_inf;
};

// Kernels compare squares, in fp32.
inline float check_square(const char* op, const char* name, double value, bool may_be_infinite) {
  check_non_negative(op, name, value, may_be_infinite);
  const float square = static_cast<float>(value * value);
  if (std::isinf(square) && !std::isinf(value)) fail_number(op, name, "at most 1.8e19", shortest(value));
  return square;
}

inline void check_geometry(const char* op, const TensorInfo& scales, const GeometryArguments& a, GeometryParams& p) {
  const TensorInfo gain("gain", a.gain), far("far", a.far);
  if (gain.dim == 3) {
    p.gain = check_fp32(op, gain, scales, "[slopes, 2] or [1, intervals, 4]", {1, -1, 4});
    p.gain_keys = check_log_table(op, "gain", gain, a.gain_key, a.gain_steps);
  } else {
    p.gain = check_fp32(op, gain, scales, "[slopes, 2] or [1, intervals, 4]", {-1, 2});
    if (gain.sizes[0] > kMaxSlopes) {
      fail(op, gain, "have at most " + std::to_string(kMaxSlopes) + " slopes", std::to_string(gain.sizes[0]));
    }
    p.num_slopes = static_cast<int32_t>(gain.sizes[0]);
  }
  p.far = check_fp32(op, far, scales, "[2, intervals, 4]", {2, -1, 4});
  p.far_keys = check_log_table(op, "far", far, a.far_key, a.far_steps);
  p.height2 = check_square(op, "height", a.height, false);
  p.min_distance2 = check_square(op, "min_distance", a.min_distance, false);
  p.end2 = check_square(op, "r_inf", a.r_inf, true);
  if (p.end2 == 0.0f) fail_number(op, "r_inf", a.r_inf > 0 ? "at least 1e-22" : "above 0", shortest(a.r_inf));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
