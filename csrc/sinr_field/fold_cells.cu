#include "sinr_field/sampler_launch.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// The cells of each batch, in order: a thread for each sum.
// registers: <= 40
TW_KERNEL void __launch_bounds__(kSamplerThreads) fold_cells_kernel(const SamplerParams p) {
  const int64_t items = 2 * p.num_items * p.num_densities, cells = num_cells(p.num_realisations);
  const int64_t sums = num_batches(p.num_realisations) * items;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSamplerThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSamplerThreads + arch::thread_index(); i < sums; i += stride) {
    const int64_t batch = i / items, item = i % items;
    const int64_t first = batch * kCellsPerBatch,
                  last = first + kCellsPerBatch < cells ? first + kCellsPerBatch : cells;
    double sum = 0.0;
    for (int64_t cell = first; cell < last; ++cell) sum += p.cell_sums[cell * items + item];
    p.sums[i] = sum;
  }
}

Status fold_cells(const SamplerParams& p, const ExecutionContext& context) {
  const int64_t sums = num_batches(p.num_realisations) * 2 * p.num_items * p.num_densities;
  const int64_t blocks = (sums + kSamplerThreads - 1) / kSamplerThreads;
  const int64_t most = max_grid() < 65536 ? max_grid() : 65536;
  const LaunchConfig config{.kernel = "fold_cells", .grid = blocks < most ? blocks : most, .block_x = kSamplerThreads};
  return launch(config, context, fold_cells_kernel, p);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
