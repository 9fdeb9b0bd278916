// decode_step_ on a CPU: the segments of all masked rows are shared out over the thread pool, then the rows are folded,
// then each sequence is decided, in order. The glue has checked the numbers of all requests.
// Limit: memory for bf16 logits beyond the caches, with about as much arithmetic beside it.
#include "anchor_decoding/segment_cpu.h"
#include "anchor_decoding/selection_cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// One row of logits, and what of it may be chosen.
template <class T>
struct Row {
  const DecodeStepParams& p;
  int64_t sequence, position;
  const T* logits;
  const T* previous;  // null where divergence is not wanted or there is no step before

  TW_MEMBER Row(const DecodeStepParams& params, int64_t index)
      : p(params), sequence(index / params.block_length), position(index % params.block_length) {
    const int64_t row = row_of(p, sequence, position);
    logits = static_cast<const T*>(p.logits) + p.logits_rows.offset(row);
    const bool has_previous = (p.features & kDivergence) != 0 && p.stable_steps[index] >= 0;
    previous = has_previous ? static_cast<const T*>(p.previous_logits) + p.previous_rows.offset(row) : nullptr;
  }
  TW_MEMBER bool is_forbidden(int64_t id) const { return in_list(p.forbidden, p.num_forbidden, id); }
  TW_MEMBER bool is_allowed(int64_t id) const { return id != p.mask_id && !is_forbidden(id); }
  TW_MEMBER bool all_allowed(int64_t begin, int64_t end) const {
    bool all = p.mask_id < begin || p.mask_id >= end;
    for (int64_t i = 0; i < p.num_forbidden; ++i) all = all && (p.forbidden[i] < begin || p.forbidden[i] >= end);
    return all;
  }
};

// The allowed logits of a segment in fp32, memory order, padded to whole lanes; all else is -inf.
template <class T>
TW_CPU void copy_allowed(const Row<T>& row, const T* source, int64_t begin, int64_t count, float* destination) {
  for (int64_t i = 0; i < count; ++i) destination[i] = to_float(source[begin + i]);
  for (int64_t i = count; i % kLanes != 0; ++i) destination[i] = kNegativeInfinity;
  const auto drop = [&](int64_t id) {
    if (id >= begin && id < begin + count) destination[id - begin] = kNegativeInfinity;
  };
  drop(row.p.mask_id);
  for (int64_t i = 0; i < row.p.num_forbidden; ++i) drop(row.p.forbidden[i]);
}

template <class T>
TW_CPU RowPart scan(bool moments, const T* logits, const T* previous, int64_t count, const T* ahead) {
  if (previous != nullptr) return scan_segment<T, true, true>(logits, previous, count, ahead);
  if (moments) return scan_segment<T, true, false>(logits, previous, count, ahead);
  return scan_segment<T, false, false>(logits, previous, count, ahead);
}

template <class T>
RowPart segment_part(const Row<T>& row, int64_t segment) {
  const DecodeStepParams& p = row.p;
  const int64_t begin = segment * kCpuSegment;
  const int64_t count = p.vocab - begin < kCpuSegment ? p.vocab - begin : kCpuSegment;
  const bool moments = (p.features & (kEntropy | kMargin)) != 0;
  const float temperature = p.temperature[row.sequence];
  const bool is_clean = count % kLanes == 0 && row.all_allowed(begin, begin + count);
  if (is_clean && temperature == 0.0f) {
    return scan(moments, row.logits + begin, row.previous == nullptr ? nullptr : row.previous + begin, count,
                row.logits + begin + count);
  }
  float logits[kCpuSegment], previous[kCpuSegment];
  copy_allowed(row, row.logits, begin, count, logits);
  if (row.previous != nullptr) copy_allowed(row, row.previous, begin, count, previous);
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  RowPart part = scan<float>(moments, logits, row.previous == nullptr ? nullptr : previous, padded, logits);
  if (temperature > 0.0f) {
    add_best_noisy(part, logits, begin, count, temperature, p.seed[row.sequence], row.position, p.step[row.sequence]);
  }
  return part;
}

// The lowest allowed id whose logit is `max` (NaN counts as -inf), from a segment on.
template <class T>
int64_t find_id(const Row<T>& row, int64_t segment, float max) {
  for (int64_t id = segment * kCpuSegment; id < row.p.vocab; ++id) {
    const float l = to_float(row.logits[id]);
    if ((l == max || (l != l && max == kNegativeInfinity)) && row.is_allowed(id)) return id;
  }
  return kNoCandidate;
}

template <class T>
float exact_confidence(const Row<T>& row, int64_t candidate) {
  const double logit = to_float(row.logits[candidate]);
  double sum = 0.0;  // relative to the candidate's own term
  for (int64_t id = 0; id < row.p.vocab; ++id) {
    const double l = to_float(row.logits[id]);
    if (l == l && !row.is_forbidden(id)) sum += arch::exponential(l - logit);
  }
  return round_toward_zero(1.0 / sum);
}

template <class T>
void finish_row(const DecodeStepParams& p, int64_t index) {
  const Row<T> row(p, index);
  const int64_t segments = num_cpu_segments(p.vocab);
  const RowPart* parts = p.parts + index * segments;
  RowPart choices = parts[0];
  int64_t winner = 0;
  for (int64_t segment = 1; segment < segments; ++segment) {
    if (parts[segment].max > choices.max) winner = segment;
    fold(choices, parts[segment]);
  }
  RowPart all = choices;
  if (p.mask_id < p.vocab && !row.is_forbidden(p.mask_id)) {
    const float before = row.previous == nullptr ? kNegativeInfinity : to_float(row.previous[p.mask_id]);
    fold(all, part_of_one(to_float(row.logits[p.mask_id]), before));
  }
  const bool is_bad = is_bad_row(all, choices);
  int64_t candidate = choices.noisy_id;
  float logit = choices.noisy_logit;
  if (is_bad || choices.noisy == kNegativeInfinity) {
    candidate = find_id(row, choices.max == kNegativeInfinity ? 0 : winner, choices.max);
    logit = choices.max;
  }
  p.candidates[index] = candidate;
  RowStatistics result = no_statistics();
  if (candidate >= 0) {
    const bool is_deferred = in_list(p.deferred, p.num_deferred, candidate);
    result = statistics_of(all, choices, logit, is_deferred, p.features, row.previous != nullptr);
    if (p.exact && !is_bad && !is_deferred && in_guard_band(p, row.sequence, result.values[kConfidence])) {
      result.values[kConfidence] = exact_confidence(row, candidate);
    }
  }
  std::memcpy(p.statistics + index * kNumStatistics, &result, sizeof(result));
}

// Writes the list of rows to scan; all other positions get no candidate. Returns how many.
int64_t list_rows(const DecodeStepParams& p) {
  int64_t count = 0;
  const RowStatistics none = no_statistics();
  for (int64_t index = 0; index < p.batch * p.block_length; ++index) {
    const int64_t sequence = index / p.block_length, position = index % p.block_length;
    if (is_masked(p, sequence, position) && row_of(p, sequence, position) >= 0) {
      p.row_list[count++] = index;
    } else {
      p.candidates[index] = kNoCandidate;
      std::memcpy(p.statistics + index * kNumStatistics, &none, sizeof(none));
    }
  }
  return count;
}

template <class T>
void scan_rows(const DecodeStepParams& p, const ExecutionContext& context) {
  const int64_t count = list_rows(p), segments = num_cpu_segments(p.vocab);
  auto scan_segments = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = p.row_list[task / segments], segment = task % segments;
      p.parts[index * segments + segment] = segment_part(Row<T>(p, index), segment);
    }
  };
  parallel_for(context, 0, count * segments, 8, scan_segments);  // 8 are about 10 us
  auto finish_rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) finish_row<T>(p, p.row_list[i]);
  };
  parallel_for(context, 0, count, 16, finish_rows);
}

void commit_sequence(const DecodeStepParams& p, int64_t sequence) {
  Block block;
  const auto policy = static_cast<Policy>(p.policy[sequence]);
  const Statistic statistic = statistic_of(policy);
  int64_t* tokens = p.tokens + sequence * p.token_stride + p.block_start[sequence];
  const int64_t first_index = sequence * p.block_length;
  int64_t num_masked = 0, num_bad = 0;
  for (int64_t j = 0; j < p.block_length; ++j) {
    p.committed[first_index + j] = false;
    if (tokens[j] != p.mask_id) continue;
    ++num_masked;
    const int64_t candidate = p.candidates[first_index + j];
    if (candidate < 0 || candidate == p.mask_id) continue;
    const float* statistics = p.statistics + (first_index + j) * kNumStatistics;
    num_bad += statistics[kConfidence] == 0.0f;
    const float value = statistics[statistic];
    const float key = statistic == kEntropyNats ? -value : value;
    block.position[block.count] = j;
    block.value[block.count] = value;
    block.key[block.count] = key == key ? key : kNegativeInfinity;
    ++block.count;
    if (policy == Policy::klass) {
      int64_t& steps = p.stable_steps[first_index + j];
      const bool is_stable = steps >= 0 && statistics[kDivergenceNats] < p.relaxed_threshold[sequence];
      steps = is_stable ? steps + 1 : 0;
    }
  }
  choose(block, policy, p.threshold[sequence], p.relaxed_threshold[sequence], p.radius[sequence],
         p.steps_left[sequence],
         [&](int64_t i) { return p.stable_steps[first_index + block.position[i]] >= kKlassSteps; });
  int64_t num_committed = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    if (!block.chosen[i]) continue;
    const int64_t j = block.position[i];
    tokens[j] = p.candidates[first_index + j];
    p.committed[first_index + j] = true;
    ++num_committed;
  }
  if (block.count > 0) {
    p.step[sequence] += 1;
    if (p.steps_left[sequence] > 1) p.steps_left[sequence] -= 1;
  }
  const int64_t counts[4] = {num_committed, num_masked - num_committed, num_bad, 0};
  std::memcpy(p.counts + 4 * sequence, counts, sizeof(counts));
}

}  // namespace

Status decode_step_kernel(const DecodeStepParams& p, const ExecutionContext& context) {
  if (p.scan) with_dtype(p.dtype, [&]<class T>() { scan_rows<T>(p, context); });
  if (p.commit) {
    for (int64_t sequence = 0; sequence < p.batch; ++sequence) commit_sequence(p, sequence);
  }
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(decode_step, DecodeStepParams)
