#include "allreduce_rmsnorm/rms_norm_backward.cuh"
#include "core/launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

template <class T, int kWidth>
Status launch_rows_and_groups(const RmsNormBackwardParams& params, int64_t num_groups,
                              const ExecutionContext& context) {
  const int64_t chunks = (params.hidden + kWidth - 1) / kWidth;
  const int32_t row_threads = chunks >= 512 ? 512 : static_cast<int32_t>((chunks + 31) / 32 * 32);
  const LaunchConfig rows{.kernel = "rms_norm_backward_rows",
                          .grid = params.num_rows < max_grid() ? params.num_rows : max_grid(),
                          .block_x = row_threads,
                          .shared_bytes = sizeof(RmsNormBackwardShared)};
  const Status status = launch(rows, context, rms_norm_backward_rows_kernel<T, kWidth>, params);
  if (!status.is_ok()) return status;

  constexpr int32_t kGroupThreads = 256;
  const int64_t num_tiles = (chunks + kGroupThreads - 1) / kGroupThreads;
  const LaunchConfig groups{
      .kernel = "rms_norm_backward_groups", .grid = num_tiles * num_groups, .block_x = kGroupThreads};
  return launch(groups, context, rms_norm_backward_groups_kernel<T, kWidth>, params, num_tiles);
}

}  // namespace

Status rms_norm_backward(const RmsNormBackwardParams& params, const ExecutionContext& context) {
  const int64_t num_groups = rms_norm_backward_groups(params.num_rows);
  return with_dtype(params.dtype, [&]<class T>() {
    const Status status = params.hidden % kPackSize<T> == 0
                              ? launch_rows_and_groups<T, kPackSize<T>>(params, num_groups, context)
                              : launch_rows_and_groups<T, 1>(params, num_groups, context);
    if (!status.is_ok()) return status;
    constexpr int32_t kFinishThreads = 256;
    const LaunchConfig finish{.kernel = "rms_norm_backward_finish",
                              .grid = (params.hidden + kFinishThreads - 1) / kFinishThreads,
                              .block_x = kFinishThreads};
    return launch(finish, context, rms_norm_backward_finish_kernel<T>, params, num_groups);
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
