#include "anchor_decoding/decode_step.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

TW_INSTANTIATE_DECODE_STEP(bf16)

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
