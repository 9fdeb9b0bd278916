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

// The same in float64, lanes 16 apart first, then 8, 4, 2, 1; a value travels as its two words.
TW_DEVICE double warp_sum(double value) {
#pragma unroll
  for (int offset = arch::kWarpSize / 2; offset > 0; offset /= 2) {
    uint32_t words[2];
    __builtin_memcpy(words, &value, sizeof(words));
    words[0] = arch::shuffle_xor(words[0], static_cast<uint32_t>(offset));
    words[1] = arch::shuffle_xor(words[1], static_cast<uint32_t>(offset));
    double other;
    __builtin_memcpy(&other, words, sizeof(other));
    value += other;
  }
  return value;
}

template <int kCount>
struct BlockSumsStorage {
  arch::Array<float, 32 * kCount> warp_sums;
};
using BlockSumStorage = BlockSumsStorage<1>;

// Several sums for the price of one: all threads of the block, a multiple of 32 of them, must call it. Two barriers:
// the second lets the storage be reused.
template <int kCount>
TW_DEVICE void block_sums(float (&values)[kCount], BlockSumsStorage<kCount>& storage) {
  const int num_warps = static_cast<int>(blockDim.x * blockDim.y) / arch::kWarpSize;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  if (arch::lane_index() == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) storage.warp_sums[arch::warp_index() * kCount + i] = values[i];
  }
  arch::sync_block();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(arch::lane_index() < num_warps ? storage.warp_sums[arch::lane_index() * kCount + i] : 0.0f);
  }
  arch::sync_block();
}

TW_DEVICE float block_sum(float value, BlockSumStorage& storage) {
  float values[1] = {value};
  block_sums<1>(values, storage);
  return values[0];
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
