#include "allreduce_rmsnorm/allreduce.cuh"
#include "core/launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <>
AllreduceKernel select_allreduce_kernel<bf16>(Transport, int);
template <>
AllreduceKernel select_allreduce_kernel<fp16>(Transport, int);
template <>
AllreduceKernel select_allreduce_kernel<float>(Transport, int);

// One rank's word to all the others that it will not make a call, from its host.
// registers: <= 64
TW_KERNEL void __launch_bounds__(arch::kWarpSize) refuse_kernel(const AllreduceParams p) {
  if (arch::thread_index() == 0) {
    give_up(p, Place{p.workspace.rank, 0, 0, 1}, Failure::refused, Stage::entry, p.workspace.rank, 0, 0);
  }
}

AllreducePlan plan_allreduce(int64_t num_tokens, int64_t hidden, DType dtype, int32_t world_size, int32_t max_ctas) {
  AllreducePlan plan;
  const int64_t num_packs = hidden * size_of(dtype) / 16;
  plan.packs_per_thread = 1;
  while (num_packs > int64_t{plan.packs_per_thread} * kAllreduceThreads) plan.packs_per_thread *= 2;
  plan.rows_in_flight = kPacksInFlight / plan.packs_per_thread;
  const int64_t threads = (num_packs + plan.packs_per_thread - 1) / plan.packs_per_thread;
  plan.block_x = static_cast<int32_t>((threads + arch::kWarpSize - 1) / arch::kWarpSize * arch::kWarpSize);
  // As many blocks as allowed while there are rows for them: with few rows it is latency that counts. One at least,
  // since a rank without rows still has to say so.
  const int64_t most_rows = (num_tokens + world_size - 1) / world_size;
  plan.grid = most_rows < 1 ? 1 : most_rows < max_ctas ? most_rows : max_ctas;
  return plan;
}

Status allreduce(const AllreduceParams& params, const ExecutionContext& context) {
  const Workspace& workspace = params.workspace;
  const AllreducePlan plan =
      plan_allreduce(params.num_tokens, params.hidden, params.dtype, workspace.world_size, params.max_ctas);
  AllreduceParams numbered = params;
  numbered.sequence = 0;  // the host's count: a replayed graph would repeat it
  const uint64_t word = entry_word(numbered, plan.grid);
  return with_dtype(params.dtype, [&]<class T>() {
    const AllreduceKernel kernel = select_allreduce_kernel<T>(workspace.transport, plan.packs_per_thread);
    const int64_t rows_in_flight = plan.rows_in_flight;
    const LaunchConfig config{
        .kernel = "allreduce",
        .grid = plan.grid * workspace.ranks_here,
        .block_x = plan.block_x,
        .shared_bytes = static_cast<int64_t>(sizeof(AllreduceShared<1>)) + (rows_in_flight - 1) * 32 * 4,
        // Virtual ranks wait for each other inside one launch, so all of its blocks must be resident.
        .cooperative = workspace.is_virtual()};
    return launch(config, context, kernel, params, word, static_cast<int32_t>(plan.grid));
  });
}

Status refuse_allreduce(const AllreduceParams& params, const ExecutionContext& context) {
  return launch({.kernel = "refuse_allreduce", .grid = 1, .block_x = arch::kWarpSize}, context, refuse_kernel, params);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
