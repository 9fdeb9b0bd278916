#include "anchor_decoding/decode_step.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

TW_INSTANTIATE_DECODE_STEP(fp16)

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
