// Where row r of a tensor [..., hidden] begins: one stride, or two when the rows are slices of something wider
// (queries inside a packed qkv: token stride and head stride). All in elements, all 64-bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TW_ROWS_MEMBER __host__ __device__
#else
#define TW_ROWS_MEMBER
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct RowLayout {
  int64_t inner_rows = 1;    // rows [0, inner_rows) are inner_stride apart, then the next group starts
  int64_t inner_stride = 0;  // between rows of a group
  int64_t outer_stride = 0;  // between groups

  TW_ROWS_MEMBER int64_t offset(int64_t row) const {
    if (row < inner_rows) return row * inner_stride;  // the usual case: no division
    return row / inner_rows * outer_stride + row % inner_rows * inner_stride;
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
