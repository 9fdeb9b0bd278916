// sample_geometry on a CPU: cells shared out over the thread pool, a register's worth of realisations at a time.
// Limit: arithmetic and, close behind, the gathers of table coefficients.
#include "sinr_field/lanes_cpu.h"
//
#include "sinr_field/geometry.cuh"
#include "sinr_field/sampler_cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

struct GeometryTables {
  const SampleGeometryParams& p;

  TW_MEMBER Part gain(const Part& s) const { return interpolate(find(p.gain_keys, s), ReadTable{p.gain}); }
  TW_MEMBER Part mark(const PartBits& word) const {
    return interpolate(find_quantile<Part>(p.fading_keys, word), ReadTable{p.fading});
  }
  TW_MEMBER Part far_mean(const Part& s) const { return interpolate(find(p.far_keys, s), ReadTable{p.far}); }
  TW_MEMBER Part far_deviation(const Part& s) const {
    return interpolate(find(p.far_keys, s), ReadTable{p.far + int64_t{4} * p.far_keys.count});
  }
};

}  // namespace

Status sample_geometry_kernel(const SampleGeometryParams& p, const ExecutionContext& context) {
  const GeometryTables tables{p};
  auto cells = [&](int64_t begin, int64_t end) {
    for_each_group(p.num_densities, [&]<int kDensities>(int64_t first_density) {
      using Walker = Geometry<Part, kDensities, GeometryTables>;
      sample_cells<Walker, kDensities>(p, tables, first_density, begin, end);
    });
  };
  parallel_for(context, 0, num_cells(p.num_realisations), 1, cells);
  fold_cells(p, context);
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(sample_geometry, SampleGeometryParams)
