// RMSNorm with an optional residual add on a CPU. A row is read from memory once: the second pass finds h in cache.
// Rows are shared out over the thread pool; within a row 32 lanes add up the squares in an order that depends on
// nothing but the column, so the result does not depend on threads, instruction set or the rows around it.
// Limit: memory. Both passes ask for a part of the next row (its x in the first, its residual or its place in y in the
// second), so that memory is never idle while they work on cached data: 82 % of an in-place read-modify-write became
// 103 % by that (add, 1024x8192 bf16, cold; 2 threads of a Xeon model 207, 2026-11-22).
#include "allreduce_rmsnorm/rms_norm.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// h = round(x + residual) is stored on the way; without a residual h is x and nothing is stored.
template <class T, bool kHasResidual>
TW_CPU float sum_of_squares(const T* x, const T* residual, T* h, int64_t hidden, const T* next_x) {
  // A lane adds up 32 squares, then the lanes' sums are added with compensation. Adding up to 2,048 squares in a row,
  // as one level would, loses digits that torch keeps, most of all in rows of nearly equal squares.
  Lanes total{}, lost{}, sum{};
  const auto fold = [&]() __attribute__((always_inline)) {
    const Lanes next = total + sum;
    lost = lost + ((total - next) + sum);
    total = next;
    sum = Lanes{};
  };
  for_each_vector(hidden, [&](int64_t i, auto load, auto store) {
    __builtin_prefetch(next_x + i, 0, 2);
    if (i % (32 * kLanes) == 0) fold();
    Lanes value = load(x);
    if constexpr (kHasResidual) {
      store(h, value + load(residual));
      value = load(static_cast<const T*>(h));  // the norm is of the rounded sum
    }
    sum = sum + value * value;
  });
  fold();
  const float plain = sum_lanes(total);
  return std::isfinite(plain) ? sum_lanes(total + lost) : plain;  // infinity - infinity is lost as NaN
}

// y = round(h * rstd * (weight + weight_bias)).
template <class T>
TW_CPU void scale(const T* h, const T* weight, T* y, int64_t hidden, float rstd, float weight_bias,
                  const T* wanted_next) {
  const Lanes factor = broadcast(rstd), bias = broadcast(weight_bias);
  for_each_vector(hidden, [&](int64_t i, auto load, auto store) {
    __builtin_prefetch(wanted_next + i, 0, 2);
    store(y, load(h) * factor * (load(weight) + bias));
  });
}

template <class T, bool kHasResidual>
TW_CPU void normalize_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const auto x_row = [&](int64_t row) { return static_cast<const T*>(p.x) + p.x_rows.offset(row); };
  const auto y_row = [&](int64_t row) { return static_cast<T*>(p.y) + p.y_rows.offset(row); };
  // Without a residual h is x: read only, so that y may be x.
  const auto residual_row = [&](int64_t row) {
    return kHasResidual ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) : x_row(row);
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = x_row(row);
    T* h = kHasResidual ? static_cast<T*>(p.h) + p.h_rows.offset(row) : const_cast<T*>(x);
    const int64_t next = row + 1 < end ? row + 1 : row;
    const float sum = sum_of_squares<T, kHasResidual>(x, residual_row(row), h, p.hidden, x_row(next));
    const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(p.hidden) + p.eps);
    scale(h, static_cast<const T*>(p.weight), y_row(row), p.hidden, rstd, p.weight_bias,
          kHasResidual ? residual_row(next) : y_row(next));
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
