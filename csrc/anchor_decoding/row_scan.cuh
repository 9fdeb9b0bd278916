// A row of logits on a GPU. A warp takes segments of kSegment ids: lane i owns packs i, i + 32, ... of 16 bytes, so a
// load of the warp is 512 contiguous bytes, and the next group of packs, of the next segment if need be, is in flight
// while one is added up. Per id: unpacking, NaN to -inf, the maximum, one multiply-add, one exp2, one addition. No
// index is tracked: which id has the maximum is looked up afterwards in the one segment that has it (noise is costly to
// draw again, so the candidate of a sampled row is tracked).
#pragma once

#include "anchor_decoding/row_part.cuh"
#include "core/philox.cuh"
#include "core/reduce.cuh"
#include "core/vec.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// The row of a position, the same for all threads of a block.
template <class T>
struct Row {
  const T* logits;
  const T* previous;  // null where divergence is not wanted or there is no step before
  bool is_aligned;    // logits and previous begin on a 16-byte boundary
  float temperature;
  uint32_t seed_low, seed_high, position, step_low, step_high;
};

template <class T>
TW_DEVICE Row<T> open_row(const DecodeStepParams& p, int64_t sequence, int64_t position, int64_t number) {
  Row<T> row;
  row.logits = static_cast<const T*>(p.logits) + p.logits_rows.offset(number);
  const bool has_previous =
      (p.features & kDivergence) != 0 && p.stable_steps[sequence * p.block_length + position] >= 0;
  row.previous = has_previous ? static_cast<const T*>(p.previous_logits) + p.previous_rows.offset(number) : nullptr;
  row.is_aligned = is_aligned_16(row.logits) && is_aligned_16(row.previous);
  row.temperature = p.temperature[sequence];
  const auto seed = static_cast<uint64_t>(p.seed[sequence]), step = static_cast<uint64_t>(p.step[sequence]);
  row.seed_low = static_cast<uint32_t>(seed);
  row.seed_high = static_cast<uint32_t>(seed >> 32);
  row.position = static_cast<uint32_t>(position);
  row.step_low = static_cast<uint32_t>(step);
  row.step_high = static_cast<uint32_t>(step >> 32);
  return row;
}

// kCount packs of a lane, 32 packs apart, from the warp's ids `begin` on; ids from vocab on are -inf. (Ids have 32
// bits, offsets of rows 64.)
template <class T, int kCount>
TW_DEVICE void load_packs(const T* row, int32_t begin, int32_t vocab, bool is_aligned, Vec16 (&packs)[kCount]) {
  constexpr int kSize = kPackSize<T>;
  const int32_t first = begin + arch::lane_index() * kSize;
  if (is_aligned && begin + kCount * arch::kWarpSize * kSize <= vocab) {  // all lanes alike
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      packs[k] = arch::load_streaming(reinterpret_cast<const Vec16*>(row + first) + k * arch::kWarpSize);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int32_t id = first + k * arch::kWarpSize * kSize;
    if (is_aligned && id + kSize <= vocab) {
      packs[k] = arch::load_streaming(reinterpret_cast<const Vec16*>(row + id));
      continue;
    }
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = id + i < vocab ? to_float(row[id + i]) : kNegativeInfinity;
    packs[k] = pack<T>(values);
  }
}

// Whether the mask id or a forbidden id lies in [first, first + count).
TW_DEVICE bool any_excluded(const DecodeStepParams& p, int64_t first, int64_t count) {
  bool found = p.mask_id >= first && p.mask_id < first + count;
  for (int64_t i = 0; i < p.num_forbidden; ++i) {
    found = found || (p.forbidden[i] >= first && p.forbidden[i] < first + count);
  }
  return found;
}

// Makes the mask id and the forbidden ids of a pack, whose first id is `first`, -inf.
template <class T>
TW_DEVICE void drop_excluded(const DecodeStepParams& p, Vec16& pack, int32_t first) {
  for (int64_t k = -1; k < p.num_forbidden; ++k) {
    const auto id = static_cast<uint64_t>(k < 0 ? p.mask_id : p.forbidden[k]);
    const uint64_t place = id - static_cast<uint64_t>(first);
    if (place >= kPackSize<T>) continue;
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) {
      if (static_cast<uint64_t>(i) == place) pack_set<T>(pack, i, kNegativeInfinity);
    }
  }
}

// Logit i of a pack in fp32; NaN counts as -inf.
template <class T>
TW_DEVICE float logit_of(const Vec16& pack, int i) {
  return arch::maximum(pack_get<T>(pack, i), kNegativeInfinity);
}

// Standard Gumbel noise from 32 random bits: see reference/anchor_decoding.py.
TW_DEVICE float gumbel(uint32_t bits) {
  const float u = arch::maximum(0x1.0p-33f, arch::minimum(static_cast<float>(bits) * 0x1.0p-32f, 1.0f - 0x1.0p-24f));
  // -log1p(-u): by its series where 1 - u has lost too much of u
  const float series = u * (1.0f + u * (0.5f + u * (0.3333333333f + u * (0.25f + u * 0.2f))));
  const float exponential = u < 0.015625f ? series : -kLn2 * arch::log2(1.0f - u);
  return -kLn2 * arch::log2(exponential);
}

template <class T>
TW_DEVICE void add_noisy(RowPart& part, const Row<T>& row, const Vec16& pack, int32_t first) {
#pragma unroll
  for (int i = 0; i < kPackSize<T>; i += 4) {
    const PhiloxBlock block =
        philox4x32_10({{static_cast<uint32_t>((first + i) / 4), row.position, row.step_low, row.step_high}},
                      row.seed_low, row.seed_high);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float l = logit_of<T>(pack, i + k);
      const float noisy = arch::fused_multiply_add(row.temperature, gumbel(block.words[k]), l);
      if (noisy > part.noisy) {  // ids ascend, so equal scores keep the lower one
        part.noisy = noisy;
        part.noisy_logit = l;
        part.noisy_id = first + i + k;
      }
    }
  }
}

// Packs of a lane that are on their way while as many are added up, kPacksAtOnce at a time. Noise and the row before
// need registers too. What is added up at once decides roundings, so it is the same for all feature sets: a request's
// bits must not depend on what others in the batch ask for.
constexpr int kPacksAtOnce = 2;
template <int kFeatures>
inline constexpr int kPacksInFlight = (kFeatures & kSampling) != 0 ? 2 : 4;

// Adds packs of a lane to its part: moves the sums to the new maximum once, then adds term by term.
template <class T, int kFeatures>
TW_DEVICE void add_packs(RowPart& part, const Vec16* packs, const Vec16* previous, bool has_previous) {
  float max = part.max, previous_max = part.previous_max;
#pragma unroll
  for (int i = 0; i < kPacksAtOnce * kPackSize<T>; ++i) {
    const float l = logit_of<T>(packs[i / kPackSize<T>], i % kPackSize<T>);
    if constexpr ((kFeatures & kMargin) != 0) part.second = arch::maximum(part.second, arch::minimum(l, max));
    max = arch::maximum(max, l);
    if constexpr ((kFeatures & kDivergence) != 0) {
      if (has_previous) {
        previous_max = arch::maximum(previous_max, logit_of<T>(previous[i / kPackSize<T>], i % kPackSize<T>));
      }
    }
  }
  rescale(part, exponent_for(max), exponent_for(previous_max));
  part.max = max;
  part.previous_max = previous_max;
#pragma unroll
  for (int i = 0; i < kPacksAtOnce * kPackSize<T>; ++i) {
    const float l = logit_of<T>(packs[i / kPackSize<T>], i % kPackSize<T>);
    const float t = arch::fused_multiply_add(l, kLog2E, -part.exponent);
    const float term = arch::exp2(t);
    part.sum += term;
    if constexpr ((kFeatures & kEntropy) != 0) {
      part.moment = arch::fused_multiply_add(term, arch::maximum(t, kSmallestExponent), part.moment);
    }
    if constexpr ((kFeatures & kDivergence) != 0) {
      if (has_previous) {
        const float before = logit_of<T>(previous[i / kPackSize<T>], i % kPackSize<T>);
        if (l > kNegativeInfinity) part.divergence += term * (l - before);
        part.previous_sum += arch::exp2(arch::fused_multiply_add(before, kLog2E, -part.previous_exponent));
      }
    }
  }
}

// The parts of all lanes, in every lane.
template <int kFeatures>
TW_DEVICE RowPart fold_warp(RowPart part) {
  float max = part.max, previous_max = part.previous_max;
#pragma unroll
  for (uint32_t offset = arch::kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = arch::shuffle_xor(max, offset);
    if constexpr ((kFeatures & kMargin) != 0) {
      const float loser = arch::minimum(max, other);
      part.second = arch::maximum(loser, arch::maximum(part.second, arch::shuffle_xor(part.second, offset)));
    }
    max = arch::maximum(max, other);
    if constexpr ((kFeatures & kDivergence) != 0) {
      previous_max = arch::maximum(previous_max, arch::shuffle_xor(previous_max, offset));
    }
    if constexpr ((kFeatures & kSampling) != 0) {
      const float noisy = arch::shuffle_xor(part.noisy, offset), logit = arch::shuffle_xor(part.noisy_logit, offset);
      const int32_t id = arch::shuffle_xor(part.noisy_id, offset);
      if (noise_wins(noisy, id, part.noisy, part.noisy_id)) {
        part.noisy = noisy;
        part.noisy_logit = logit;
        part.noisy_id = id;
      }
    }
  }
  rescale(part, exponent_for(max), exponent_for(previous_max));
  part.max = max;
  part.previous_max = previous_max;
  part.sum = warp_sum(part.sum);
  if constexpr ((kFeatures & kEntropy) != 0) part.moment = warp_sum(part.moment);
  if constexpr ((kFeatures & kDivergence) != 0) {
    part.divergence = warp_sum(part.divergence);
    part.previous_sum = warp_sum(part.previous_sum);
  }
  return part;
}

TW_DEVICE void store_part(RowPart* destination, const RowPart& part) {
  Vec16 packs[3];
  __builtin_memcpy(packs, &part, sizeof(packs));
#pragma unroll
  for (int i = 0; i < 3; ++i) arch::store_streaming(reinterpret_cast<Vec16*>(destination) + i, packs[i]);
}
TW_DEVICE RowPart load_part(const RowPart* source) {
  Vec16 packs[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) packs[i] = arch::load_streaming(reinterpret_cast<const Vec16*>(source) + i);
  RowPart part;
  __builtin_memcpy(&part, packs, sizeof(part));
  return part;
}

// One warp: the segments first, first + step, ... below `end` of a row, their parts to `parts`.
template <class T, int kFeatures>
TW_DEVICE void scan_segments(const DecodeStepParams& p, const Row<T>& row, int32_t first, int32_t end, int32_t step,
                             RowPart* parts) {
  constexpr int kGroup = kPacksInFlight<kFeatures>;
  constexpr int kPackIds = arch::kWarpSize * kPackSize<T>;  // of a warp
  constexpr int kGroupIds = kGroup * kPackIds;
  const auto vocab = static_cast<int32_t>(p.vocab);
  const bool has_previous = row.previous != nullptr;
  const int32_t own = arch::lane_index() * kPackSize<T>;
  Vec16 next[kGroup];
  if (first < end) load_packs(row.logits, first * kSegment, vocab, row.is_aligned, next);
  for (int32_t segment = first; segment < end; segment += step) {
    const int32_t segment_begin = segment * kSegment, segment_end = segment_begin + kSegment;
    const bool has_excluded = any_excluded(p, segment_begin, kSegment);
    RowPart part = empty_part();
#pragma unroll 1
    for (int32_t begin = segment_begin; begin < segment_end && begin < vocab; begin += kGroupIds) {
      Vec16 packs[kGroup], previous[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) packs[k] = previous[k] = next[k];
      const int32_t following = begin + kGroupIds < segment_end ? begin + kGroupIds : (segment + step) * kSegment;
      if (following < segment_end || segment + step < end) {
        load_packs(row.logits, following, vocab, row.is_aligned, next);
      }
      if constexpr ((kFeatures & kDivergence) != 0) {
        if (has_previous) load_packs(row.previous, begin, vocab, row.is_aligned, previous);
      }
      if (has_excluded) {  // all lanes alike
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          drop_excluded<T>(p, packs[k], begin + k * kPackIds + own);
          if constexpr ((kFeatures & kDivergence) != 0) drop_excluded<T>(p, previous[k], begin + k * kPackIds + own);
        }
      }
      if constexpr ((kFeatures & kSampling) != 0) {
        if (row.temperature > 0.0f) {
#pragma unroll
          for (int k = 0; k < kGroup; ++k) add_noisy(part, row, packs[k], begin + k * kPackIds + own);
        }
      }
#pragma unroll
      for (int k = 0; k < kGroup; k += kPacksAtOnce) {
        add_packs<T, kFeatures>(part, packs + k, previous + k, has_previous);
      }
    }
    part = fold_warp<kFeatures>(part);
    if (arch::lane_index() == 0) store_part(parts + segment, part);
  }
}

TW_DEVICE int32_t warp_min(int32_t value) {
#pragma unroll
  for (uint32_t offset = arch::kWarpSize / 2; offset > 0; offset /= 2) {
    const int32_t other = arch::shuffle_xor(value, offset);
    value = other < value ? other : value;
  }
  return value;
}

// One warp: the lowest id that may be chosen and whose logit is `max` (NaN counts as -inf), from a segment on.
template <class T>
TW_DEVICE int32_t find_id(const DecodeStepParams& p, const Row<T>& row, int32_t segment, float max) {
  constexpr int kSize = kPackSize<T>, kInFlight = 4;
  const auto vocab = static_cast<int32_t>(p.vocab);
  for (int32_t begin = segment * kSegment; begin < vocab; begin += kInFlight * arch::kWarpSize * kSize) {
    const auto first_id = [&](int k) { return begin + (k * arch::kWarpSize + arch::lane_index()) * kSize; };
    Vec16 packs[kInFlight];
    load_packs(row.logits, begin, vocab, row.is_aligned, packs);
    uint32_t hits = 0;  // a bit per id of this lane, ids ascending
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        hits |= static_cast<uint32_t>(logit_of<T>(packs[k], i) == max) << (k * kSize + i);
      }
    }
    int32_t found = kNoId;
    for (; hits != 0 && found == kNoId; hits &= hits - 1) {
      const int bit = arch::lowest_bit(hits);
      const int32_t id = first_id(bit / kSize) + bit % kSize;
      if (id < vocab && id != p.mask_id && !in_list(p.forbidden, p.num_forbidden, id)) found = id;
    }
    found = warp_min(found);
    if (found != kNoId) return found;
  }
  return static_cast<int32_t>(kNoCandidate);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
