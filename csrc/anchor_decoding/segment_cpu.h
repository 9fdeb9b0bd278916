// One segment of a row on a CPU: two passes over at most kSegment logits, which the first brings into L1 (8 KiB of
// bf16). The first finds the maximum, two vector operations for 16 logits on AVX-512; the second adds up exponentials
// relative to it in fourteen. The order of additions is by lane, so it depends on nothing but the ids.
#pragma once

#include "anchor_decoding/row_part.cuh"
#include "core/cpu.h"
#include "core/philox.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

constexpr int64_t kCpuSegment = 2 * kSegment;  // what a segment costs beside its ids is more than on a GPU
constexpr int64_t num_cpu_segments(int64_t vocab) { return (vocab + kCpuSegment - 1) / kCpuSegment; }

TW_CPU Part minimum(const Part& a, const Part& b) { return a < b ? a : b; }

// 2^t for -125 <= t <= 1/2, in two: t = n + r with |r| <= 1/2. Relative error 1e-7.
TW_CPU Part exp2_part(const Part& t) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const Part shifted = t + kMagic;
  const Part r = t - (shifted - kMagic);
  Part p = multiply_add(Part{} + 0.00132764526643f, r, Part{} + 0.00967554189265f);
  p = multiply_add(p, r, Part{} + 0.0555071346462f);
  p = multiply_add(p, r, Part{} + 0.240221202374f);
  p = multiply_add(p, r, Part{} + 0.693146944046f);
  p = multiply_add(p, r, Part{} + 1.00000011921f);
  return (Part)((PartBits)p + ((PartBits)shifted << 23));
}

// l * kLog2E - exponent for one row. Without a fused multiply-add the product would lose what its size rounds away, so
// there the maximum is taken off first.
struct Scaling {
  float max, exponent;
  Part low;  // below it a term is nothing; NaN becomes low too, which keeps every exponent within range

  TW_MEMBER explicit Scaling(float row_max)
      : max(row_max), exponent(exponent_for(row_max)), low(Part{} + (exponent - 125.0f) / kLog2E) {}
  TW_MEMBER Part operator()(const Part& l) const {
    const Part clamped = maximum(l, low);
    if constexpr (kRoundsMultiplyAddOnce) return multiply_add(clamped, Part{} + kLog2E, Part{} - exponent);
    return (clamped - max) * kLog2E + arch::fused_multiply_add(max, kLog2E, -exponent);
  }
};

TW_CPU float max_lanes(const Lanes& lanes) {
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  float max = v[0];
  for (int i = 1; i < kLanes; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

// The second largest of what the lanes saw, given each lane's two largest.
TW_CPU float second_lanes(const Lanes& largest, const Lanes& second) {
  float a[kLanes], b[kLanes];
  std::memcpy(a, &largest, sizeof(a));
  std::memcpy(b, &second, sizeof(b));
  float max = kNegativeInfinity, result = kNegativeInfinity;
  for (int i = 0; i < kLanes; ++i) {
    const float loser = a[i] > max ? max : a[i];
    result = loser > result ? loser : result;
    result = b[i] > result ? b[i] : result;
    max = a[i] > max ? a[i] : max;
  }
  return result;
}

// `count`: ids, a multiple of kLanes. kMoments: entropy and margin; kHasPrevious: divergence. `ahead`: what will be
// scanned next, asked for while the second pass works in L1; never read.
template <class T, bool kMoments, bool kHasPrevious>
TW_CPU RowPart scan_segment(const T* logits, const T* previous, int64_t count, const T* ahead) {
  RowPart part = empty_part();
  const Lanes none = broadcast(kNegativeInfinity);
  Lanes max = none, second = none, previous_max = none;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes l = load(logits + i);
    if constexpr (kMoments) {
      for (int k = 0; k < kParts; ++k) {
        const Part clean = maximum(l.part[k], none.part[k]);
        second.part[k] = maximum(minimum(clean, max.part[k]), second.part[k]);
      }
    }
    for (int k = 0; k < kParts; ++k) max.part[k] = maximum(l.part[k], max.part[k]);
    if constexpr (kHasPrevious) {
      const Lanes before = load(previous + i);
      for (int k = 0; k < kParts; ++k) previous_max.part[k] = maximum(before.part[k], previous_max.part[k]);
    }
  }
  part.max = max_lanes(max);
  part.exponent = exponent_for(part.max);
  if constexpr (kMoments) part.second = second_lanes(max, second);
  if constexpr (kHasPrevious) {
    part.previous_max = max_lanes(previous_max);
    part.previous_exponent = exponent_for(part.previous_max);
  }
  // Nobody looks at the sums of such a row, but those of the row before may be fine.
  const bool is_bad = !(part.max > -kLargestLogit && part.max < kLargestLogit);
  if (is_bad && !kHasPrevious) return part;

  const Scaling scaled(is_bad ? 0.0f : part.max), previous_scaled(part.previous_max);
  Lanes sum = broadcast(0.0f), moment = sum, divergence = sum, previous_sum = sum;
  for (int64_t i = 0; i < count; i += kLanes) {
    __builtin_prefetch(ahead + i);
    const Lanes l = load(logits + i);
    Lanes before;
    if constexpr (kHasPrevious) before = load(previous + i);
    for (int k = 0; k < kParts; ++k) {
      const Part t = scaled(l.part[k]);
      const Part term = exp2_part(t);
      sum.part[k] += term;
      if constexpr (kMoments) moment.part[k] = multiply_add(term, t, moment.part[k]);
      if constexpr (kHasPrevious) {
        const Part there = maximum(before.part[k], none.part[k]);
        const Part product = term * (l.part[k] - there);
        divergence.part[k] += l.part[k] > none.part[k] ? product : Part{};
        previous_sum.part[k] += exp2_part(previous_scaled(there));
      }
    }
  }
  part.sum = is_bad ? 0.0f : sum_lanes(sum);
  if constexpr (kMoments) part.moment = is_bad ? 0.0f : sum_lanes(moment);
  if constexpr (kHasPrevious) {
    part.divergence = is_bad ? 0.0f : sum_lanes(divergence);
    const bool has_previous = part.previous_max > -kLargestLogit && part.previous_max < kLargestLogit;
    part.previous_sum = has_previous ? sum_lanes(previous_sum) : 0.0f;
  }
  return part;
}

// ------------------------------------------------------------------------------------------------------------ noise

// ln(x) for normal x > 0. Absolute error about 1e-7 of the result or of 1, whichever is larger.
TW_CPU float log_scalar(float x) {
  // x = 2^e * m with m in [2/3, 4/3); ln m by its series in s = (m - 1) / (m + 1).
  const int32_t bits = static_cast<int32_t>(bits_of(x)) - 0x3f2aaaab;
  const int32_t e = bits >> 23;
  const float m = float_of(static_cast<uint32_t>((bits & 0x007fffff) + 0x3f2aaaab));
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series = s2 * (0.6666666667f + s2 * (0.4f + s2 * (0.2857142857f + s2 * 0.2222222222f)));
  return static_cast<float>(e) * kLn2 + (2.0f * s + s * series);
}

// Standard Gumbel noise from 32 random bits: see reference/anchor_decoding.py.
TW_CPU float gumbel(uint32_t bits) {
  float u = static_cast<float>(bits) * 0x1.0p-32f;
  u = u > 0x1.0p-33f ? u : 0x1.0p-33f;
  u = u < 1.0f - 0x1.0p-24f ? u : 1.0f - 0x1.0p-24f;
  // -log1p(-u): by its series where 1 - u has lost too much of u
  const float series = u * (1.0f + u * (0.5f + u * (0.3333333333f + u * (0.25f + u * 0.2f))));
  const float exponential = u < 0.015625f ? series : -log_scalar(1.0f - u);
  return -log_scalar(exponential);
}

// logits [count] of the ids from `first` (a multiple of 4) on, in memory order; what is not allowed is -inf.
TW_CPU void add_best_noisy(RowPart& part, const float* logits, int64_t first, int64_t count, float temperature,
                           int64_t seed, int64_t position, int64_t step) {
  constexpr int64_t kChunk = 64;
  const auto low = [](int64_t value) { return static_cast<uint32_t>(value); };
  const auto high = [](int64_t value) { return static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32); };
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    float noisy[kChunk];
    uint32_t words[4][kChunk / 4];
    for (int64_t i = 0; i < kChunk / 4; ++i) {
      const auto counter = static_cast<uint32_t>((first + begin) / 4 + i);
      const PhiloxBlock block = philox4x32_10({{counter, low(position), low(step), high(step)}}, low(seed), high(seed));
      for (int word = 0; word < 4; ++word) words[word][i] = block.words[word];
    }
    const int64_t length = count - begin < kChunk ? count - begin : kChunk;
    for (int64_t i = 0; i < kChunk; ++i) noisy[i] = gumbel(words[i % 4][i / 4]);
    for (int64_t i = 0; i < length; ++i) {
      const float l = logits[begin + i];
      const float score = l > kNegativeInfinity ? l + temperature * noisy[i] : kNegativeInfinity;
      if (score > part.noisy) {
        part.noisy = score;
        part.noisy_logit = l;
        part.noisy_id = static_cast<int32_t>(first + begin + i);
      }
    }
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA
