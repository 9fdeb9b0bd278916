// rayleigh_conditional on a CPU: cells shared out over the thread pool, a register's worth of realisations at a time.
// Limit: arithmetic, two multiply-adds for each point and threshold beside the gain of the point.
#include "sinr_field/lanes_cpu.h"
//
#include "sinr_field/rayleigh.cuh"
#include "sinr_field/sampler_cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

struct GainTables {
  const RayleighParams& p;

  TW_MEMBER Part gain(const Part& s) const { return interpolate(find(p.gain_keys, s), ReadTable{p.gain}); }
  TW_MEMBER Part far_mean(const Part& s) const { return interpolate(find(p.far_keys, s), ReadTable{p.far}); }
  TW_MEMBER Part far_deviation(const Part& s) const {
    return interpolate(find(p.far_keys, s), ReadTable{p.far + int64_t{4} * p.far_keys.count});
  }
};

struct Gains {
  Part values[kMaxServers];
  TW_MEMBER void set(int32_t i, const Part& gain) { values[i] = gain; }
  TW_MEMBER Part get(int32_t i) const { return values[i]; }
};

template <int kThresholds>
TW_CPU void sample_thresholds(const RayleighParams& p, int64_t cell, int64_t density, int64_t first_threshold,
                              uint32_t* counts) {
  const GainTables tables{p};
  const int64_t first_row = density * p.num_thresholds + first_threshold;
  LaneSums sums[kThresholds];
  for (LaneSums& of_threshold : sums) of_threshold.clear();
  for (int part = 0; part < kParts; ++part) {
    for (int64_t row = 0; row < kCellRows; ++row) {
      const PartOfCell realisations(p, cell, row, part);
      Gains gains;
      Rayleigh<Part, kThresholds, GainTables, Gains> walker(p, tables, gains, p.scales + 2 * density,
                                                            p.log2_thresholds + first_threshold);
      walker.walk(realisations.numbers);
      for (int t = 0; t < kThresholds; ++t) {
        sums[t].add(part, realisations.is_live, walker.coverage[t]);
        double coverage[kPartLanes];
        std::memcpy(coverage, &walker.coverage[t], sizeof(coverage));
        for (int lane = 0; lane < kPartLanes; ++lane) {
          if (realisations.is_live[lane] == 0) continue;
          ++counts[t * kMetaBins + meta_bin(coverage[lane])];
          if (p.samples == nullptr) continue;
          p.samples[(first_row + t) * p.num_realisations + realisations.first + lane] =
              static_cast<float>(coverage[lane]);
        }
      }
    }
  }
  for (int t = 0; t < kThresholds; ++t) {
    sums[t].store(p.cell_sums + 2 * (cell * p.num_densities * p.num_thresholds + first_row + t));
  }
}

template <int kThresholds>
void sample_cells(const RayleighParams& p, int64_t density, int64_t first_threshold, int64_t begin, int64_t end) {
  uint32_t counts[kThresholds * kMetaBins] = {};
  for (int64_t cell = begin; cell < end; ++cell) {
    sample_thresholds<kThresholds>(p, cell, density, first_threshold, counts);
  }
  flush(counts, kThresholds * kMetaBins, p.histogram + kMetaBins * (density * p.num_thresholds + first_threshold));
}

}  // namespace

Status rayleigh_conditional_kernel(const RayleighParams& p, const ExecutionContext& context) {
  auto cells = [&](int64_t begin, int64_t end) {
    for (int64_t density = 0; density < p.num_densities; ++density) {
      for_each_group(p.num_thresholds, [&]<int kThresholds>(int64_t first_threshold) {
        sample_cells<kThresholds>(p, density, first_threshold, begin, end);
      });
    }
  };
  parallel_for(context, 0, num_cells(p.num_realisations), 1, cells);
  fold_cells(p, context);
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(rayleigh_conditional, RayleighParams)
