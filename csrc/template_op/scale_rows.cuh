// y[r, :] = round(x[r, :] * scale[r]), one row per block.
// Mapping: block = row, thread t = elements t, t + block_x, ... of it.
// Bytes: 2 * rows * hidden * size. Limit: device memory. Not tuned: a template shows the shape of an op, not its speed.
#pragma once

#include "core/numeric.cuh"
#include "template_op/scale_rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// registers: <= 32
template <class T>
TW_KERNEL void __launch_bounds__(256) scale_rows_kernel(ScaleRowsParams p) {
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* y = static_cast<T*>(p.y) + row * p.hidden;
    const float scale = p.scale[row];
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) y[i] = from_float<T>(to_float(x[i]) * scale);
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
