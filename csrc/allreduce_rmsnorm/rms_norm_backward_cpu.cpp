// The gradient of RMSNorm on a CPU: a task takes a group of rows, computes their grad_x and sums their share of the
// weight's gradient into the group's partial, which stays in its cache; a second pass adds the partials in group order.
#include "allreduce_rmsnorm/rms_norm_backward.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

template <class T>
TW_CPU void backward_row(const RmsNormBackwardParams& p, int64_t row, float* partial) {
  const int64_t hidden = p.hidden;
  const T* grad_y = static_cast<const T*>(p.grad_y) + row * hidden;
  const T* h = static_cast<const T*>(p.h) + row * hidden;
  const T* weight = static_cast<const T*>(p.weight);
  const T* grad_h = p.grad_h ? static_cast<const T*>(p.grad_h) + row * hidden : nullptr;
  T* grad_x = static_cast<T*>(p.grad_x) + row * hidden;
  const Lanes rstd = broadcast(p.rstd[row]), bias = broadcast(p.weight_bias);

  Lanes sum{};
  for_each_vector(hidden, [&](int64_t i, auto load_row, auto) {
    const Lanes g = load_row(grad_y), n = load_row(h) * rstd;
    sum = sum + g * (load_row(weight) + bias) * n;
    store(partial + i, load(partial + i) + g * n);  // whole vectors, in T's lane order like the other partials
  });
  const Lanes mean = broadcast(sum_lanes(sum) / static_cast<float>(hidden));
  for_each_vector(hidden, [&](int64_t, auto load_row, auto store_row) {
    Lanes result = rstd * (load_row(grad_y) * (load_row(weight) + bias) - load_row(h) * rstd * mean);
    if (grad_h != nullptr) result = result + load_row(grad_h);
    store_row(grad_x, result);
  });
}

}  // namespace

Status rms_norm_backward_kernel(const RmsNormBackwardParams& p, const ExecutionContext& context) {
  const int64_t num_groups = rms_norm_backward_groups(p.num_rows);
  const int64_t pitch = rms_norm_backward_pitch(p.hidden);
  static_assert(rms_norm_backward_pitch(1) % kLanes == 0);
  with_dtype(p.dtype, [&]<class T>() {
    auto groups = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        float* partial = p.partials + group * pitch;
        std::memset(partial, 0, sizeof(float) * static_cast<size_t>(pitch));
        const int64_t last = rms_norm_backward_group_begin(p.num_rows, group + 1);
        for (int64_t row = rms_norm_backward_group_begin(p.num_rows, group); row < last; ++row) {
          backward_row<T>(p, row, partial);
        }
      }
    };
    parallel_for(context, 0, num_groups, 1, groups);

    auto columns = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes) {
        Lanes sum{};
        for (int64_t group = 0; group < num_groups; ++group) sum = sum + load(p.partials + group * pitch + i);
        T* grad_weight = static_cast<T*>(p.grad_weight) + i;
        i + kLanes <= p.hidden ? store(grad_weight, sum) : store_tail(grad_weight, p.hidden - i, sum);
      }
    };
    parallel_for(context, 0, pitch / kLanes, 32, columns);
  });
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(rms_norm_backward, RmsNormBackwardParams)
