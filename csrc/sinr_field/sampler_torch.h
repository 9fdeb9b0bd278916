// What the glue of the three samplers shares: checks of the grid, the run and the tables, and the outputs.
#pragma once

#include <cmath>
#include <initializer_list>

#include "sinr_field/arithmetic.cuh"
#include "sinr_field/sampler.h"
#include "torch/check.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// A contiguous fp32 tensor on the device of `first`; -1 in `sizes` stands for any size from 1.
inline const float* check_fp32(const char* op, const TensorInfo& t, const TensorInfo& first, const char* meaning,
                               std::initializer_list<int64_t> sizes) {
  if (t.dtype != aoti_torch_dtype_float32()) fail(op, t, "be fp32", name_of_torch_dtype(t.dtype));
  check_same_device(op, t, first);
  bool fits = t.dim == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; fits && axis < t.dim; ++axis) {
    const int64_t size = sizes.begin()[axis];
    fits = size < 0 ? t.sizes[axis] > 0 : t.sizes[axis] == size;
  }
  if (!fits) fail(op, t, std::string("have shape ") + meaning, join(t.sizes, t.dim));
  check_contiguous(op, t);
  return static_cast<const float*>(t.data);
}

[[noreturn]] inline void fail_number(const char* op, const char* name, const std::string& expected,
                                     const std::string& got) {
  raise(std::string(op) + ": " + name + " must be " + expected + ", got " + got);
}

inline int64_t check_int(const char* op, const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    fail_number(op, name, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
  }
  return value;
}

inline int32_t check_multiple_of_4(const char* op, const char* name, int64_t value, int64_t most) {
  if (value < 4 || value > most || value % 4 != 0) {
    fail_number(op, name, "a multiple of 4, 4 to " + std::to_string(most), std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

inline float check_non_negative(const char* op, const char* name, double value, bool may_be_infinite) {
  if (!(value >= 0.0) || (std::isinf(value) && !may_be_infinite)) {
    fail_number(op, name, may_be_infinite ? "at least 0" : "at least 0 and finite", shortest(value));
  }
  return static_cast<float>(value);
}

inline float log2_or_nothing(double value) { return value > 0.0 ? static_cast<float>(std::log2(value)) : kNothing; }

// A kernel loads the four coefficients of an interval at once.
inline void check_intervals(const char* op, const TensorInfo& t, int64_t most) {
  if (t.size(-2) > most) {
    fail(op, t, "have at most " + std::to_string(most) + " intervals", std::to_string(t.size(-2)));
  }
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) fail(op, t, "be aligned to 16 bytes", "another address");
}

// The intervals of a table fp32 [planes, intervals, 4], named by the leading bits of their first argument.
inline LogTableKeys check_log_table(const char* op, const char* name, const TensorInfo& t, int64_t key, int64_t steps,
                                    int64_t most_intervals = kMaxIntervals) {
  LogTableKeys keys;
  const int64_t count = t.size(-2);
  check_intervals(op, t, most_intervals);
  check_int(op, (std::string(name) + "_steps").c_str(), steps, 0, 10);
  keys.shift = static_cast<int32_t>(23 - steps);
  keys.count = static_cast<int32_t>(count);
  const int64_t most = (0x7f800000 >> keys.shift) - count;
  check_int(op, (std::string(name) + "_key").c_str(), key, 1, most);
  keys.low = static_cast<int32_t>(key << keys.shift);
  keys.high = static_cast<int32_t>(((key + count) << keys.shift) - 1);
  return keys;
}

inline TwoSidedKeys check_two_sided(const char* op, const char* name, const TensorInfo& t, int64_t negative,
                                    int64_t steps) {
  TwoSidedKeys keys;
  const int64_t count = t.size(-2);
  check_intervals(op, t, kMaxIntervals);
  check_int(op, (std::string(name) + "_steps").c_str(), steps, 0, 10);
  keys.shift = static_cast<int32_t>(23 - steps);
  keys.count = static_cast<int32_t>(count);
  check_int(op, (std::string(name) + "_negative").c_str(), negative, 1, count - 1);
  const int64_t most = (0x7f800000 - 0x3f800000) >> keys.shift;
  if (negative > most || count - negative > most) {
    fail(op, t, "end before the largest fp32 number", std::to_string(count) + " intervals");
  }
  keys.negative = static_cast<int32_t>(negative);
  keys.high_negative = static_cast<int32_t>(0x3f800000 + (negative << keys.shift) - 1);
  keys.high_positive = static_cast<int32_t>(0x3f800000 + ((count - negative) << keys.shift) - 1);
  return keys;
}

// The grid of densities and thresholds, and which realisations.
inline void check_run(const char* op, const TensorInfo& scales, const TensorInfo& thresholds, int64_t num_moments,
                      int64_t seed, int64_t first_realisation, int64_t num_realisations, SamplerParams& p) {
  if (scales.dim != 2 || scales.sizes[1] != 2) {
    fail(op, scales, "have shape [densities, 2]", join(scales.sizes, scales.dim));
  }
  if (thresholds.dim != 1) fail(op, thresholds, "have shape [thresholds]", join(thresholds.sizes, thresholds.dim));
  p.num_densities = scales.sizes[0];
  p.num_thresholds = thresholds.sizes[0];
  p.num_items = num_moments + p.num_thresholds;
  p.scales = check_fp32(op, scales, scales, "[densities, 2]", {p.num_densities, 2});
  p.log2_thresholds = check_fp32(op, thresholds, scales, "[thresholds]", {p.num_thresholds});
  p.num_realisations = check_int(op, "num_realisations", num_realisations, 1, kMaxRealisations);
  p.first_realisation = first_realisation;
  if (first_realisation < 0 || first_realisation % kBatch != 0 || first_realisation > INT64_MAX - kMaxRealisations) {
    fail_number(op, "first_realisation", "a multiple of " + std::to_string(kBatch) + " from 0 on",
                std::to_string(first_realisation));
  }
  p.seed_low = static_cast<uint32_t>(seed);
  p.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
}

inline void check_noise(const char* op, double noise, SamplerParams& p) {
  check_non_negative(op, "noise", noise, false);
  p.log2_noise = log2_or_nothing(noise);
}

inline void check_interferers(const char* op, double activity, int64_t residual, SamplerParams& p) {
  if (!(activity > 0.0 && activity <= 1.0)) fail_number(op, "activity", "above 0, at most 1", shortest(activity));
  p.residual = static_cast<Residual>(check_int(op, "residual", residual, kNoResidual, kGaussResidual));
  p.all_active = activity * 0x1p32 > 0xffffffffu;  // then every word is below
  p.log2_activity = static_cast<float>(std::log2(activity));
  const double limit = std::ceil(activity * 0x1p32);
  p.activity_limit = limit < 0x1p32 ? static_cast<uint32_t>(limit) : UINT32_MAX;
}

struct SamplerOutputs {
  Tensor sums, histogram, samples, scratch;

  // `samples_shape` is of what is kept of all realisations.
  SamplerOutputs(const Tensor& like, std::initializer_list<int64_t> histogram_shape,
                 std::initializer_list<int64_t> samples_shape, bool keep_samples, SamplerParams& p)
      : sums(allocate(like, {num_batches(p.num_realisations), p.num_densities, p.num_items, 2}, ScalarType::Double)),
        histogram(allocate(like, histogram_shape, ScalarType::Long)),
        samples(allocate(like, samples_shape, ScalarType::Float)),
        scratch(allocate(like, {num_cells(p.num_realisations), p.num_densities, p.num_items, 2}, ScalarType::Double)) {
    torch::stable::zero_(histogram);
    p.sums = static_cast<double*>(sums.data_ptr());
    p.cell_sums = static_cast<double*>(scratch.data_ptr());
    p.histogram = static_cast<int64_t*>(histogram.data_ptr());
    p.samples = keep_samples ? static_cast<float*>(samples.data_ptr()) : nullptr;
  }

 private:
  using ScalarType = torch::headeronly::ScalarType;
  static Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
