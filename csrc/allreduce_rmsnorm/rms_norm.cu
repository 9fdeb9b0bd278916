#include "allreduce_rmsnorm/rms_norm.cuh"
#include "core/launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

constexpr int32_t round_up_to_warp(int64_t threads) { return static_cast<int32_t>((threads + 31) / 32 * 32); }

template <class T, int kPacks>
auto select_kernel(bool has_residual) {
  return has_residual ? rms_norm_kernel<T, kPacks, true> : rms_norm_kernel<T, kPacks, false>;
}

// Every instantiation there is: 3 element types x (4 register sizes + scalar) x with or without residual.
template <class T>
void (*select_kernel(int packs_per_thread, bool has_residual))(RmsNormParams) {
  switch (packs_per_thread) {
    case 1:
      return select_kernel<T, 1>(has_residual);
    case 2:
      return select_kernel<T, 2>(has_residual);
    case 4:
      return select_kernel<T, 4>(has_residual);
    case 8:
      return select_kernel<T, 8>(has_residual);
    default:
      return has_residual ? rms_norm_scalar_kernel<T, true> : rms_norm_scalar_kernel<T, false>;
  }
}

}  // namespace

RmsNormPlan plan_rms_norm(int64_t num_rows, int64_t hidden, DType dtype, bool aligned, int64_t max_grid) {
  RmsNormPlan plan;
  const int64_t elements_per_pack = 16 / size_of(dtype);
  const int64_t num_packs = hidden / elements_per_pack;
  constexpr int64_t kMaxPacks = 8 * 1024;
  int64_t work_items = hidden;  // what the threads of a row share out: packs, or elements in the scalar kernel
  if (aligned && hidden % elements_per_pack == 0 && num_packs <= kMaxPacks) {
    work_items = num_packs;
    // Up to 512 threads a row: four or more rows in flight per SM hide each other's barriers.
    plan.packs_per_thread = num_packs <= 512 ? 1 : num_packs <= 1024 ? 2 : num_packs <= 4096 ? 4 : 8;
  }
  if (work_items <= 64) {  // a warp per row, four rows a block
    if (plan.packs_per_thread == 1 && work_items > 32) plan.packs_per_thread = 2;
    plan.block_x = 32;
    plan.block_y = 4;
  } else if (plan.packs_per_thread > 0) {
    const int64_t preferred_threads = (work_items + plan.packs_per_thread - 1) / plan.packs_per_thread;
    plan.block_x = round_up_to_warp(preferred_threads);
    plan.block_y = 1;
  } else {
    plan.block_x = work_items >= 1024 ? 1024 : round_up_to_warp(work_items);
    plan.block_y = 1;
  }
  const int64_t blocks = (num_rows + plan.block_y - 1) / plan.block_y;
  plan.grid = blocks < max_grid ? blocks : max_grid;
  return plan;
}

Status rms_norm(const RmsNormParams& params, const ExecutionContext& context) {
  const int64_t bytes = size_of(params.dtype);
  const bool has_residual = params.residual != nullptr;
  const bool aligned = reinterpret_cast<uintptr_t>(params.weight) % 16 == 0 &&
                       is_aligned_16(params.x, params.x_rows, bytes) && is_aligned_16(params.y, params.y_rows, bytes) &&
                       (!has_residual || (is_aligned_16(params.residual, params.residual_rows, bytes) &&
                                          is_aligned_16(params.h, params.h_rows, bytes)));
  const RmsNormPlan plan = plan_rms_norm(params.num_rows, params.hidden, params.dtype, aligned, max_grid());
  const LaunchConfig config{.kernel = has_residual ? "add_rms_norm" : "rms_norm",
                            .grid = plan.grid,
                            .block_x = plan.block_x,
                            .block_y = plan.block_y,
                            .shared_bytes = sizeof(RmsNormShared)};
  return with_dtype(params.dtype, [&]<class T>() {
    return launch(config, context, select_kernel<T>(plan.packs_per_thread, has_residual), params);
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
