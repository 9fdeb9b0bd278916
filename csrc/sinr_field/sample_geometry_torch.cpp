// sample_geometry: argument checks, allocation, one call of the contract.
#include "sinr_field/geometry_torch.h"
#include "sinr_field/sample_geometry.h"
#include "torch/registry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

std::tuple<Tensor, Tensor, Tensor> sample_geometry_op(
    const Tensor& scales, const Tensor& thresholds, const Tensor& gain, const Tensor& fading, const Tensor& far,
    int64_t gain_key, int64_t gain_steps, int64_t fading_key, int64_t fading_steps, int64_t far_key, int64_t far_steps,
    double height, double min_distance, double r_inf, double mark_mean, double mark_second_moment, double noise,
    double activity, int64_t num_points, bool nearest, int64_t residual, int64_t seed, int64_t first_realisation,
    int64_t num_realisations, bool keep_samples) {
  constexpr const char* kOp = "sample_geometry";
  const TensorInfo scales_info("scales", scales), fading_info("fading", fading);
  SampleGeometryParams p;
  check_run(kOp, scales_info, TensorInfo("thresholds", thresholds), kNumMoments, seed, first_realisation,
            num_realisations, p);
  check_geometry(kOp, scales_info, {gain, far, gain_key, gain_steps, far_key, far_steps, height, min_distance, r_inf},
                 p);
  p.fading = check_fp32(kOp, fading_info, scales_info, "[2, intervals, 4]", {2, -1, 4});
  p.fading_keys = check_log_table(kOp, "fading", fading_info, fading_key, fading_steps, kMaxIntervals / 2);
  check_noise(kOp, noise, p);
  check_interferers(kOp, activity, residual, p);
  // What the residual needs must exist.
  check_non_negative(kOp, "mark_mean", mark_mean, p.residual == kNoResidual);
  check_non_negative(kOp, "mark_second_moment", mark_second_moment, p.residual != kGaussResidual);
  p.log2_mark_mean = log2_or_nothing(mark_mean);
  p.log2_mark_second_moment = log2_or_nothing(mark_second_moment);
  p.num_points = check_multiple_of_4(kOp, "num_points", num_points, kMaxPoints);
  p.nearest = nearest;

  const ExecutionScope scope(scales);
  const SamplerOutputs outputs(scales, {p.num_densities, kHistogramBins},
                               {p.num_densities, keep_samples ? num_realisations : 0, 2}, keep_samples, p);
  if (p.num_densities > 0) raise_unless(sample_geometry(p, scope.context()), kOp);
  return {outputs.sums, outputs.histogram, outputs.samples};
}
TOKENWEAVE_OP(
    "sample_geometry(Tensor scales, Tensor thresholds, Tensor gain, Tensor fading, Tensor far, int gain_key,"
    " int gain_steps, int fading_key, int fading_steps, int far_key, int far_steps, float height, float min_distance,"
    " float r_inf, float mark_mean, float mark_second_moment, float noise, float activity, int num_points,"
    " bool nearest, int residual, int seed, int first_realisation, int num_realisations, bool keep_samples)"
    " -> (Tensor sums, Tensor histogram, Tensor samples)",
    sample_geometry_op);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
