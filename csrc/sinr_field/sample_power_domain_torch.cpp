// sample_power_domain: argument checks, allocation, one call of the contract.
#include "sinr_field/sample_power_domain.h"
#include "sinr_field/sampler_torch.h"
#include "torch/registry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

std::tuple<Tensor, Tensor, Tensor> sample_power_domain_op(
    const Tensor& scales, const Tensor& thresholds, const Tensor& inverse, const Tensor& measure, int64_t inverse_key,
    int64_t inverse_steps, int64_t measure_negative, int64_t measure_steps, double cut, double noise, double activity,
    int64_t num_terms, int64_t rate_nodes, int64_t residual, int64_t seed, int64_t first_realisation,
    int64_t num_realisations, bool keep_samples) {
  constexpr const char* kOp = "sample_power_domain";
  const TensorInfo scales_info("scales", scales), inverse_info("inverse", inverse), measure_info("measure", measure);
  PowerDomainParams p;
  check_run(kOp, scales_info, TensorInfo("thresholds", thresholds), kNumMoments, seed, first_realisation,
            num_realisations, p);
  p.inverse = check_fp32(kOp, inverse_info, scales_info, "[3, intervals, 4]", {3, -1, 4});
  p.inverse_keys = check_log_table(kOp, "inverse", inverse_info, inverse_key, inverse_steps);
  p.measure = check_fp32(kOp, measure_info, scales_info, "[intervals, 4]", {-1, 4});
  p.measure_keys = check_two_sided(kOp, "measure", measure_info, measure_negative, measure_steps);
  if (!(cut > 0.0)) fail_number(kOp, "cut", "above 0", shortest(cut));
  p.cut = static_cast<float>(cut);
  check_noise(kOp, noise, p);
  check_interferers(kOp, activity, residual, p);
  p.num_terms = check_multiple_of_4(kOp, "num_terms", num_terms, kMaxTerms);
  p.rate_nodes = static_cast<int32_t>(check_int(kOp, "rate_nodes", rate_nodes, 0, kMaxRateNodes));

  const ExecutionScope scope(scales);
  const SamplerOutputs outputs(scales, {p.num_densities, kHistogramBins},
                               {p.num_densities, keep_samples ? num_realisations : 0, 2}, keep_samples, p);
  if (p.num_densities > 0) raise_unless(sample_power_domain(p, scope.context()), kOp);
  return {outputs.sums, outputs.histogram, outputs.samples};
}
TOKENWEAVE_OP(
    "sample_power_domain(Tensor scales, Tensor thresholds, Tensor inverse, Tensor measure, int inverse_key,"
    " int inverse_steps, int measure_negative, int measure_steps, float cut, float noise, float activity,"
    " int num_terms, int rate_nodes, int residual, int seed, int first_realisation, int num_realisations,"
    " bool keep_samples) -> (Tensor sums, Tensor histogram, Tensor samples)",
    sample_power_domain_op);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
