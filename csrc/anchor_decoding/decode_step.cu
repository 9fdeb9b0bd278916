#include "anchor_decoding/decode_step.cuh"
#include "core/launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <>
DecodeStepKernel select_decode_step_kernel<bf16>(int32_t);
template <>
DecodeStepKernel select_decode_step_kernel<fp16>(int32_t);
template <>
DecodeStepKernel select_decode_step_kernel<float>(int32_t);

// The second half alone: a block a sequence.
// registers: <= 64
TW_KERNEL void __launch_bounds__(kStepThreads) select_and_commit_kernel(const DecodeStepParams p) {
  SelectionShared& shared = arch::shared<SelectionShared>();
  for (int64_t sequence = blockIdx.x; sequence < p.batch; sequence += gridDim.x) {
    commit_sequence(p, sequence, shared);
    arch::sync_block();  // before the next sequence's keys
  }
}

DecodeStepPlan plan_decode_step(int64_t batch, int64_t block_length, int64_t vocab, int32_t features,
                                int64_t max_grid) {
  DecodeStepPlan plan;
  plan.block_x = kStepThreads;
  const int64_t rows = batch * block_length, segments = num_segments(vocab);
  // A segment a warp while there are few rows; then as few blocks a row, hence tickets, as still make four waves on 132
  // SMs, so that a last wave that is not full costs little.
  constexpr int64_t kEnoughBlocks = int64_t{4} * kStepBlocksPerSm * 132;
  const auto blocks_of = [&](int64_t each) { return (segments + each - 1) / each; };
  const int64_t enough_per_row = rows > 0 ? (kEnoughBlocks + rows - 1) / rows : 1;
  plan.segments_per_block = kStepWarps;
  while (plan.segments_per_block < segments && blocks_of(2 * plan.segments_per_block) >= enough_per_row) {
    plan.segments_per_block *= 2;
  }
  plan.blocks_per_row = blocks_of(plan.segments_per_block);
  const int64_t shares = rows * plan.blocks_per_row;
  plan.grid = shares < max_grid ? shares : max_grid;
  plan.features = kFeatureSets[3];
  for (int i = 3; i >= 0; --i) {
    if ((features & ~kFeatureSets[i]) == 0) plan.features = kFeatureSets[i];
  }
  return plan;
}

Status decode_step(const DecodeStepParams& params, const ExecutionContext& context) {
  if (!params.scan) {
    const int64_t grid = params.batch < max_grid() ? params.batch : max_grid();
    const LaunchConfig config{
        .kernel = "select_and_commit", .grid = grid, .block_x = kStepThreads, .shared_bytes = sizeof(SelectionShared)};
    return launch(config, context, select_and_commit_kernel, params);
  }
  const DecodeStepPlan plan =
      plan_decode_step(params.batch, params.block_length, params.vocab, params.features, max_grid());
  const LaunchConfig config{
      .kernel = "decode_step", .grid = plan.grid, .block_x = plan.block_x, .shared_bytes = sizeof(DecodeStepShared)};
  return with_dtype(params.dtype, [&]<class T>() {
    return launch(config, context, select_decode_step_kernel<T>(plan.features), params, plan.segments_per_block,
                  plan.blocks_per_row);
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
