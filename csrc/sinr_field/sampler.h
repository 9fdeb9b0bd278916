// What the three samplers of SINR have in common: which realisations, which sums, where they go.
//
// A cell is 256 realisations, added up by 32 lanes: lane j adds realisations j, 32 + j, ... in order, then the lanes
// are added as a tree, 16 apart first. A batch is 64 cells, added in order. Nothing in this depends on the machine.
#pragma once

#include "core/op.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int64_t kCellRows = 8;
constexpr int64_t kCell = 32 * kCellRows;  // realisations
constexpr int64_t kBatch = 16384;          // realisations
constexpr int64_t kCellsPerBatch = kBatch / kCell;
constexpr int64_t kMaxRealisations = int64_t{1} << 30;
constexpr int64_t kMaxIntervals = 4096;  // of one table
constexpr int64_t kMaxTerms = 64;
constexpr int64_t kMaxPoints = int64_t{1} << 20;
constexpr int64_t kMaxRateNodes = 16;

// The values summed beside the coverage of each threshold, in the order of sinr_field.MOMENTS.
enum Moment { kRate, kInverseSinr, kResidualShare, kNumMoments };

// In the order of sinr_field.RESIDUALS.
enum Residual : int64_t { kNoResidual, kMeanResidual, kGaussResidual };

constexpr int kHistogramBins = 512;
constexpr float kHistogramLow = -64.0f, kHistogramPerOctave = 4.0f;
constexpr int kMetaBins = 256;

constexpr int64_t num_cells(int64_t realisations) { return (realisations + kCell - 1) / kCell; }
constexpr int64_t num_batches(int64_t realisations) { return (realisations + kBatch - 1) / kBatch; }

struct SamplerParams {
  int64_t num_densities = 0;
  int64_t num_thresholds = 0;
  int64_t num_items = 0;  // sums for each density: moments, if any, then thresholds
  int64_t first_realisation = 0;
  int64_t num_realisations = 0;
  uint32_t seed_low = 0, seed_high = 0;
  float log2_noise = 0.0f;  // kNothing without noise
  float log2_activity = 0.0f;
  uint32_t activity_limit = 0;  // a word below it means active
  bool all_active = true;
  Residual residual = kGaussResidual;

  const float* scales = nullptr;           // [densities, 2]: 1 / density, log2(density)
  const float* log2_thresholds = nullptr;  // [thresholds]
  double* cell_sums = nullptr;             // scratch: [cells, densities, items, 2]
  double* sums = nullptr;                  // [batches, densities, items, 2]: of value, of value squared
  int64_t* histogram = nullptr;            // zeros when the kernel begins
  float* samples = nullptr;                // null: not kept
};

struct SamplerPlan {
  int32_t block_x = 0;          // threads: a warp takes a cell at a time
  int32_t densities = 0;        // or thresholds, that one walk serves
  int32_t intervals = 0;        // of tables that shared memory has room for
  int64_t tiles_per_group = 0;  // a tile is a cell for every warp of a block
  int64_t num_tiles = 0;
  int64_t grid = 0;  // blocks; each strides over the tiles
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
