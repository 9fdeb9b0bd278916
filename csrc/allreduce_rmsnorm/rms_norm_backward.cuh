// The gradient of RMSNorm in three kernels; formulas in rms_norm_backward.h.
//   rows:   one block per row computes grad_x; two passes over the row, the second from cache.
//   groups: thread = kWidth columns, block = one group of rows; sums grad_y * h * rstd down its rows into a partial.
//   finish: thread = one column; adds the partials in group order.
// Bytes: rows reads 2 (3 with grad_h) and writes 1, groups reads 2, all rows * hidden * size. Limit: device memory.
// Summing the weight's gradient inside the rows kernel would save 2 of those 5, at the price of hidden / block_x
// registers.
#pragma once

#include "allreduce_rmsnorm/rms_norm_backward.h"
#include "core/reduce.cuh"
#include "core/vec.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct RmsNormBackwardShared {
  BlockSumStorage sum;
};

// kWidth consecutive elements as fp32: a pack where the row length allows, else one.
template <class T, int kWidth>
TW_DEVICE void load_elements(const T* source, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    values[0] = to_float(*source);
  } else {
    unpack<T>(load_pack(source), values);
  }
}

// registers: <= 64
template <class T, int kWidth>
TW_KERNEL void __launch_bounds__(512) rms_norm_backward_rows_kernel(RmsNormBackwardParams p) {
  RmsNormBackwardShared& shared = arch::shared<RmsNormBackwardShared>();
  const int hidden = static_cast<int>(p.hidden);
  const int begin = static_cast<int>(threadIdx.x) * kWidth, stride = static_cast<int>(blockDim.x) * kWidth;
  const T* weight = static_cast<const T*>(p.weight);

  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const T* grad_y = static_cast<const T*>(p.grad_y) + row * p.hidden;
    const T* grad_h = p.grad_h ? static_cast<const T*>(p.grad_h) + row * p.hidden : nullptr;
    const T* h = static_cast<const T*>(p.h) + row * p.hidden;
    T* grad_x = static_cast<T*>(p.grad_x) + row * p.hidden;
    const float rstd = p.rstd[row];

    float g[kWidth], w[kWidth], v[kWidth];
    float sum = 0.0f;
    for (int i = begin; i < hidden; i += stride) {
      load_elements<T>(grad_y + i, g);
      load_elements<T>(weight + i, w);
      load_elements<T>(h + i, v);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        sum = arch::fused_multiply_add(g[k] * (w[k] + p.weight_bias), v[k] * rstd, sum);
      }
    }
    const float mean = arch::divide(block_sum(sum, shared.sum), static_cast<float>(p.hidden));

    for (int i = begin; i < hidden; i += stride) {
      load_elements<T>(grad_y + i, g);
      load_elements<T>(weight + i, w);
      load_elements<T>(h + i, v);
      float result[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) result[k] = rstd * (g[k] * (w[k] + p.weight_bias) - v[k] * rstd * mean);
      if (grad_h != nullptr) {
        load_elements<T>(grad_h + i, g);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) result[k] += g[k];
      }
      if constexpr (kWidth == 1) {
        grad_x[i] = from_float<T>(result[0]);
      } else {
        store_pack(grad_x + i, pack<T>(result));
      }
    }
  }
}

// registers: <= 64
template <class T, int kWidth>
TW_KERNEL void __launch_bounds__(256) rms_norm_backward_groups_kernel(RmsNormBackwardParams p, int64_t num_tiles) {
  const int64_t group = blockIdx.x / num_tiles, tile = blockIdx.x % num_tiles;
  const int64_t column = (tile * blockDim.x + threadIdx.x) * kWidth;
  if (column >= p.hidden) return;
  const int64_t end = rms_norm_backward_group_begin(p.num_rows, group + 1);
  float sum[kWidth] = {};
  for (int64_t row = rms_norm_backward_group_begin(p.num_rows, group); row < end; ++row) {
    float g[kWidth], v[kWidth];
    load_elements<T>(static_cast<const T*>(p.grad_y) + row * p.hidden + column, g);
    load_elements<T>(static_cast<const T*>(p.h) + row * p.hidden + column, v);
    const float rstd = p.rstd[row];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k] = arch::fused_multiply_add(g[k], v[k] * rstd, sum[k]);
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) p.partials[group * rms_norm_backward_pitch(p.hidden) + column + k] = sum[k];
}

// registers: <= 32
template <class T>
TW_KERNEL void __launch_bounds__(256) rms_norm_backward_finish_kernel(RmsNormBackwardParams p, int64_t num_groups) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= p.hidden) return;
  float sum = 0.0f;
  for (int64_t group = 0; group < num_groups; ++group)
    sum += p.partials[group * rms_norm_backward_pitch(p.hidden) + column];
  static_cast<T*>(p.grad_weight)[column] = from_float<T>(sum);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
