// RMSNorm with an optional residual add on a CPU. A row is read from memory once: the second pass finds h in cache.
// Rows are shared out over the thread pool; within a row 32 lanes add up the squares in an order that depends on
// nothing but the column, so the result does not depend on threads, instruction set or the rows around it.
// Limit: memory. Both passes ask for a part of the next row (its x in the first, its residual or its place in y in the
// second), so that memory is never idle while they work on cached data: 82 % of an in-place read-modify-write became
// 103 % by that (add, 1024x8192 bf16, cold; 2 threads of a Xeon model 207, 2026-11-22).
#include "allreduce_rmsnorm/rms_norm.h"
#include "allreduce_rmsnorm/rms_norm_rows.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

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
    const T* residual = residual_row(row);
    T* h = kHasResidual ? static_cast<T*>(p.h) + p.h_rows.offset(row) : const_cast<T*>(x);
    T* y = y_row(row);
    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* next_x = x_row(next);
    const T* next_other = kHasResidual ? residual_row(next) : y_row(next);
    const float sum = sum_of_squares(p.hidden, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
      __builtin_prefetch(next_x + i, 0, 2);
      if constexpr (!kHasResidual) return load(x);
      store(h, load(x) + load(residual));
      return load(static_cast<const T*>(h));  // the norm is of the rounded sum
    });
    const float rstd = rstd_of(sum, p.hidden, p.eps);
    scale(h, static_cast<const T*>(p.weight), p.hidden, rstd, p.weight_bias,
          [&](int64_t i, auto store, const Lanes& value) __attribute__((always_inline)) {
            __builtin_prefetch(next_other + i, 0, 2);
            store(y, value);
          });
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
