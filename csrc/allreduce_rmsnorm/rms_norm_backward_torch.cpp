// rms_norm_backward: called by autograd, so its inputs are contiguous; checked all the same.
#include "allreduce_rmsnorm/rms_norm.h"
#include "allreduce_rmsnorm/rms_norm_backward.h"
#include "torch/check.h"
#include "torch/registry.h"
#include "torch/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

void check_like_h(const char* op, const TensorInfo& t, const TensorInfo& h) {
  check_same_device(op, t, h);
  check_same_dtype(op, t, h);
  check_same_shape(op, t, h);
  check_contiguous(op, t);
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& grad_y, const std::optional<Tensor>& grad_h,
                                                const Tensor& h, const Tensor& weight, const Tensor& rstd,
                                                double weight_bias) {
  constexpr const char* kOp = "rms_norm_backward";
  const TensorInfo h_info("h", h), grad_y_info("grad_y", grad_y), weight_info("weight", weight),
      rstd_info("rstd", rstd);
  RmsNormBackwardParams params;
  params.dtype = check_dtype(kOp, h_info);
  if (h_info.dim < 1 || h_info.size(-1) < 1 || h_info.size(-1) > kMaxHidden) {
    fail(kOp, h_info, "have shape [..., hidden] with hidden of 1 to " + std::to_string(kMaxHidden),
         join(h_info.sizes, h_info.dim));
  }
  check_contiguous(kOp, h_info);
  params.num_rows = count_rows(h_info);
  params.hidden = h_info.size(-1);
  check_like_h(kOp, grad_y_info, h_info);
  if (grad_h.has_value()) {
    const TensorInfo grad_h_info("grad_h", *grad_h);
    check_like_h(kOp, grad_h_info, h_info);
    params.grad_h = grad_h_info.data;
  }
  check_same_device(kOp, weight_info, h_info);
  check_same_dtype(kOp, weight_info, h_info);
  check_vector(kOp, weight_info, "hidden", params.hidden);
  check_same_device(kOp, rstd_info, h_info);
  check_vector(kOp, rstd_info, "num_rows", params.num_rows);
  if (rstd_info.dtype != aoti_torch_dtype_float32()) {
    fail(kOp, rstd_info, "be fp32", name_of_torch_dtype(rstd_info.dtype));
  }

  const ExecutionScope scope(h);
  Tensor grad_x = torch::stable::empty_like(h);
  Tensor grad_weight = torch::stable::empty_like(weight);
  if (params.num_rows == 0) return {grad_x, torch::stable::zero_(grad_weight)};
  const int64_t scratch[2] = {rms_norm_backward_groups(params.num_rows), rms_norm_backward_pitch(params.hidden)};
  const Tensor partials = torch::stable::new_empty(h, torch::headeronly::IntHeaderOnlyArrayRef(scratch, 2),
                                                   torch::headeronly::ScalarType::Float);
  params.grad_y = grad_y_info.data;
  params.h = h_info.data;
  params.weight = weight_info.data;
  params.rstd = static_cast<const float*>(rstd_info.data);
  params.weight_bias = static_cast<float>(weight_bias);
  params.grad_x = grad_x.data_ptr();
  params.grad_weight = grad_weight.data_ptr();
  params.partials = static_cast<float*>(partials.data_ptr());
  raise_unless(rms_norm_backward(params, scope.context()), kOp);
  return {grad_x, grad_weight};
}
TOKENWEAVE_OP(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, float weight_bias)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    rms_norm_backward_op);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
