// The algebra of a softmax row in pieces. Sums are kept as sum * 2^exponent with an integer exponent, so that moving a
// sum to another exponent is exact, and logits enter as 2^(logit * kLog2E): one multiply-add and one exp2 an element.
// kLog2E is a rounded constant, so this is the softmax at a temperature of 1 + 1e-8, for which differences of logits up
// to 75 move a probability by less than 1e-6 of itself.
#pragma once

#include <cfloat>

#include "anchor_decoding/decode_step.h"
#include "core/numeric.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLargestLogit = 8388608;      // 2^23: a maximum from here on, or below its negative, counts as infinite
constexpr float kSmallestExponent = -126;     // of a term, relative to its sum: below it is nothing in fp32
constexpr float kLargestTemperature = 1e30f;  // from about 1e37 on noise overflows
constexpr int32_t kNoId = 0x7fffffff;
constexpr int64_t kKlassSteps = 2;   // in a row, for which a distribution must have been stable
constexpr float kGuardBand = 1e-5f;  // around a threshold: within it `exact` decides in float64

// What is known of a set of ids of one row: those that count, without the mask id and forbidden ones.
struct alignas(16) RowPart {
  float max;       // largest logit, -inf if there is none
  float exponent;  // integer; the sums below are in units of 2^exponent
  float sum;       // of 2^(l * kLog2E)
  float moment;    // of 2^t * t, t = l * kLog2E - exponent: for the entropy
  float second;    // second largest logit, with multiplicity: for the margin
  float noisy;     // largest l + temperature * noise, -inf if nothing was drawn
  float noisy_logit;
  int32_t noisy_id;
  float previous_exponent;
  float previous_sum;  // of the row of the step before
  float divergence;    // of 2^t * (l - previous l)
  float previous_max;
};
static_assert(sizeof(RowPart) == kRowPartBytes);

TW_DEVICE RowPart empty_part() {
  return {kNegativeInfinity,
          0.0f,
          0.0f,
          0.0f,
          kNegativeInfinity,
          kNegativeInfinity,
          kNegativeInfinity,
          kNoId,
          0.0f,
          0.0f,
          0.0f,
          kNegativeInfinity};
}

// The exponent for sums whose largest logit is max: terms are then at most 1, the largest more than 1/2. Beyond
// kLargestLogit products with kLog2E have no fraction left: there it is 0, and terms of sentinels like -1e10 vanish.
TW_DEVICE float exponent_for(float max) {
  return max > -kLargestLogit && max < kLargestLogit ? arch::ceiling(max * kLog2E) : 0.0f;
}

// 2^difference for moving a sum to a larger exponent. An empty sum may come from anywhere.
TW_DEVICE float rescaling(float sum, float from, float to) { return sum == 0.0f ? 0.0f : arch::exp2(from - to); }

// Moves the sums of a part to the exponents `exponent` and `previous_exponent`, not smaller than its own unless the sum
// is empty.
TW_DEVICE void rescale(RowPart& part, float exponent, float previous_exponent) {
  const float scale = rescaling(part.sum, part.exponent, exponent);
  if (part.sum != 0.0f) part.moment = (part.moment + (part.exponent - exponent) * part.sum) * scale;
  part.divergence *= scale;
  part.sum *= scale;
  part.exponent = exponent;
  part.previous_sum *= rescaling(part.previous_sum, part.previous_exponent, previous_exponent);
  part.previous_exponent = previous_exponent;
}

TW_DEVICE bool noise_wins(float noisy, int32_t id, float other_noisy, int32_t other_id) {
  return noisy > other_noisy || (noisy == other_noisy && id < other_id);
}

// a with b: everything but the ids, which follow from the maxima afterwards.
TW_DEVICE void fold(RowPart& a, RowPart b) {
  const float max = a.max > b.max ? a.max : b.max;
  const float previous_max = a.previous_max > b.previous_max ? a.previous_max : b.previous_max;
  const float exponent = exponent_for(max), previous_exponent = exponent_for(previous_max);
  rescale(a, exponent, previous_exponent);
  rescale(b, exponent, previous_exponent);
  const float loser = a.max > b.max ? b.max : a.max;
  const float second = a.second > b.second ? a.second : b.second;
  a.second = loser > second ? loser : second;
  a.max = max;
  a.previous_max = previous_max;
  a.sum += b.sum;
  a.moment += b.moment;
  a.divergence += b.divergence;
  a.previous_sum += b.previous_sum;
  if (noise_wins(b.noisy, b.noisy_id, a.noisy, a.noisy_id)) {
    a.noisy = b.noisy;
    a.noisy_id = b.noisy_id;
    a.noisy_logit = b.noisy_logit;
  }
}

// A part of the single logit l, for sums only: how the mask id, never a candidate, comes to count in them.
TW_DEVICE RowPart part_of_one(float l, float previous) {
  RowPart part = empty_part();
  if (l >= kNegativeInfinity) part.max = l;  // NaN counts as -inf
  part.exponent = exponent_for(part.max);
  if (part.max > kNegativeInfinity) {
    const float t = arch::fused_multiply_add(l, kLog2E, -part.exponent);
    part.sum = arch::exp2(t);
    part.moment = part.sum * arch::maximum(t, kSmallestExponent);
  }
  if (previous >= kNegativeInfinity) part.previous_max = previous;
  part.previous_exponent = exponent_for(part.previous_max);
  if (part.previous_max > kNegativeInfinity) {
    part.previous_sum = arch::exp2(arch::fused_multiply_add(previous, kLog2E, -part.previous_exponent));
  }
  if (part.sum > 0.0f) part.divergence = part.sum * (l - part.previous_max);
  return part;
}

// Probability of a logit of the row.
TW_DEVICE float probability(const RowPart& row, float l) {
  return arch::divide(arch::exp2(arch::fused_multiply_add(l, kLog2E, -row.exponent)), row.sum);
}

struct RowStatistics {
  float values[kNumStatistics];
};

// What a row without a candidate shows, and one without a finite maximum.
TW_DEVICE RowStatistics no_statistics() { return {{kNaN, kNaN, kNaN, kNaN}}; }
TW_DEVICE RowStatistics asked_for(RowStatistics s, int32_t features, bool has_previous) {
  if ((features & kEntropy) == 0) s.values[kEntropyNats] = kNaN;
  if ((features & kMargin) == 0) s.values[kMarginStatistic] = kNaN;
  if ((features & kDivergence) == 0) s.values[kDivergenceNats] = kNaN;
  if ((features & kDivergence) != 0 && !has_previous) s.values[kDivergenceNats] = kInfinity;
  return s;
}

// Without a finite maximum: `choices` holds the ids that may be chosen, `row` the mask id as well.
TW_DEVICE bool is_bad_row(const RowPart& row, const RowPart& choices) {
  return !(row.max < kLargestLogit) || !(choices.max > -kLargestLogit);
}

// `choices` holds the ids that may be chosen, `row` the mask id as well; `logit` is the candidate's.
TW_DEVICE RowStatistics statistics_of(const RowPart& row, const RowPart& choices, float logit, bool is_deferred,
                                      int32_t features, bool has_previous) {
  if (is_bad_row(row, choices)) return asked_for({{0.0f, kInfinity, 0.0f, kInfinity}}, features, has_previous);
  RowStatistics s;
  const float log2_sum = arch::log2(row.sum);
  float confidence = probability(row, logit);
  confidence = confidence > 1.0f ? 1.0f : confidence;
  s.values[kConfidence] = confidence > FLT_MIN ? confidence : FLT_MIN;
  const float entropy = kLn2 * (log2_sum - arch::divide(row.moment, row.sum));
  s.values[kEntropyNats] = entropy < 0.0f ? 0.0f : entropy;
  s.values[kMarginStatistic] = probability(row, choices.max) - probability(row, choices.second);
  // sum p (l - previous l) - ln Z + ln Z of the row before
  const float log_ratio = (arch::log2(row.previous_sum) - log2_sum) + (row.previous_exponent - row.exponent);
  const float divergence = arch::divide(row.divergence, row.sum) + kLn2 * log_ratio;
  const bool previous_is_bad = !(row.previous_max < kLargestLogit) || !(row.previous_max > -kLargestLogit);
  s.values[kDivergenceNats] = previous_is_bad ? kInfinity : divergence > 0.0f ? divergence : 0.0f;
  if (divergence != divergence) s.values[kDivergenceNats] = kInfinity;
  if (is_deferred) {
    s.values[kConfidence] = FLT_MIN;
    s.values[kEntropyNats] = kInfinity;
    s.values[kMarginStatistic] = 0.0f;
  }
  return asked_for(s, features, has_previous);
}

TW_DEVICE bool in_list(const int64_t* list, int64_t count, int64_t id) {
  for (int64_t i = 0; i < count; ++i) {
    if (list[i] == id) return true;
  }
  return false;
}

// Is the confidence too close to a number that the request's policy compares it with to trust fp32? A scan knows no
// policy and tests both numbers.
TW_DEVICE bool in_guard_band(const DecodeStepParams& p, int64_t sequence, float confidence) {
  bool tests_threshold = true, tests_relaxed = true;
  if (p.policy != nullptr) {
    const auto policy = static_cast<Policy>(p.policy[sequence]);
    tests_relaxed = policy == Policy::local_leap;
    tests_threshold = tests_relaxed || policy == Policy::threshold || policy == Policy::klass;
  }
  const float above = confidence - p.threshold[sequence], above_relaxed = confidence - p.relaxed_threshold[sequence];
  return (tests_threshold && above < kGuardBand && above > -kGuardBand) ||
         (tests_relaxed && above_relaxed < kGuardBand && above_relaxed > -kGuardBand);
}

// The largest float that is not above a float64 confidence in (0, 1]: it is >= a float threshold if and only if the
// float64 is.
TW_DEVICE float round_toward_zero(double confidence) {
  const float rounded = arch::round_down(confidence);
  return rounded > FLT_MIN ? rounded : FLT_MIN;
}

// Bits of Problem for what can be known without looking at rows. The scan reads no policy, radius or steps.
TW_DEVICE int64_t problems_of(const DecodeStepParams& p, int64_t sequence) {
  // Everything is read before anything is decided: on a GPU the reads then wait together.
  const bool has_policy = p.policy != nullptr;
  const int64_t start = p.block_start[sequence];
  const float threshold = p.threshold[sequence], relaxed = p.relaxed_threshold[sequence];
  const float temperature = p.temperature[sequence];
  const int64_t number = has_policy ? p.policy[sequence] : 0;
  const int64_t radius = has_policy ? p.radius[sequence] : 0;
  const int64_t steps_left = has_policy ? p.steps_left[sequence] : 1;

  const bool is_temperature = temperature >= 0.0f && temperature <= kLargestTemperature;
  int32_t needed = is_temperature && temperature > 0.0f ? kSampling : 0;
  switch (static_cast<Policy>(number)) {
    case Policy::eb:
    case Policy::entropy_threshold:
    case Policy::topk_entropy:
      needed |= kEntropy;
      break;
    case Policy::margin:
    case Policy::topk_margin:
      needed |= kMargin;
      break;
    case Policy::klass:
      needed |= kDivergence;
      break;
    default:
      break;
  }
  int64_t found = 0;
  if (start < 0 || start > p.length - p.block_length) found |= kProblemBlock;
  if (number < 0 || number >= kNumPolicies) found |= kProblemPolicy;
  if ((p.features & needed) != needed) found |= kProblemFeature;
  if (threshold != threshold || relaxed != relaxed) found |= kProblemThreshold;
  if (radius < 0) found |= kProblemRadius;
  if (!is_temperature) found |= kProblemTemperature;
  if (steps_left < 1) found |= kProblemSteps;
  return found;
}

// For a block that lies within its sequence.
TW_DEVICE bool is_masked(const DecodeStepParams& p, int64_t sequence, int64_t position) {
  return p.tokens[sequence * p.token_stride + p.block_start[sequence] + position] == p.mask_id;
}

// The row of logits of a position, negative if it has none.
TW_DEVICE int64_t row_of(const DecodeStepParams& p, int64_t sequence, int64_t position) {
  const int64_t index = sequence * p.block_length + position;
  return p.rows == nullptr ? index : p.rows[index];
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
