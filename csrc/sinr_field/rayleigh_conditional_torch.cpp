// rayleigh_conditional: argument checks, allocation, one call of the contract.
#include "sinr_field/geometry_torch.h"
#include "sinr_field/rayleigh_conditional.h"
#include "torch/registry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

std::tuple<Tensor, Tensor, Tensor> rayleigh_conditional_op(const Tensor& scales, const Tensor& thresholds,
                                                           const Tensor& gain, const Tensor& far, int64_t gain_key,
                                                           int64_t gain_steps, int64_t far_key, int64_t far_steps,
                                                           double height, double min_distance, double r_inf,
                                                           double noise, int64_t num_points, bool nearest, int64_t seed,
                                                           int64_t first_realisation, int64_t num_realisations,
                                                           bool keep_samples) {
  constexpr const char* kOp = "rayleigh_conditional";
  const TensorInfo scales_info("scales", scales);
  RayleighParams p;
  check_run(kOp, scales_info, TensorInfo("thresholds", thresholds), 0, seed, first_realisation, num_realisations, p);
  check_geometry(kOp, scales_info, {gain, far, gain_key, gain_steps, far_key, far_steps, height, min_distance, r_inf},
                 p);
  check_noise(kOp, noise, p);
  p.num_points = check_multiple_of_4(kOp, "num_points", num_points, nearest ? kMaxPoints : int64_t{kMaxServers});
  p.nearest = nearest;

  const ExecutionScope scope(scales);
  const SamplerOutputs outputs(scales, {p.num_densities, p.num_thresholds, kMetaBins},
                               {p.num_densities, p.num_thresholds, keep_samples ? num_realisations : 0}, keep_samples,
                               p);
  if (p.num_densities > 0 && p.num_thresholds > 0) raise_unless(rayleigh_conditional(p, scope.context()), kOp);
  return {outputs.sums, outputs.histogram, outputs.samples};
}
TOKENWEAVE_OP(
    "rayleigh_conditional(Tensor scales, Tensor thresholds, Tensor gain, Tensor far, int gain_key, int gain_steps,"
    " int far_key, int far_steps, float height, float min_distance, float r_inf, float noise, int num_points,"
    " bool nearest, int seed, int first_realisation, int num_realisations, bool keep_samples)"
    " -> (Tensor sums, Tensor histogram, Tensor samples)",
    rayleigh_conditional_op);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
