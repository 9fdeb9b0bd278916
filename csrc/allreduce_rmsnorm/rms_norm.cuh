// RMSNorm with an optional residual add, one row per block (short rows: one per warp).
//   y = round((h * rstd) * (weight + weight_bias)),  h = round(x + residual),  rstd = 1 / sqrt(mean(h^2) + eps)
// Mapping: thread t of a row's block_x threads owns packs t, t + block_x, ... of 16 bytes; they stay in registers
// between the sum of squares and the scaling, so each element of x and residual is read once and of y and h written
// once. Bytes: 4 * rows * hidden * size with the residual, 2 * without. Limit: device memory; below ~2 MiB launch and
// latency. The weight (at most 128 KiB) comes from L1/L2 and is fetched before the barrier, where it hides behind the
// reduction.
#pragma once

#include "allreduce_rmsnorm/rms_norm.h"
#include "core/reduce.cuh"
#include "core/vec.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct RmsNormShared {
  BlockSumStorage sum;
};

// Sum over the block_x threads that share a row: a warp when block_x is 32, else the whole block (then block_y is 1).
TW_DEVICE float row_sum(float value, RmsNormShared& shared) {
  return blockDim.x == arch::kWarpSize ? warp_sum(value) : block_sum(value, shared.sum);
}

TW_DEVICE float reciprocal_rms(float sum_of_squares, int64_t hidden, float eps) {
  const float mean = arch::divide(sum_of_squares, static_cast<float>(hidden));
  return arch::divide(1.0f, arch::square_root(mean + eps));
}

// Threads on a row at most, and rows that must fit an SM side by side so that one's barrier hides behind another's
// loads.
template <int kPacks>
inline constexpr int kMaxRowThreads = kPacks <= 2 ? 512 : 1024;
template <int kPacks>
inline constexpr int kMinBlocksPerSm = kPacks == 1   ? 3
                                       : kPacks == 2 ? 2
                                                     : 1;

// registers: <= 64
template <class T, int kPacks, bool kHasResidual>
TW_KERNEL void __launch_bounds__(kMaxRowThreads<kPacks>, kMinBlocksPerSm<kPacks>) rms_norm_kernel(RmsNormParams p) {
  RmsNormShared& shared = arch::shared<RmsNormShared>();
  constexpr int kSize = kPackSize<T>;
  const int num_packs = static_cast<int>(p.hidden) / kSize;
  const int first_pack = static_cast<int>(threadIdx.x);
  const int stride = static_cast<int>(blockDim.x);
  const int64_t row_step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.num_rows; row += row_step) {
    const Vec16* x = reinterpret_cast<const Vec16*>(static_cast<const T*>(p.x) + p.x_rows.offset(row));
    const Vec16* weight = reinterpret_cast<const Vec16*>(p.weight);
    Vec16* y = reinterpret_cast<Vec16*>(static_cast<T*>(p.y) + p.y_rows.offset(row));
    const Vec16* residual_in = nullptr;
    Vec16* h_out = nullptr;
    if constexpr (kHasResidual) {
      residual_in = reinterpret_cast<const Vec16*>(static_cast<const T*>(p.residual) + p.residual_rows.offset(row));
      h_out = reinterpret_cast<Vec16*>(static_cast<T*>(p.h) + p.h_rows.offset(row));
    }

    // In groups: enough loads in flight, and the residual of a group is gone before the next one comes. Eight packs a
    // thread leave no registers for a second residual pack, but 1024 threads then keep the loads coming.
    constexpr int kGroup = kPacks == 2 || kPacks == 4 ? 2 : 1;
    Vec16 h[kPacks];
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int group = 0; group < kPacks; group += kGroup) {
      Vec16 residual[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const int pack_index = first_pack + (group + k) * stride;
        if (pack_index >= num_packs) continue;
        h[group + k] = arch::load_streaming(x + pack_index);
        if constexpr (kHasResidual) residual[k] = arch::load_streaming(residual_in + pack_index);
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const int pack_index = first_pack + (group + k) * stride;
        if (pack_index >= num_packs) continue;
        Vec16& sum = h[group + k];
        if constexpr (kHasResidual) {
          sum = add_packs<T>(sum, residual[k]);
          arch::store_streaming(h_out + pack_index, sum);
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) {  // of the rounded sum, the value the next layer will read
          const float value = pack_get<T>(sum, i);
          sum_of_squares = arch::fused_multiply_add(value, value, sum_of_squares);
        }
      }
    }

    // More than two packs of weight would not fit the registers beside h: those are read after the reduction.
    constexpr bool kPrefetchWeight = kPacks <= 2;
    Vec16 prefetched[kPrefetchWeight ? kPacks : 1];
    if constexpr (kPrefetchWeight) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int pack_index = first_pack + k * stride;
        if (pack_index < num_packs) prefetched[k] = weight[pack_index];
      }
    }

    const float rstd = reciprocal_rms(row_sum(sum_of_squares, shared), p.hidden, p.eps);
    if (p.rstd != nullptr && threadIdx.x == 0) p.rstd[row] = rstd;

#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack_index = first_pack + k * stride;
      if (pack_index >= num_packs) continue;
      const Vec16 weight_pack = kPrefetchWeight ? prefetched[kPrefetchWeight ? k : 0] : weight[pack_index];
      float values[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        values[i] = pack_get<T>(h[k], i) * rstd * (pack_get<T>(weight_pack, i) + p.weight_bias);
      }
      arch::store_streaming(y + pack_index, pack<T>(values));
    }
  }
}

// Any size and any alignment, one element at a time. A thread reads back only what it wrote itself (h) or has not yet
// overwritten (x), so y may be x and h may be residual without a barrier between the passes.
// registers: <= 64
template <class T, bool kHasResidual>
TW_KERNEL void __launch_bounds__(1024) rms_norm_scalar_kernel(RmsNormParams p) {
  RmsNormShared& shared = arch::shared<RmsNormShared>();
  const int hidden = static_cast<int>(p.hidden);
  const int stride = static_cast<int>(blockDim.x);
  const int64_t row_step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.num_rows; row += row_step) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* y = static_cast<T*>(p.y) + p.y_rows.offset(row);
    const T* residual = kHasResidual ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) : nullptr;
    T* h = kHasResidual ? static_cast<T*>(p.h) + p.h_rows.offset(row) : nullptr;

    float sum_of_squares = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < hidden; i += stride) {
      float value = to_float(x[i]);
      if constexpr (kHasResidual) {
        h[i] = from_float<T>(value + to_float(residual[i]));
        value = to_float(h[i]);
      }
      sum_of_squares = arch::fused_multiply_add(value, value, sum_of_squares);
    }
    const float rstd = reciprocal_rms(row_sum(sum_of_squares, shared), p.hidden, p.eps);
    if (p.rstd != nullptr && threadIdx.x == 0) p.rstd[row] = rstd;
    for (int i = static_cast<int>(threadIdx.x); i < hidden; i += stride) {
      const float value = to_float(kHasResidual ? h[i] : x[i]);
      const float weight = to_float(static_cast<const T*>(p.weight)[i]) + p.weight_bias;
      y[i] = from_float<T>(value * rstd * weight);
    }
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
