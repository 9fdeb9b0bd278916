// Philox4x32-10: a counter-based generator (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). The same key and counter give the same four words on every backend, in any order, without state.
#pragma once

#include "core/arch.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct PhiloxBlock {
  uint32_t words[4];
};

// The ten rounds on words of any width: multiply(multiplier, word, high, low) gives both halves of the product of
// 32-bit lanes, and ^ goes lane by lane.
template <class Word, class Multiply>
TW_DEVICE void philox_rounds(Word (&words)[4], uint32_t key0, uint32_t key1, const Multiply& multiply) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(kMultiplier0, words[0], high0, low0);
    multiply(kMultiplier1, words[2], high1, low1);
    words[0] = high1 ^ words[1] ^ key0;
    words[1] = low1;
    words[2] = high0 ^ words[3] ^ key1;
    words[3] = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

struct MultiplyWords {
  TW_MEMBER void operator()(uint32_t multiplier, uint32_t word, uint32_t& high, uint32_t& low) const {
    const uint64_t product = static_cast<uint64_t>(multiplier) * word;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

TW_DEVICE PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  philox_rounds(counter.words, key0, key1, MultiplyWords());
  return counter;
}

// Uniform in [0, 1) with 24 bits: every value is exact in fp32 and 1 is never returned.
TW_DEVICE float uniform_from_bits(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1.0p-24f; }

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
