// Tensors seen as rows: [..., hidden] with a contiguous last dimension and leading dimensions that fold into at most
// two strides (a matrix, a slice of one, or per-head slices of a packed qkv). Checked here, used through core/rows.h.
#pragma once

#include <utility>

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
  if (count_rows(t) == 0) return RowLayout{};
  int64_t count[2] = {1, 1}, stride[2] = {0, 0};  // [0] the inner level, [1] the outer
  int64_t stride_bits = 0;
  for (int64_t axis = 0; axis < t.dim - 1; ++axis) stride_bits |= t.strides[axis];
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
  return RowLayout{count[0], stride[0], stride[1], stride_bits};
}

// The two levels of a layout, the one with the smaller stride first.
struct RowLevels {
  int64_t low_count, low_stride, high_count, high_stride;

  RowLevels(const RowLayout& layout, int64_t rows)
      : low_count(layout.inner_rows),
        low_stride(layout.inner_stride),
        high_count(rows / layout.inner_rows),
        high_stride(layout.outer_stride) {
    if (low_count == 1 || (high_count > 1 && high_stride < low_stride)) {
      std::swap(low_count, high_count);
      std::swap(low_stride, high_stride);
    }
  }
};

// Rows that are written must not share elements: an expanded tensor would be a race.
inline void check_rows_disjoint(const char* op, const TensorInfo& t, const RowLayout& layout) {
  const int64_t rows = count_rows(t), hidden = t.size(-1);
  if (rows <= 1) return;
  const RowLevels levels(layout, rows);
  const bool low_ok = levels.low_count == 1 || levels.low_stride >= hidden;
  const bool high_ok =
      levels.high_count == 1 || levels.high_stride >= (levels.low_count - 1) * levels.low_stride + hidden;
  if (!low_ok || !high_ok) fail(op, t, "have rows that do not overlap", "strides " + join(t.strides, t.dim));
}

// Do the rows of a layout (disjoint, `hidden` elements each) share an element with the same rows moved by `distance`?
inline bool rows_meet(const RowLayout& layout, int64_t rows, int64_t hidden, int64_t distance) {
  const RowLevels levels(layout, rows);
  const auto within = [](int64_t steps, int64_t count) { return -count < steps && steps < count; };
  // Only groups next to the distance can meet, since a group ends before the next begins; likewise for rows in a group.
  const int64_t near_high = levels.high_stride > 0 ? distance / levels.high_stride : 0;
  for (int64_t high = near_high - 1; high <= near_high + 1; ++high) {
    if (!within(high, levels.high_count)) continue;
    const int64_t rest = distance - high * levels.high_stride;
    const int64_t near_low = levels.low_stride > 0 ? rest / levels.low_stride : 0;
    for (int64_t low = near_low - 1; low <= near_low + 1; ++low) {
      const int64_t gap = rest - low * levels.low_stride;
      if (within(low, levels.low_count) && -hidden < gap && gap < hidden) return true;
    }
  }
  return false;
}

// Two tensors of one shape, `t` written and its rows disjoint: their elements must not overlap. Exact where both have
// the same strides (two halves of a wider buffer, queries and keys of a packed qkv), by address range otherwise.
inline void check_no_overlap(const char* op, const TensorInfo& t, const RowLayout& layout, const TensorInfo& other,
                             const RowLayout& other_layout, int64_t element_bytes) {
  const int64_t rows = count_rows(t), hidden = t.size(-1);
  if (rows == 0) return;
  const int64_t begin = reinterpret_cast<int64_t>(t.data), other_begin = reinterpret_cast<int64_t>(other.data);
  const int64_t end = begin + (layout.offset(rows - 1) + hidden) * element_bytes;
  const int64_t other_end = other_begin + (other_layout.offset(rows - 1) + hidden) * element_bytes;
  if (end <= other_begin || other_end <= begin) return;
  const bool same_strides = layout.inner_rows == other_layout.inner_rows &&
                            layout.inner_stride == other_layout.inner_stride &&
                            layout.outer_stride == other_layout.outer_stride;
  const int64_t distance = other_begin - begin;
  if (same_strides && distance % element_bytes == 0 && !rows_meet(layout, rows, hidden, distance / element_bytes)) {
    return;
  }
  fail(op, t, std::string("not overlap ") + other.name, "memory that is shared with it");
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
