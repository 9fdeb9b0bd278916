// What a sequence's policy commits, on a CPU: plain loops over the block, the same meaning as selection.cuh.
#pragma once

#include "anchor_decoding/selection_rules.cuh"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

// The candidates of a block, in order of position.
struct Block {
  int64_t count = 0;
  int64_t position[kMaxBlockLength];
  float key[kMaxBlockLength];    // the larger, the sooner
  float value[kMaxBlockLength];  // what thresholds are compared with
  bool chosen[kMaxBlockLength];
  float ranked[kMaxBlockLength];  // values by rank
  int64_t rank[kMaxBlockLength];
};

// Rank of each candidate: how many come sooner. Equal keys go by position.
TW_CPU void rank_candidates(Block& block) {
  for (int64_t i = 0; i < block.count; ++i) {
    int64_t sooner = 0;
    for (int64_t j = 0; j < i; ++j) sooner += block.key[j] >= block.key[i];
    for (int64_t j = i + 1; j < block.count; ++j) sooner += block.key[j] > block.key[i];
    block.rank[i] = sooner;
    block.ranked[sooner] = block.value[i];
  }
}

TW_CPU int64_t first_candidate(const Block& block) {
  int64_t first = 0;
  for (int64_t i = 1; i < block.count; ++i) first = block.key[i] > block.key[first] ? i : first;
  return first;
}

TW_CPU void choose_ranks_below(Block& block, int64_t limit) {
  for (int64_t i = 0; i < block.count; ++i) block.chosen[i] = block.rank[i] < limit;
}

// `stable(i)`: whether candidate i has been stable for long enough (klass).
template <class Stable>
TW_CPU void choose(Block& block, Policy policy, float threshold, float relaxed_threshold, int64_t radius,
                   int64_t steps_left, const Stable& stable) {
  const int64_t count = block.count;
  if (count == 0) return;
  const int64_t scheduled = (count - 1) / steps_left + 1;
  switch (policy) {
    case Policy::threshold:
    case Policy::margin:
      for (int64_t i = 0; i < count; ++i) block.chosen[i] = block.value[i] >= threshold;
      block.chosen[first_candidate(block)] = true;
      return;
    case Policy::entropy_threshold:
      for (int64_t i = 0; i < count; ++i) block.chosen[i] = block.value[i] <= threshold;
      block.chosen[first_candidate(block)] = true;
      return;
    case Policy::local_leap: {
      int64_t last_anchor = -kMaxBlockLength - 1;  // the nearest one at or before i, then at or after it
      radius = radius < kMaxBlockLength ? radius : kMaxBlockLength;
      for (int64_t i = 0; i < count; ++i) {
        if (block.value[i] >= threshold) last_anchor = block.position[i];
        block.chosen[i] = block.position[i] - last_anchor <= radius;
      }
      int64_t next_anchor = 2 * kMaxBlockLength + 1;
      for (int64_t i = count - 1; i >= 0; --i) {
        if (block.value[i] >= threshold) next_anchor = block.position[i];
        const bool is_near = block.chosen[i] || next_anchor - block.position[i] <= radius;
        block.chosen[i] = block.value[i] >= (is_near ? relaxed_threshold : threshold);
      }
      block.chosen[first_candidate(block)] = true;
      return;
    }
    case Policy::factor:
      rank_candidates(block);
      choose_ranks_below(block, factor_prefix(block.ranked, count, threshold));
      return;
    case Policy::eb:
      rank_candidates(block);
      choose_ranks_below(block, entropy_prefix(block.ranked, count, threshold));
      return;
    case Policy::klass: {
      bool any = false;
      for (int64_t i = 0; i < count; ++i) {
        block.chosen[i] = block.value[i] >= threshold && stable(i);
        any = any || block.chosen[i];
      }
      if (any) return;
      break;
    }
    default:  // topk, topk_margin, topk_entropy
      break;
  }
  rank_candidates(block);
  choose_ranks_below(block, scheduled);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA
