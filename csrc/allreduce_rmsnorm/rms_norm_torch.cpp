// rms_norm, rms_norm_out, add_rms_norm_ and their training forms: argument checks, allocation, one call of the
// contract.
#include <utility>

#include "allreduce_rmsnorm/norm_torch.h"
#include "allreduce_rmsnorm/rms_norm.h"
#include "torch/registry.h"
#include "torch/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

// What every form shares: x, weight and the scalars.
RmsNormParams check_inputs(const char* op, const TensorInfo& x, const TensorInfo& weight, double eps,
                           double weight_bias) {
  RmsNormParams params;
  params.dtype = check_dtype(op, x);
  params.x_rows = check_rows(op, x);
  params.num_rows = count_rows(x);
  params.hidden = x.size(-1);
  if (params.hidden < 1 || params.hidden > kMaxHidden) {
    fail(op, x, "have a last dimension of 1 to " + std::to_string(kMaxHidden), std::to_string(params.hidden));
  }
  check_same_device(op, weight, x);
  check_same_dtype(op, weight, x);
  check_vector(op, weight, "hidden", params.hidden);
  check_scalars(op, eps, weight_bias);
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  params.x = x.data;
  params.weight = weight.data;
  return params;
}

void check_like_x(const char* op, const TensorInfo& t, const TensorInfo& x) {
  check_same_device(op, t, x);
  check_same_dtype(op, t, x);
  check_same_shape(op, t, x);
}

void check_weight_apart(const char* op, const TensorInfo& written, const RowLayout& layout, const RmsNormParams& p,
                        const TensorInfo& weight) {
  if (p.num_rows == 0) return;
  const int64_t bytes = size_of(p.dtype);
  const char* begin = static_cast<const char*>(written.data);
  const char* end = begin + (layout.offset(p.num_rows - 1) + p.hidden) * bytes;
  check_apart_from_weight(op, written, begin, end, weight, p.hidden * bytes);
}

// A new contiguous tensor of x's shape, dtype and device, and its rows.
Tensor allocate_like(const TensorInfo& x, const Tensor& tensor) {
  return torch::stable::new_empty(tensor, torch::headeronly::IntHeaderOnlyArrayRef(x.sizes, x.dim));
}

RowLayout contiguous_rows(const RmsNormParams& p) { return RowLayout{p.num_rows, p.hidden, 0, p.hidden}; }

Tensor allocate_rstd(const Tensor& x, int64_t num_rows) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(&num_rows, 1),
                                  torch::headeronly::ScalarType::Float);
}

void rms_norm_out_checked(const char* op, const Tensor& x, const Tensor& weight, double eps, double weight_bias,
                          const Tensor& out) {
  const TensorInfo x_info("x", x), weight_info("weight", weight), out_info("out", out);
  RmsNormParams params = check_inputs(op, x_info, weight_info, eps, weight_bias);
  check_like_x(op, out_info, x_info);
  params.y_rows = check_rows(op, out_info);
  check_rows_disjoint(op, out_info, params.y_rows);
  check_no_overlap(op, out_info, params.y_rows, x_info, params.x_rows, size_of(params.dtype));
  check_weight_apart(op, out_info, params.y_rows, params, weight_info);
  params.y = out_info.data;
  if (params.num_rows == 0) return;
  const ExecutionScope scope(x);
  raise_unless(rms_norm(params, scope.context()), op);
}

}  // namespace

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps, double weight_bias) {
  constexpr const char* kOp = "rms_norm";
  const TensorInfo x_info("x", x), weight_info("weight", weight);
  RmsNormParams params = check_inputs(kOp, x_info, weight_info, eps, weight_bias);
  const ExecutionScope scope(x);
  Tensor y = allocate_like(x_info, x);
  params.y = y.data_ptr();
  params.y_rows = contiguous_rows(params);
  if (params.num_rows > 0) raise_unless(rms_norm(params, scope.context()), kOp);
  return y;
}
TOKENWEAVE_OP("rms_norm(Tensor x, Tensor weight, float eps, float weight_bias) -> Tensor", rms_norm_op);

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, double weight_bias, const Tensor& out) {
  rms_norm_out_checked("rms_norm", x, weight, eps, weight_bias, out);
}
TOKENWEAVE_OP("rms_norm_out(Tensor x, Tensor weight, float eps, float weight_bias, Tensor(a!) out) -> ()",
              rms_norm_out);

void add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, double weight_bias) {
  constexpr const char* kOp = "add_rms_norm_";
  const TensorInfo x_info("x", x), residual_info("residual", residual), weight_info("weight", weight);
  RmsNormParams params = check_inputs(kOp, x_info, weight_info, eps, weight_bias);
  check_like_x(kOp, residual_info, x_info);
  params.residual_rows = check_rows(kOp, residual_info);
  check_rows_disjoint(kOp, x_info, params.x_rows);
  check_rows_disjoint(kOp, residual_info, params.residual_rows);
  check_no_overlap(kOp, x_info, params.x_rows, residual_info, params.residual_rows, size_of(params.dtype));
  check_weight_apart(kOp, x_info, params.x_rows, params, weight_info);
  check_weight_apart(kOp, residual_info, params.residual_rows, params, weight_info);
  params.residual = params.h = residual_info.data;
  params.h_rows = params.residual_rows;
  params.y = x_info.data;
  params.y_rows = params.x_rows;
  if (params.num_rows == 0) return;
  const ExecutionScope scope(x);
  raise_unless(rms_norm(params, scope.context()), kOp);
}
TOKENWEAVE_OP("add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_bias) -> ()",
              add_rms_norm_);

std::tuple<Tensor, Tensor> rms_norm_train(const Tensor& x, const Tensor& weight, double eps, double weight_bias) {
  constexpr const char* kOp = "rms_norm_train";
  const TensorInfo x_info("x", x), weight_info("weight", weight);
  RmsNormParams params = check_inputs(kOp, x_info, weight_info, eps, weight_bias);
  const ExecutionScope scope(x);
  Tensor y = allocate_like(x_info, x);
  Tensor rstd = allocate_rstd(x, params.num_rows);
  params.y = y.data_ptr();
  params.y_rows = contiguous_rows(params);
  params.rstd = static_cast<float*>(rstd.data_ptr());
  if (params.num_rows > 0) raise_unless(rms_norm(params, scope.context()), kOp);
  return {y, rstd};
}
TOKENWEAVE_OP("rms_norm_train(Tensor x, Tensor weight, float eps, float weight_bias) -> (Tensor y, Tensor rstd)",
              rms_norm_train);

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_train(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                      double eps, double weight_bias) {
  constexpr const char* kOp = "add_rms_norm_train";
  const TensorInfo x_info("x", x), residual_info("residual", residual), weight_info("weight", weight);
  RmsNormParams params = check_inputs(kOp, x_info, weight_info, eps, weight_bias);
  check_like_x(kOp, residual_info, x_info);
  params.residual_rows = check_rows(kOp, residual_info);
  params.residual = residual_info.data;
  const ExecutionScope scope(x);
  Tensor y = allocate_like(x_info, x);
  Tensor h = allocate_like(x_info, x);
  Tensor rstd = allocate_rstd(x, params.num_rows);
  params.y = y.data_ptr();
  params.h = h.data_ptr();
  params.y_rows = params.h_rows = contiguous_rows(params);
  params.rstd = static_cast<float*>(rstd.data_ptr());
  if (params.num_rows > 0) raise_unless(rms_norm(params, scope.context()), kOp);
  return {y, h, rstd};
}
TOKENWEAVE_OP(
    "add_rms_norm_train(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    add_rms_norm_train);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
