#include "allreduce_rmsnorm/allreduce.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

TW_INSTANTIATE_ALLREDUCE(bf16)

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
