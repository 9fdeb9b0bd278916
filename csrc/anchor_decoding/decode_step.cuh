// One launch for a whole batch. Mapping: a block of 4 warps takes some segments of one row, a warp a segment at a time;
// blocks of rows that are not masked leave at once. Small blocks, four on an SM, because while the last warp of a row
// finishes it the others of its block have nothing to do. The last block of a row folds its parts and looks the
// candidate up, the last block of a sequence decides what is committed: tickets, which count arrivals, say who is last.
// Bytes: masked rows * vocab * size. Limit: device memory from about 128 rows on; below, latency: three dependent reads
// before the first logit arrives, two tickets after the last. Nothing measured yet.
// Visibility: what a block writes comes before its arrival (release), what the last one reads after it (acquire).
#pragma once

#include "anchor_decoding/row_scan.cuh"
#include "anchor_decoding/selection.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct DecodeStepShared {
  SelectionShared selection;
  arch::Array<double, kStepThreads> exact_sums;
  int32_t is_last;
  int32_t close_candidate;  // exact: the id whose confidence has to be computed anew, else -1
};

constexpr int kStepWarps = kStepThreads / arch::kWarpSize;
constexpr int kStepBlocksPerSm = 4;

// Whether this block is the last of `count` to arrive; then it sees all that the others wrote before they arrived.
TW_DEVICE bool arrives_last(uint32_t* ticket, int64_t count, DecodeStepShared& shared) {
  arch::sync_block();
  if (arch::thread_index() == 0) {
    const uint32_t before = arch::add_acq_rel<arch::Scope::gpu>(ticket, 1u);
    const bool is_last = int64_t{before} + 1 == count;
    if (is_last) arch::store_relaxed<arch::Scope::gpu>(ticket, 0u);  // for the next call
    shared.is_last = is_last;
  }
  arch::sync_block();
  return shared.is_last != 0;
}

TW_DEVICE void store_statistics(const DecodeStepParams& p, int64_t index, int64_t candidate, const RowStatistics& s) {
  Vec16 pack;
  __builtin_memcpy(&pack, &s, sizeof(pack));
  arch::store_streaming(reinterpret_cast<Vec16*>(p.statistics) + index, pack);
  arch::store_relaxed<arch::Scope::gpu>(reinterpret_cast<uint64_t*>(p.candidates) + index,
                                        static_cast<uint64_t>(candidate));
}

// One warp folds a row's parts, finds its candidate and writes both. Returns the candidate if `exact` has to look
// again.
template <class T, int kFeatures>
TW_DEVICE int64_t finish_row(const DecodeStepParams& p, const Row<T>& row, int64_t index, int64_t sequence) {
  const int64_t segments = num_segments(p.vocab);
  RowPart part = empty_part();
  int32_t winner = kNoId;
  for (int64_t segment = arch::lane_index(); segment < segments; segment += arch::kWarpSize) {
    const RowPart other = load_part(p.parts + index * segments + segment);
    if (other.max > part.max) winner = static_cast<int32_t>(segment);
    fold(part, other);
  }
  const float own_max = part.max;
  const RowPart choices = fold_warp<kFeatures>(part);
  winner = warp_min(own_max == choices.max ? winner : kNoId);

  RowPart all = choices;
  if (p.mask_id < p.vocab && !in_list(p.forbidden, p.num_forbidden, p.mask_id)) {
    const float before = row.previous == nullptr ? kNegativeInfinity : to_float(row.previous[p.mask_id]);
    fold(all, part_of_one(to_float(row.logits[p.mask_id]), before));
  }
  const bool is_bad = is_bad_row(all, choices);
  int64_t candidate = choices.noisy_id;
  float logit = choices.noisy_logit;
  if (is_bad || choices.noisy == kNegativeInfinity) {
    candidate = find_id(p, row, winner == kNoId ? 0 : winner, choices.max);  // kNoId: all that may be chosen is -inf
    logit = choices.max;
  }
  RowStatistics result = no_statistics();
  bool is_close = false;
  if (candidate >= 0) {
    const bool is_deferred = in_list(p.deferred, p.num_deferred, candidate);
    result = statistics_of(all, choices, logit, is_deferred, p.features, row.previous != nullptr);
    is_close = p.exact && !is_bad && !is_deferred && in_guard_band(p, sequence, result.values[kConfidence]);
  }
  if (arch::lane_index() == 0) store_statistics(p, index, candidate, result);
  return is_close ? candidate : kNoCandidate;
}

// The whole block: the confidence of a candidate in float64, rounded toward zero. Sums are added thread by thread.
template <class T>
TW_DEVICE void write_exact_confidence(const DecodeStepParams& p, const Row<T>& row, int64_t index, int64_t candidate,
                                      DecodeStepShared& shared) {
  const double logit = to_float(row.logits[candidate]);
  double sum = 0.0;  // relative to the candidate's own term
  for (int64_t id = arch::thread_index(); id < p.vocab; id += kStepThreads) {
    const double l = to_float(row.logits[id]);
    if (l == l && !in_list(p.forbidden, p.num_forbidden, id)) sum += arch::exponential(l - logit);
  }
  shared.exact_sums[arch::thread_index()] = sum;
  arch::sync_block();
  if (arch::thread_index() == 0) {
    double total = 0.0;
#pragma unroll 1
    for (int i = 0; i < kStepThreads; ++i) total += shared.exact_sums[i];
    p.statistics[index * kNumStatistics + kConfidence] = round_toward_zero(1.0 / total);
  }
}

// A block's share of a row: segments_per_block segments from share * segments_per_block on. True if the row is done, in
// all threads of the one block that finds it so.
template <class T, int kFeatures>
TW_DEVICE bool scan_share(const DecodeStepParams& p, int64_t index, int64_t share, int64_t segments_per_block,
                          int64_t blocks_per_row, DecodeStepShared& shared) {
  const int64_t sequence = index / p.block_length, position = index % p.block_length;
  const int64_t number = row_of(p, sequence, position);
  int64_t instead = kNoCandidate;
  // The token is asked for before anything is known of the request but where its block is: one wait and not two.
  const int64_t start = p.block_start[sequence];
  const bool is_within = start >= 0 && start <= p.length - p.block_length;
  const bool is_open = is_within && is_masked(p, sequence, position);
  bool is_scanned = problems_of(p, sequence) == 0 && is_open && number >= 0;
  if (is_scanned && number >= p.num_rows) {
    is_scanned = false;
    instead = kNoSuchRow;
  }
  if (!is_scanned) {
    // All blocks of the row decide alike, also those that run after the sequence's tokens and state have been written,
    // since nobody waits for them: this position is not written, and problems_of does not depend on what is.
    if (share == 0 && arch::thread_index() == 0) store_statistics(p, index, instead, no_statistics());
    return share == 0;
  }
  const Row<T> row = open_row<T>(p, sequence, position, number);
  const int64_t segments = num_segments(p.vocab);
  const int64_t begin = share * segments_per_block;
  const int64_t end = begin + segments_per_block < segments ? begin + segments_per_block : segments;
  scan_segments<T, kFeatures>(p, row, static_cast<int32_t>(begin) + arch::warp_index(), static_cast<int32_t>(end),
                              kStepWarps, p.parts + index * segments);
  if (blocks_per_row == 1) {
    arch::sync_block();
  } else if (!arrives_last(p.tickets + sequence * (p.block_length + 1) + position, blocks_per_row, shared)) {
    return false;
  }
  if (arch::warp_index() == 0) {
    const int64_t close = finish_row<T, kFeatures>(p, row, index, sequence);
    if (arch::thread_index() == 0) shared.close_candidate = static_cast<int32_t>(close);
  }
  if (p.exact) {
    arch::sync_block();
    const int64_t close = shared.close_candidate;
    arch::sync_block();
    if (close >= 0) write_exact_confidence(p, row, index, close, shared);
  }
  return true;
}

// registers: <= 128
template <class T, int kFeatures>
TW_KERNEL void __launch_bounds__(kStepThreads, kStepBlocksPerSm)
    decode_step_kernel(const DecodeStepParams p, int64_t segments_per_block, int64_t blocks_per_row) {
  DecodeStepShared& shared = arch::shared<DecodeStepShared>();
  const int64_t num_shares = p.batch * p.block_length * blocks_per_row;
  for (int64_t task = blockIdx.x; task < num_shares; task += gridDim.x) {
    const int64_t index = task / blocks_per_row, share = task % blocks_per_row;
    const bool row_is_done = scan_share<T, kFeatures>(p, index, share, segments_per_block, blocks_per_row, shared);
    if (!p.commit || !row_is_done) continue;
    const int64_t sequence = index / p.block_length;
    uint32_t* ticket = p.tickets + sequence * (p.block_length + 1) + p.block_length;
    if (arrives_last(ticket, p.block_length, shared)) commit_sequence(p, sequence, shared.selection);
  }
}

using DecodeStepKernel = void (*)(DecodeStepParams, int64_t, int64_t);

// The feature sets there are; plan_decode_step picks the smallest that covers what is asked for.
constexpr int32_t kFeatureSets[] = {0, kEntropy | kMargin, kSampling, kEntropy | kMargin | kSampling | kDivergence};

template <class T>
DecodeStepKernel select_decode_step_kernel(int32_t features);

#define TW_INSTANTIATE_DECODE_STEP(T)                               \
  template <>                                                       \
  DecodeStepKernel select_decode_step_kernel<T>(int32_t features) { \
    switch (features) {                                             \
      case kFeatureSets[0]:                                         \
        return decode_step_kernel<T, kFeatureSets[0]>;              \
      case kFeatureSets[1]:                                         \
        return decode_step_kernel<T, kFeatureSets[1]>;              \
      case kFeatureSets[2]:                                         \
        return decode_step_kernel<T, kFeatureSets[2]>;              \
      default:                                                      \
        return decode_step_kernel<T, kFeatureSets[3]>;              \
    }                                                               \
  }

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
