// The parts of the policies that are the same code on a CPU and on a GPU: which statistic a policy goes by, and how
// many ranks those take that walk down the ranking. `ranked[n]` is the statistic of rank n, from 0.
#pragma once

#include "anchor_decoding/row_part.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

TW_DEVICE Statistic statistic_of(Policy policy) {
  switch (policy) {
    case Policy::eb:
    case Policy::entropy_threshold:
    case Policy::topk_entropy:
      return kEntropyNats;
    case Policy::margin:
    case Policy::topk_margin:
      return kMarginStatistic;
    default:
      return kConfidence;
  }
}

// How many ranks the published loop of `factor` takes: a last candidate that alone fails comes along.
template <class Ranked>
TW_DEVICE int64_t factor_prefix(Ranked& ranked, int64_t count, float factor) {
  int64_t passed = 1;
  while (passed < count && ranked[passed] >= 1.0f - arch::divide(factor, static_cast<float>(passed + 2))) ++passed;
  return passed == count - 1 ? count : passed;
}

// Ranks whose predecessors' entropies sum to at most gamma, added in order.
template <class Ranked>
TW_DEVICE int64_t entropy_prefix(Ranked& ranked, int64_t count, float gamma) {
  int64_t passed = 1;
  float before = ranked[0];
  while (passed < count && before <= gamma) before += ranked[passed++];
  return passed;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
