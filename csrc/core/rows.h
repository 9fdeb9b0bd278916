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
  int64_t stride_bits = 0;   // all leading strides or-ed, those of size-1 dimensions too: see is_aligned_16

  TW_ROWS_MEMBER int64_t offset(int64_t row) const {
    if (row < inner_rows) return row * inner_stride;  // the usual case: no division
    return row / inner_rows * outer_stride + row % inner_rows * inner_stride;
  }
};

// Whether every row begins on a 16-byte boundary. Counts the strides of dimensions of size 1 as well, so that a row
// sliced out of a batch takes the same kernel, and gets the same bits, as the batch.
inline bool is_aligned_16(const void* first_row, const RowLayout& rows, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(first_row) % 16 == 0 && rows.stride_bits * element_bytes % 16 == 0;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
