// sample_power_domain on a CPU: cells shared out over the thread pool, a register's worth of realisations at a time.
// Limit: arithmetic and, close behind, the gathers of table coefficients.
#include "sinr_field/lanes_cpu.h"
//
#include "sinr_field/power_domain.cuh"
#include "sinr_field/sampler_cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

struct PowerTables {
  const PowerDomainParams& p;

  TW_MEMBER Part plane(const Part& g, int i) const {
    return interpolate(find(p.inverse_keys, g), ReadTable{p.inverse + int64_t{4} * p.inverse_keys.count * i});
  }
  TW_MEMBER Part power(const Part& g) const { return plane(g, 0); }
  TW_MEMBER Part rest_mean(const Part& g) const { return plane(g, 1); }
  TW_MEMBER Part rest_deviation(const Part& g) const { return plane(g, 2); }
  TW_MEMBER Part measure(const Part& z) const { return interpolate(find(p.measure_keys, z), ReadTable{p.measure}); }
};

}  // namespace

Status sample_power_domain_kernel(const PowerDomainParams& p, const ExecutionContext& context) {
  const PowerTables tables{p};
  auto cells = [&](int64_t begin, int64_t end) {
    for_each_group(p.num_densities, [&]<int kDensities>(int64_t first_density) {
      using Walker = PowerDomain<Part, kDensities, PowerTables>;
      sample_cells<Walker, kDensities>(p, tables, first_density, begin, end);
    });
  };
  parallel_for(context, 0, num_cells(p.num_realisations), 1, cells);  // a cell of one density takes 10 us or so
  fold_cells(p, context);
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(sample_power_domain, PowerDomainParams)
