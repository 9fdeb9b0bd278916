// scale_rows on a CPU: rows shared out over the thread pool, 32 lanes at a time.
#include "core/cpu.h"
#include "template_op/scale_rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

Status scale_rows_kernel(const ScaleRowsParams& p, const ExecutionContext& context) {
  with_dtype(p.dtype, [&]<class T>() {
    auto rows = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
        T* y = static_cast<T*>(p.y) + row * p.hidden;
        const Lanes scale = broadcast(p.scale[row]);
        for_each_vector(p.hidden, [&](int64_t, auto load, auto store) { store(y, load(x) * scale); });
      }
    };
    parallel_for(context, 0, p.num_rows, 32 * 1024 / p.hidden + 1, rows);
  });
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(scale_rows, ScaleRowsParams)
