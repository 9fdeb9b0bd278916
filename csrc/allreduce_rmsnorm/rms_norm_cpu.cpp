// RMSNorm with an optional residual add on a CPU. A row is read from memory once: the second pass finds h in cache.
// Rows are shared out over the thread pool; within a row 2 x 16 lanes add up the squares in an order that depends on
// nothing but the column, so the result does not depend on threads, instruction set or the rows around it.
#include "allreduce_rmsnorm/rms_norm.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// The 16 values of h = round(x + residual), stored to h on the way; without a residual h is x and nothing is stored.
template <class T, bool kHasResidual>
TW_CPU Float16Lanes load_sum(const T* x, const T* residual, T* h) {
  Float16Lanes value;
  load_lanes(value, x);
  if constexpr (kHasResidual) {
    Float16Lanes other;
    load_lanes(other, residual);
    store_lanes(h, value + other);
    load_lanes(value, h);  // the norm is of the rounded sum
  }
  return value;
}

template <class T, bool kHasResidual>
TW_CPU float sum_of_squares(const T* x, const T* residual, T* h, int64_t hidden) {
  Float16Lanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) {
    const Float16Lanes first = load_sum<T, kHasResidual>(x + i, residual + i, h + i);
    const Float16Lanes second = load_sum<T, kHasResidual>(x + i + kLanes, residual + i + kLanes, h + i + kLanes);
    even = even + first * first;
    odd = odd + second * second;
  }
  if (i + kLanes <= hidden) {
    const Float16Lanes value = load_sum<T, kHasResidual>(x + i, residual + i, h + i);
    even = even + value * value;
    i += kLanes;
  }
  if (i < hidden) {
    Float16Lanes value;
    load_partial(value, x + i, hidden - i);
    if constexpr (kHasResidual) {
      Float16Lanes other;
      load_partial(other, residual + i, hidden - i);
      store_partial(h + i, value + other, hidden - i);
      load_partial(value, h + i, hidden - i);
    }
    odd = odd + value * value;
  }
  return sum_lanes(even + odd);
}

// Works on cached data, so it also asks for the next row: memory would otherwise idle in this pass.
template <class T>
TW_CPU void scale(const T* h, const T* weight, T* y, int64_t hidden, float rstd, float weight_bias, const T* next_x,
                  const T* next_residual) {
  const Float16Lanes factor = broadcast(rstd), bias = broadcast(weight_bias);
  Float16Lanes value, w;
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    __builtin_prefetch(next_x + i, 0, 2);
    __builtin_prefetch(next_residual + i, 0, 2);
    load_lanes(value, h + i);
    load_lanes(w, weight + i);
    store_lanes(y + i, value * factor * (w + bias));
  }
  if (i < hidden) {
    load_partial(value, h + i, hidden - i);
    load_partial(w, weight + i, hidden - i);
    store_partial(y + i, value * factor * (w + bias), hidden - i);
  }
}

template <class T, bool kHasResidual>
TW_CPU void normalize_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const auto x_row = [&](int64_t row) { return static_cast<const T*>(p.x) + p.x_rows.offset(row); };
  // Without a residual h is x: read only, so that y may be x.
  const auto residual_row = [&](int64_t row) {
    return kHasResidual ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) : x_row(row);
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = x_row(row);
    T* h = kHasResidual ? static_cast<T*>(p.h) + p.h_rows.offset(row) : const_cast<T*>(x);
    const float mean =
        sum_of_squares<T, kHasResidual>(x, residual_row(row), h, p.hidden) / static_cast<float>(p.hidden);
    const float rstd = 1.0f / std::sqrt(mean + p.eps);
    const int64_t next = row + 1 < end ? row + 1 : row;
    scale(h, static_cast<const T*>(p.weight), static_cast<T*>(p.y) + p.y_rows.offset(row), p.hidden, rstd,
          p.weight_bias, x_row(next), residual_row(next));
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
}

}  // namespace

Status rms_norm_kernel(const RmsNormParams& p, const ExecutionContext& context) {
  with_dtype(p.dtype, [&]<class T>() {
    auto rows = [&](int64_t begin, int64_t end) {
      if (p.residual != nullptr) {
        normalize_rows<T, true>(p, begin, end);
      } else {
        normalize_rows<T, false>(p, begin, end);
      }
    };
    constexpr int64_t kElementsPerTask = 32 * 1024;  // about 10 us: less is not worth waking a thread for
    parallel_for(context, 0, p.num_rows, kElementsPerTask / p.hidden + 1, rows);
  });
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(rms_norm, RmsNormParams)
