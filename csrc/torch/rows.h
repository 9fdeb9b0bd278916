// Tensors seen as rows: [..., hidden] with a contiguous last dimension and leading dimensions that fold into at most
// two strides (a matrix, a slice of one, or per-head slices of a packed qkv). Checked here, used through core/rows.h.
#pragma once

#include "core/rows.h"
#include "torch/check.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

inline int64_t count_rows(const TensorInfo& t) {
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < t.dim; ++axis) rows *= t.sizes[axis];
  return rows;
}

// Folds the leading dimensions, last first. Raises where three different strides would be needed.
inline RowLayout check_rows(const char* op, const TensorInfo& t) {
  if (t.dim < 1) fail(op, t, "have shape [..., hidden]", "a scalar");
  if (t.size(-1) > 1 && t.stride(-1) != 1) {
    fail(op, t, "have a contiguous last dimension", "strides " + join(t.strides, t.dim));
  }
  int64_t count[2] = {1, 1}, stride[2] = {0, 0};  // [0] the inner level, [1] the outer
  int level = 0;
  for (int64_t axis = t.dim - 2; axis >= 0; --axis) {
    if (t.sizes[axis] == 1) continue;
    if (count[level] == 1) {
      count[level] = t.sizes[axis];
      stride[level] = t.strides[axis];
    } else if (t.strides[axis] == stride[level] * count[level]) {
      count[level] *= t.sizes[axis];
    } else if (level == 0) {
      level = 1;
      count[1] = t.sizes[axis];
      stride[1] = t.strides[axis];
    } else {
      fail(op, t, "have rows at one or two strides (call .contiguous())",
           "shape " + join(t.sizes, t.dim) + " with strides " + join(t.strides, t.dim));
    }
  }
  return RowLayout{count[0], stride[0], stride[1]};
}

// Rows that are written must not share elements: an expanded tensor would be a race.
inline void check_rows_disjoint(const char* op, const TensorInfo& t, const RowLayout& layout) {
  const int64_t rows = count_rows(t), hidden = t.size(-1);
  if (rows <= 1) return;
  int64_t low_count = layout.inner_rows, low_stride = layout.inner_stride;
  int64_t high_count = rows / layout.inner_rows, high_stride = layout.outer_stride;
  if (low_count == 1 || (high_count > 1 && high_stride < low_stride)) {
    std::swap(low_count, high_count);
    std::swap(low_stride, high_stride);
  }
  const bool low_ok = low_count == 1 || low_stride >= hidden;
  const bool high_ok = high_count == 1 || high_stride >= (low_count - 1) * low_stride + hidden;
  if (!low_ok || !high_ok) fail(op, t, "have rows that do not overlap", "strides " + join(t.strides, t.dim));
}

// Two tensors of one shape, at least one of them written: their elements must not overlap. Exact for equal
// single-stride layouts (so two halves of one wider buffer pass), by address range otherwise.
inline void check_no_overlap(const char* op, const TensorInfo& t, const RowLayout& layout, const TensorInfo& other,
                             const RowLayout& other_layout, int64_t element_bytes) {
  const int64_t rows = count_rows(t), hidden = t.size(-1);
  if (rows == 0) return;
  const auto last_row = [rows](const RowLayout& rows_of) { return rows_of.offset(rows - 1); };
  const int64_t begin = reinterpret_cast<int64_t>(t.data), other_begin = reinterpret_cast<int64_t>(other.data);
  const int64_t end = begin + (last_row(layout) + hidden) * element_bytes;
  const int64_t other_end = other_begin + (last_row(other_layout) + hidden) * element_bytes;
  if (end <= other_begin || other_end <= begin) return;
  const bool same_pitch = layout.inner_rows == rows && other_layout.inner_rows == rows && rows > 1 &&
                          layout.inner_stride == other_layout.inner_stride && layout.inner_stride > 0;
  if (same_pitch) {
    const int64_t pitch = layout.inner_stride * element_bytes;
    const int64_t phase = ((other_begin - begin) % pitch + pitch) % pitch;
    if (phase >= hidden * element_bytes && phase <= pitch - hidden * element_bytes) return;
  }
  fail(op, t, std::string("not overlap ") + other.name, "memory that is shared with it");
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
