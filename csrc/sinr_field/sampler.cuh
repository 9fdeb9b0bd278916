// The cells of sample_power_domain and sample_geometry on a GPU.
// Mapping: a warp takes a cell, a lane one realisation of each of its 8 rows; the block's warps take neighbouring
// cells, and a block keeps its tables in shared memory for all cells it strides over. What coverage is computed from
// waits in shared memory, each word read by the lane that wrote it, so a cell needs no barrier. Bytes: 16 for each sum
// of a cell, a sixteenth of a byte for each sum and realisation. Limit: issue of arithmetic; instructions counted and
// what they lead to expect: docs/performance.md.
#pragma once

#include "core/reduce.cuh"
#include "sinr_field/received.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int32_t kSamplerThreads = 256;
constexpr int32_t kSamplerWarps = kSamplerThreads / arch::kWarpSize;
constexpr int32_t kFewIntervals = 2048, kManyIntervals = 8192;

template <int kDensities, int kIntervals>
struct SamplerShared {
  arch::Array<arch::Vec16, kIntervals> tables;
  arch::Array<uint32_t, kDensities * kHistogramBins> histogram;
  arch::Array<float, kDensities * kCellRows * kSamplerThreads> kept;
  arch::Array<float, kCellRows * kSamplerThreads> kept_for_all;
};

// Reads the four coefficients of an interval: from shared memory, `first` intervals on, or from global memory.
template <class Tables>
struct ReadShared {
  const Tables& tables;
  int32_t first;
  TW_MEMBER void operator()(uint32_t interval, float (&c)[4]) const {
    const arch::Vec16 v = tables[first + static_cast<int32_t>(interval)];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = float_of(v.words[i]);
  }
};
struct ReadGlobal {
  const float* coefficients;
  TW_MEMBER void operator()(uint32_t interval, float (&c)[4]) const {
    const arch::Vec16 v = reinterpret_cast<const arch::Vec16*>(coefficients)[interval];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = float_of(v.words[i]);
  }
};

template <class Shared>
TW_DEVICE void load_table(Shared& shared, int32_t first, const float* coefficients, int32_t count) {
  for (int32_t i = arch::thread_index(); i < count; i += kSamplerThreads) {
    shared.tables[first + i] = reinterpret_cast<const arch::Vec16*>(coefficients)[i];
  }
}

// Adds the block's counts to the histogram and clears them. All threads; barriers around it are the caller's.
template <class Counts>
TW_DEVICE void flush_counts(Counts& counts, int32_t size, int64_t* histogram) {
  for (int32_t bin = arch::thread_index(); bin < size; bin += kSamplerThreads) {
    if (counts[bin] != 0) {
      arch::add_relaxed<arch::Scope::gpu>(reinterpret_cast<uint64_t*>(histogram) + bin, uint64_t{counts[bin]});
    }
    counts[bin] = 0;
  }
}

// Value and value squared of one lane.
struct LaneSum {
  double sum = 0.0, squares = 0.0;
  TW_MEMBER void add(bool is_live, double value) {
    const double counted = is_live ? value : 0.0;
    sum += counted;
    squares = arch::fused_multiply_add(counted, counted, squares);
  }
  // Of the warp; lane 0 stores.
  TW_MEMBER void store(double* destination) const {
    const double all = warp_sum(sum), all_squares = warp_sum(squares);
    if (arch::lane_index() == 0) {
      destination[0] = all;
      destination[1] = all_squares;
    }
  }
};

TW_DEVICE Realisations<float> realisation(const SamplerParams& p, int64_t index) {
  const uint64_t number = static_cast<uint64_t>(p.first_realisation + index);
  return {static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32)};
}

template <class Walker, int kDensities, class Params, class Tables, class Shared>
TW_DEVICE void sample_cell(const Params& p, const Tables& tables, const float (&scales)[2 * kDensities], int64_t cell,
                           int64_t first_density, Shared& shared) {
  LaneSum moments[kDensities][kNumMoments];
  for (int row = 0; row < kCellRows; ++row) {
    const int64_t index = cell * kCell + row * arch::kWarpSize + arch::lane_index();
    const bool is_live = index < p.num_realisations;
    const int place = row * kSamplerThreads + arch::thread_index();
    Walker walker(p, tables, scales);
    walker.walk(realisation(p, index));
    shared.kept_for_all[place] = walker.kept_for_all();
#pragma unroll
    for (int d = 0; d < kDensities; ++d) {
      const float sinr = walker.sinr(d);
      shared.kept[d * static_cast<int>(kCellRows) * kSamplerThreads + place] = walker.kept(d);
      moments[d][kRate].add(is_live, walker.rate(d));
      moments[d][kInverseSinr].add(is_live, inverse_sinr(sinr));
      moments[d][kResidualShare].add(is_live, walker.received.residual_share[d]);
      if (!is_live || first_density + d >= p.num_densities) continue;
      arch::add_shared(shared.histogram[d * kHistogramBins + histogram_bin(sinr)], 1);
      if (p.samples == nullptr) continue;
      float* sample = p.samples + 2 * ((first_density + d) * p.num_realisations + index);
      sample[0] = shown(walker.received.signal[d]);
      sample[1] = shown(walker.received.interference[d]);
    }
  }
#pragma unroll
  for (int d = 0; d < kDensities; ++d) {
    if (first_density + d >= p.num_densities) break;
    double* sums = p.cell_sums + 2 * p.num_items * (cell * p.num_densities + first_density + d);
#pragma unroll
    for (int i = 0; i < kNumMoments; ++i) moments[d][i].store(sums + 2 * i);
    for (int64_t t = 0; t < p.num_thresholds; ++t) {
      const float log2_threshold = p.log2_thresholds[t];
      LaneSum coverage;
      for (int row = 0; row < kCellRows; ++row) {
        const int place = row * kSamplerThreads + arch::thread_index();
        const int64_t index = cell * kCell + row * arch::kWarpSize + arch::lane_index();
        const float kept = shared.kept[d * static_cast<int>(kCellRows) * kSamplerThreads + place];
        coverage.add(index < p.num_realisations,
                     Walker::coverage(tables, kept, shared.kept_for_all[place], scales[2 * d + 1], log2_threshold));
      }
      coverage.store(sums + 2 * (kNumMoments + t));
    }
  }
}

// All tiles of a block: groups of kDensities densities one after the other, so that counts are flushed rarely.
template <class Walker, int kDensities, class Params, class Tables, class Shared>
TW_DEVICE void sample_tiles(const Params& p, const SamplerPlan& plan, const Tables& tables, Shared& shared) {
  for (int32_t bin = arch::thread_index(); bin < kDensities * kHistogramBins; bin += kSamplerThreads) {
    shared.histogram[bin] = 0;
  }
  arch::sync_block();  // tables and counts
  const int64_t cells = num_cells(p.num_realisations);
  int64_t group = -1;
  float scales[2 * kDensities] = {};
  const auto flush_group = [&] {
    arch::sync_block();
    const int64_t left = p.num_densities - group * kDensities;
    const int32_t densities = left < kDensities ? static_cast<int32_t>(left) : kDensities;
    flush_counts(shared.histogram, densities * kHistogramBins, p.histogram + group * kDensities * kHistogramBins);
    arch::sync_block();
  };
  for (int64_t tile = blockIdx.x; tile < plan.num_tiles; tile += gridDim.x) {
    if (tile / plan.tiles_per_group != group) {
      if (group >= 0) flush_group();
      group = tile / plan.tiles_per_group;
#pragma unroll
      for (int d = 0; d < kDensities; ++d) {
        const int64_t density = group * kDensities + d;
        const float* source = p.scales + 2 * (density < p.num_densities ? density : p.num_densities - 1);
        scales[2 * d] = source[0];
        scales[2 * d + 1] = source[1];
      }
    }
    const int64_t cell = tile % plan.tiles_per_group * kSamplerWarps + arch::warp_index();
    if (cell < cells) {
      sample_cell<Walker, kDensities>(p, tables, scales, cell, group * kDensities, shared);
    }
  }
  if (group >= 0) flush_group();
}

// The cells of each batch, in order: a thread for each sum.
// registers: <= 40
template <int kThreads>
TW_KERNEL void __launch_bounds__(kThreads) fold_cells_kernel(const SamplerParams p) {
  const int64_t items = 2 * p.num_items * p.num_densities, cells = num_cells(p.num_realisations);
  const int64_t sums = num_batches(p.num_realisations) * items;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + arch::thread_index(); i < sums; i += stride) {
    const int64_t batch = i / items, item = i % items;
    const int64_t first = batch * kCellsPerBatch,
                  last = first + kCellsPerBatch < cells ? first + kCellsPerBatch : cells;
    double sum = 0.0;
    for (int64_t cell = first; cell < last; ++cell) sum += p.cell_sums[cell * items + item];
    p.sums[i] = sum;
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
