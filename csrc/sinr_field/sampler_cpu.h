// The cells of a sampler on a CPU: walks 32 lanes by rows, sums what each realisation gives, in the order of sampler.h.
//
// A Walker<kDensities> draws a Part of realisations at a time (power_domain.cuh, geometry.cuh).
#pragma once

#include "sinr_field/lanes_cpu.h"
#include "sinr_field/received.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

// Reads the four coefficients of an interval from a table in memory.
struct ReadTable {
  const float* coefficients;
  TW_MEMBER void operator()(const PartBits& interval, Part (&c)[4]) const { gather_rows(coefficients, interval, c); }
};

TW_CPU PartInts lane_numbers() {
  PartInts numbers;
  for (int lane = 0; lane < kPartLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// Value and value squared, added up by 32 lanes.
struct LaneSums {
  WidePart sum[kParts], squares[kParts];

  TW_MEMBER void clear() { std::memset(this, 0, sizeof(*this)); }
  TW_MEMBER void add(int part, const PartInts& is_live, const WidePart& value) {
    const WidePart zero{}, counted = Math<Part>::where(is_live, value, zero);
    sum[part] = sum[part] + counted;
    squares[part] = Math<Part>::wide_multiply_add(counted, counted, squares[part]);
  }
  TW_MEMBER void store(double* destination) const {
    destination[0] = tree(sum);
    destination[1] = tree(squares);
  }

 private:
  TW_MEMBER static double tree(const WidePart (&parts)[kParts]) {
    double v[kLanes];
    std::memcpy(v, parts, sizeof(v));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    return v[0];
  }
};

// Realisations of one Part: row `row` of a cell, part `part` of its 32 lanes.
struct PartOfCell {
  int64_t first;  // realisation, from 0 in this call
  PartInts is_live;
  Realisations<Part> numbers;

  TW_MEMBER PartOfCell(const SamplerParams& p, int64_t cell, int64_t row, int part) {
    first = cell * kCell + row * kLanes + part * kPartLanes;
    const int64_t left = p.num_realisations - first;
    is_live = lane_numbers() < static_cast<int32_t>(left < kPartLanes ? (left < 0 ? 0 : left) : kPartLanes);
    const uint64_t number = static_cast<uint64_t>(p.first_realisation + first);
    numbers.low = (PartBits)lane_numbers() + static_cast<uint32_t>(number);  // no carry: first is a multiple of a Part
    numbers.high = PartBits{} + static_cast<uint32_t>(number >> 32);
  }
};

TW_CPU void flush(uint32_t* counts, int64_t size, int64_t* histogram) {
  for (int64_t bin = 0; bin < size; ++bin) {
    if (counts[bin] != 0) __atomic_fetch_add(histogram + bin, static_cast<int64_t>(counts[bin]), __ATOMIC_RELAXED);
    counts[bin] = 0;
  }
}

template <class Walker, int kDensities, class Params, class Tables>
TW_CPU void sample_cell(const Params& p, const Tables& tables, const float* scales, int64_t cell, int64_t first_density,
                        uint32_t* counts) {
  Part kept[kDensities][kCellRows][kParts], for_all[kCellRows][kParts];
  LaneSums moments[kDensities][kNumMoments];
  for (auto& of_density : moments) {
    for (LaneSums& sums : of_density) sums.clear();
  }
  for (int part = 0; part < kParts; ++part) {
    for (int64_t row = 0; row < kCellRows; ++row) {
      const PartOfCell realisations(p, cell, row, part);
      Walker walker(p, tables, scales);
      walker.walk(realisations.numbers);
      for_all[row][part] = walker.kept_for_all();
      for (int d = 0; d < kDensities; ++d) {
        const Part sinr = walker.sinr(d);
        kept[d][row][part] = walker.kept(d);
        moments[d][kRate].add(part, realisations.is_live, Math<Part>::widen(walker.rate(d)));
        moments[d][kInverseSinr].add(part, realisations.is_live, inverse_sinr(sinr));
        moments[d][kResidualShare].add(part, realisations.is_live,
                                       Math<Part>::widen(walker.received.residual_share[d]));
        const PartInts bins = histogram_bin(sinr);
        for (int lane = 0; lane < kPartLanes; ++lane) {
          if (realisations.is_live[lane] == 0) continue;
          ++counts[d * kHistogramBins + bins[lane]];
          if (p.samples == nullptr) continue;
          float* sample = p.samples + 2 * ((first_density + d) * p.num_realisations + realisations.first + lane);
          sample[0] = shown(walker.received.signal[d][lane]);
          sample[1] = shown(walker.received.interference[d][lane]);
        }
      }
    }
  }
  for (int d = 0; d < kDensities; ++d) {
    double* sums = p.cell_sums + 2 * p.num_items * (cell * p.num_densities + first_density + d);
    for (int i = 0; i < kNumMoments; ++i) moments[d][i].store(sums + 2 * i);
    for (int64_t t = 0; t < p.num_thresholds; ++t) {
      LaneSums coverage;
      coverage.clear();
      for (int part = 0; part < kParts; ++part) {
        for (int64_t row = 0; row < kCellRows; ++row) {
          coverage.add(part, PartOfCell(p, cell, row, part).is_live,
                       Walker::coverage(tables, kept[d][row][part], for_all[row][part], scales[2 * d + 1],
                                        p.log2_thresholds[t]));
        }
      }
      coverage.store(sums + 2 * (kNumMoments + t));
    }
  }
}

// A group of densities over a range of cells; the histogram is added up here first.
template <class Walker, int kDensities, class Params, class Tables>
void sample_cells(const Params& p, const Tables& tables, int64_t first_density, int64_t begin, int64_t end) {
  float scales[2 * kDensities];
  std::memcpy(scales, p.scales + 2 * first_density, sizeof(scales));
  uint32_t counts[kDensities * kHistogramBins] = {};
  for (int64_t cell = begin; cell < end; ++cell) {
    sample_cell<Walker, kDensities>(p, tables, scales, cell, first_density, counts);
  }
  flush(counts, kDensities * kHistogramBins, p.histogram + first_density * kHistogramBins);
}

// The cells of each batch, in order.
TW_CPU void fold_cells(const SamplerParams& p, const ExecutionContext& context) {
  const int64_t items = 2 * p.num_items * p.num_densities, cells = num_cells(p.num_realisations);
  auto fold = [&](int64_t begin, int64_t end) {
    for (int64_t batch = begin; batch < end; ++batch) {
      const int64_t first = batch * kCellsPerBatch,
                    last = first + kCellsPerBatch < cells ? first + kCellsPerBatch : cells;
      for (int64_t item = 0; item < items; ++item) {
        double sum = 0.0;
        for (int64_t cell = first; cell < last; ++cell) sum += p.cell_sums[cell * items + item];
        p.sums[batch * items + item] = sum;
      }
    }
  };
  parallel_for(context, 0, num_batches(p.num_realisations), 1 + 4096 / (1 + items), fold);
}

// Groups of 8, 4, 2 and 1 densities: one walk serves a group. `run.operator()<kDensities>(first density)`.
template <class Run>
TW_CPU void for_each_group(int64_t num_densities, const Run& run) {
  int64_t d = 0;
  for (; d + 8 <= num_densities; d += 8) run.template operator()<8>(d);
  if (d + 4 <= num_densities) run.template operator()<4>(d), d += 4;
  if (d + 2 <= num_densities) run.template operator()<2>(d), d += 2;
  if (d < num_densities) run.template operator()<1>(d);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA
