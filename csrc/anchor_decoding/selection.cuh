// What a sequence's policy commits: one block of threads, one position each (or every kStepThreads-th). A candidate's
// rank is counted, not sorted: for blocks of 32 that is 32 comparisons a thread. Windows around anchors are tested on a
// bit per position. What is known of positions stands in shared memory, so that short and long blocks read alike.
#pragma once

#include "anchor_decoding/selection_rules.cuh"
#include "core/reduce.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int kStepThreads = 128;
constexpr int kBlockWords = static_cast<int>(kMaxBlockLength) / 32;

struct SelectionShared {
  arch::Array<float, kMaxBlockLength> key;     // by position, the larger the sooner; NaN: no candidate
  arch::Array<float, kMaxBlockLength> value;   // by position: what thresholds are compared with
  arch::Array<float, kMaxBlockLength> ranked;  // values by rank
  arch::Array<int32_t, kMaxBlockLength> rank;  // by position
  arch::Array<uint32_t, kBlockWords> anchors;  // a bit per position: confidence >= threshold
  arch::Array<uint32_t, kBlockWords> ready;    // klass: stable and sure
  arch::Array<int32_t, 32> warp_sums;
  int32_t limit;
};

// Sum over the block, in every thread. Counts are at most 1024, so two of them fit one word, 16 bits apart.
TW_DEVICE int32_t block_count(int32_t value, SelectionShared& shared) {
#pragma unroll
  for (uint32_t offset = arch::kWarpSize / 2; offset > 0; offset /= 2) value += arch::shuffle_xor(value, offset);
  if (arch::lane_index() == 0) shared.warp_sums[arch::warp_index()] = value;
  arch::sync_block();
  int32_t sum = 0;
  for (int warp = 0; warp < kStepThreads / arch::kWarpSize; ++warp) sum += shared.warp_sums[warp];
  arch::sync_block();
  return sum;
}

// How many candidates come sooner; equal keys go by position.
TW_DEVICE int32_t rank_of(int64_t position, int64_t block_length, SelectionShared& shared) {
  const float own = shared.key[position];
  int32_t sooner = 0;
  for (int64_t j = 0; j < position; ++j) sooner += shared.key[j] >= own;
  for (int64_t j = position + 1; j < block_length; ++j) sooner += shared.key[j] > own;
  return sooner;
}

TW_DEVICE bool bit_of(arch::Array<uint32_t, kBlockWords>& words, int64_t position) {
  return (words[position / 32] >> (position % 32) & 1u) != 0;
}

TW_DEVICE bool is_near_anchor(int64_t position, int64_t radius, int64_t block_length, SelectionShared& shared) {
  const int64_t low = position > radius ? position - radius : 0;
  const int64_t high = block_length - 1 - position > radius ? position + radius : block_length - 1;
  bool found = false;
  for (int64_t word = low / 32; word <= high / 32; ++word) {
    uint32_t window = 0xffffffffu;
    if (word == low / 32) window &= 0xffffffffu << (low % 32);
    if (word == high / 32) window &= 0xffffffffu >> (31 - high % 32);
    found = found || (shared.anchors[word] & window) != 0;
  }
  return found;
}

// All threads of a block of kStepThreads. Candidates and statistics of the sequence must be visible to it.
TW_DEVICE void commit_sequence(const DecodeStepParams& p, int64_t sequence, SelectionShared& shared) {
  const int64_t first_index = sequence * p.block_length;
  int64_t problems = problems_of(p, sequence);
  const bool is_within = (problems & kProblemBlock) == 0;
  int64_t* tokens = p.tokens + sequence * p.token_stride + (is_within ? p.block_start[sequence] : 0);
  const auto policy = static_cast<Policy>((problems & kProblemPolicy) != 0 ? 0 : p.policy[sequence]);
  const Statistic statistic = statistic_of(policy);
  const float threshold = p.threshold[sequence], relaxed_threshold = p.relaxed_threshold[sequence];

  // Keys, values and anchors; all threads stay in the loops, because warps vote in them.
  int32_t masked = 0, bad = 0, lost = 0, candidates = 0;
  for (int64_t begin = 0; begin < p.block_length; begin += kStepThreads) {
    const int64_t j = begin + arch::thread_index();
    float value = kNaN, key = kNaN;
    if (j < p.block_length && is_within) {
      const int64_t candidate = p.candidates[first_index + j];
      const float* statistics = p.statistics + (first_index + j) * kNumStatistics;
      const float confidence = statistics[kConfidence], wanted = statistics[statistic];
      if (tokens[j] == p.mask_id) {
        ++masked;
        lost += candidate == kNoSuchRow;
        if (candidate >= 0 && candidate != p.mask_id) {
          ++candidates;
          bad += confidence == 0.0f;
          value = wanted;
          key = arch::maximum(statistic == kEntropyNats ? -value : value, kNegativeInfinity);
        }
      }
    }
    const uint32_t anchors = arch::ballot(value >= threshold);
    if (j < p.block_length) {
      shared.key[j] = key;
      shared.value[j] = value;
      if (arch::lane_index() == 0) shared.anchors[j / 32] = anchors;
    }
  }
  const int32_t counted = block_count(masked | candidates << 16, shared);
  const int32_t counted_faults = block_count(bad | lost << 16, shared);
  masked = counted & 0xffff;
  candidates = counted >> 16;
  bad = counted_faults & 0xffff;
  lost = counted_faults >> 16;
  if (lost > 0) problems |= kProblemRows;
  const bool acts = problems == 0 && candidates > 0;

  int32_t num_ready = 0;
  for (int64_t begin = 0; begin < p.block_length; begin += kStepThreads) {
    const int64_t j = begin + arch::thread_index();
    bool is_ready = false;
    if (acts && j < p.block_length && shared.key[j] >= kNegativeInfinity) {
      const int32_t rank = rank_of(j, p.block_length, shared);
      shared.rank[j] = rank;
      shared.ranked[rank] = shared.value[j];
      if (policy == Policy::klass) {
        int64_t& steps = p.stable_steps[first_index + j];
        const float divergence = p.statistics[(first_index + j) * kNumStatistics + kDivergenceNats];
        steps = steps >= 0 && divergence < relaxed_threshold ? steps + 1 : 0;
        is_ready = shared.value[j] >= threshold && steps >= kKlassSteps;
      }
    }
    num_ready += is_ready;
    const uint32_t ready = arch::ballot(is_ready);
    if (j < p.block_length && arch::lane_index() == 0) shared.ready[j / 32] = ready;
  }
  num_ready = block_count(num_ready, shared);  // its barriers also make `ranked` whole
  if (arch::thread_index() == 0 && acts) {
    if (policy == Policy::factor) {
      shared.limit = static_cast<int32_t>(factor_prefix(shared.ranked, candidates, threshold));
    } else if (policy == Policy::eb) {
      shared.limit = static_cast<int32_t>(entropy_prefix(shared.ranked, candidates, threshold));
    } else {
      shared.limit = static_cast<int32_t>((candidates - 1) / p.steps_left[sequence] + 1);
    }
  }
  arch::sync_block();

  int32_t committed = 0;
  for (int64_t j = arch::thread_index(); j < p.block_length; j += kStepThreads) {
    bool chosen = false;
    if (acts && shared.key[j] >= kNegativeInfinity) {
      const float value = shared.value[j];
      const int32_t rank = shared.rank[j];
      switch (policy) {
        case Policy::threshold:
        case Policy::margin:
          chosen = rank == 0 || value >= threshold;
          break;
        case Policy::entropy_threshold:
          chosen = rank == 0 || value <= threshold;
          break;
        case Policy::local_leap: {
          const bool is_near = is_near_anchor(j, p.radius[sequence], p.block_length, shared);
          chosen = rank == 0 || value >= (is_near ? relaxed_threshold : threshold);
          break;
        }
        case Policy::klass:
          chosen = num_ready > 0 ? bit_of(shared.ready, j) : rank < shared.limit;
          break;
        default:  // topk, topk_margin, topk_entropy, factor, eb
          chosen = rank < shared.limit;
          break;
      }
      if (chosen) tokens[j] = p.candidates[first_index + j];
    }
    p.committed[first_index + j] = chosen;
    committed += chosen;
  }
  committed = block_count(committed, shared);
  if (arch::thread_index() == 0) {
    if (acts) {
      p.step[sequence] += 1;
      if (p.steps_left[sequence] > 1) p.steps_left[sequence] -= 1;
    }
    int64_t* counts = p.counts + 4 * sequence;
    counts[0] = committed;
    counts[1] = masked - committed;
    counts[2] = bad;
    counts[3] = problems;
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
