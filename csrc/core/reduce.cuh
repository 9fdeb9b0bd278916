// Sums over a warp and over a block. The order of additions is fixed by lane and warp number alone, so the same inputs
// give the same bits in every run; every participating thread gets the result.
#pragma once

#include "core/arch.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// Butterfly over the full warp: log2(32) shuffles, all lanes end with the same bits because addition commutes.
TW_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int offset = arch::kWarpSize / 2; offset > 0; offset /= 2) {
    value += arch::shuffle_xor(value, static_cast<uint32_t>(offset));
  }
  return value;
}

struct BlockSumStorage {
  arch::Array<float, 32> warp_sums;
};

// All threads of the block, a multiple of 32 of them, must call it. Two barriers: the second lets the storage be
// reused.
TW_DEVICE float block_sum(float value, BlockSumStorage& storage) {
  const int num_warps = static_cast<int>(blockDim.x * blockDim.y) / arch::kWarpSize;
  value = warp_sum(value);
  if (arch::lane_index() == 0) storage.warp_sums[arch::warp_index()] = value;
  arch::sync_block();
  value = warp_sum(arch::lane_index() < num_warps ? storage.warp_sums[arch::lane_index()] : 0.0f);
  arch::sync_block();
  return value;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
