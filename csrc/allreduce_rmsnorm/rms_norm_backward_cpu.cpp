// The gradient of RMSNorm on a CPU: a task takes a group of rows, computes their grad_x and sums their share of the weight's
// gradient into the group's partial, which stays in its cache; a second pass adds the partials in group order.
#include "allreduce_rmsnorm/rms_norm_backward.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// Lanes [i, i + 16) of a row, the last ones zero where the row ends.
template <class T>
TW_CPU Float16Lanes load_at(const T* row, int64_t i, int64_t hidden) {
  Float16Lanes lanes;
  if (i + kLanes <= hidden) {
    load_lanes(lanes, row + i);
  } else {
    load_partial(lanes, row + i, hidden - i);
  }
  return lanes;
}
template <class T>
TW_CPU void store_at(T* row, int64_t i, int64_t hidden, const Float16Lanes& lanes) {
  if (i + kLanes <= hidden) {
    store_lanes(row + i, lanes);
  } else {
    store_partial(row + i, lanes, hidden - i);
  }
}

template <class T>
TW_CPU void backward_row(const RmsNormBackwardParams& p, int64_t row, float* partial) {
  const int64_t hidden = p.hidden;
  const T* grad_y = static_cast<const T*>(p.grad_y) + row * hidden;
  const T* h = static_cast<const T*>(p.h) + row * hidden;
  const T* weight = static_cast<const T*>(p.weight);
  T* grad_x = static_cast<T*>(p.grad_x) + row * hidden;
  const Float16Lanes rstd = broadcast(p.rstd[row]), bias = broadcast(p.weight_bias);

  Float16Lanes sum{};
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const Float16Lanes g = load_at(grad_y, i, hidden), n = load_at(h, i, hidden) * rstd;
    sum = sum + g * (load_at(weight, i, hidden) + bias) * n;
    store_at(partial, i, hidden, load_at(partial, i, hidden) + g * n);
  }
  const Float16Lanes mean = broadcast(sum_lanes(sum) / static_cast<float>(hidden));
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const Float16Lanes a = load_at(grad_y, i, hidden) * (load_at(weight, i, hidden) + bias);
    Float16Lanes result = rstd * (a - load_at(h, i, hidden) * rstd * mean);
    if (p.grad_h != nullptr) result = result + load_at(static_cast<const T*>(p.grad_h) + row * hidden, i, hidden);
    store_at(grad_x, i, hidden, result);
  }
}

}  // namespace

Status rms_norm_backward_kernel(const RmsNormBackwardParams& p, const ExecutionContext& context) {
  const int64_t num_groups = rms_norm_backward_groups(p.num_rows);
  with_dtype(p.dtype, [&]<class T>() {
    auto groups = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        float* partial = p.partials + group * p.hidden;
        std::memset(partial, 0, sizeof(float) * static_cast<size_t>(p.hidden));
        const int64_t last = rms_norm_backward_group_begin(p.num_rows, group + 1);
        for (int64_t row = rms_norm_backward_group_begin(p.num_rows, group); row < last; ++row) {
          backward_row<T>(p, row, partial);
        }
      }
    };
    parallel_for(context, 0, num_groups, 1, groups);

    auto columns = [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column) {
        float sum = 0.0f;
        for (int64_t group = 0; group < num_groups; ++group) sum += p.partials[group * p.hidden + column];
        static_cast<T*>(p.grad_weight)[column] = from_float<T>(sum);
      }
    };
    parallel_for(context, 0, p.hidden, 1024, columns);
  });
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(rms_norm_backward, RmsNormBackwardParams)
