// Does nothing with the arguments of add_rms_norm_: the floor that an op call's cost is compared with (bench,
// "overhead").
#include "torch/registry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

void noop(const Tensor&, const Tensor&, const Tensor&, double, double) {}
TOKENWEAVE_OP("noop(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_bias) -> ()", noop);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
