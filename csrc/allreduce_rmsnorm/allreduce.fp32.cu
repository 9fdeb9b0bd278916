#include "allreduce_rmsnorm/allreduce.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

TW_INSTANTIATE_ALLREDUCE(float)

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
