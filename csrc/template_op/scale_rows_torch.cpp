// scale_rows: argument checks, allocation, one call of the contract.
#include "template_op/scale_rows.h"
#include "torch/check.h"
#include "torch/registry.h"
#include "torch/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

Tensor scale_rows_op(const Tensor& x, const Tensor& scale) {
  constexpr const char* kOp = "scale_rows";
  const TensorInfo x_info("x", x), scale_info("scale", scale);
  ScaleRowsParams params;
  params.dtype = check_dtype(kOp, x_info);
  params.x_rows = check_rows(kOp, x_info);
  params.num_rows = count_rows(x_info);
  params.hidden = x_info.size(-1);
  check_same_device(kOp, scale_info, x_info);
  check_vector(kOp, scale_info, "num_rows", params.num_rows);
  if (scale_info.dtype != aoti_torch_dtype_float32()) {
    fail(kOp, scale_info, "be fp32", name_of_torch_dtype(scale_info.dtype));
  }

  const ExecutionScope scope(x);
  Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(x_info.sizes, x_info.dim));
  if (y.numel() == 0) return y;
  params.x = x_info.data;
  params.scale = static_cast<const float*>(scale_info.data);
  params.y = y.data_ptr();
  raise_unless(scale_rows(params, scope.context()), kOp);
  return y;
}
TOKENWEAVE_OP("scale_rows(Tensor x, Tensor scale) -> Tensor", scale_rows_op);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
