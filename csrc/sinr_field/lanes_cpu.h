// Math<Part>: a CPU register's worth of lanes for arithmetic.cuh; see lanes.cuh for one lane.
#pragma once

#include "core/cpu.h"
#include "sinr_field/lanes.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

typedef int32_t PartInts __attribute__((vector_size(kRegisterBytes)));
typedef uint64_t WideBits __attribute__((vector_size(kRegisterBytes)));
typedef int64_t WideInts __attribute__((vector_size(kRegisterBytes)));
typedef double WideHalf __attribute__((vector_size(kRegisterBytes)));
typedef float FloatHalf __attribute__((vector_size(kRegisterBytes / 2)));
typedef int32_t IntHalf __attribute__((vector_size(kRegisterBytes / 2)));

// A Part's words as the low halves of 64-bit lanes, where products of words have room; high halves hold anything.
struct SpreadBits {
  WideBits even, odd;
};

TW_CPU SpreadBits operator^(const SpreadBits& a, const SpreadBits& b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
TW_CPU SpreadBits operator^(const SpreadBits& a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }

TW_CPU WideBits multiply_words(uint32_t a, const WideBits& b) {
#if defined(__AVX512F__)
  return (WideBits)_mm512_mul_epu32((__m512i)b, _mm512_set1_epi64(a));
#elif defined(__AVX2__)
  return (WideBits)_mm256_mul_epu32((__m256i)b, _mm256_set1_epi64x(a));
#elif defined(__x86_64__)
  return (WideBits)_mm_mul_epu32((__m128i)b, _mm_set1_epi64x(a));
#else
  return (b & 0xffffffffu) * uint64_t{a};
#endif
}

// A Part's lanes as float64, in two registers.
struct WidePart {
  WideHalf half[2];
};

TW_CPU WideHalf multiply_add(const WideHalf& a, const WideHalf& b, const WideHalf& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

TW_CPU WidePart operator+(const WidePart& a, const WidePart& b) {
  return {{a.half[0] + b.half[0], a.half[1] + b.half[1]}};
}

// Four neighbouring floats for each lane, from rows[4 * row] on. With AVX-512 by pairs: a gather costs by its elements.
TW_CPU void gather_rows(const float* rows, const PartBits& row, Part (&columns)[4]) {
#if defined(__AVX512F__)
  const __m512i pair = (__m512i)(row * 2);
  const __m256i low = _mm512_castsi512_si256(pair), high = _mm512_extracti64x4_epi64(pair, 1);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  for (int i = 0; i < 4; i += 2) {
    const __m512 first = _mm512_castpd_ps(_mm512_i32gather_pd(low, rows + i, 8));
    const __m512 last = _mm512_castpd_ps(_mm512_i32gather_pd(high, rows + i, 8));
    columns[i] = _mm512_permutex2var_ps(first, even, last);
    columns[i + 1] = _mm512_permutex2var_ps(first, odd, last);
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) columns[i] = _mm256_i32gather_ps(rows + i, (__m256i)(row * 4), 4);
#else
  for (int lane = 0; lane < kPartLanes; ++lane) {
    for (int i = 0; i < 4; ++i) columns[i][lane] = rows[4 * int64_t{row[lane]} + i];
  }
#endif
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <>
struct Math<Part> {
  using Bits = PartBits;
  using Ints = PartInts;
  using Wide = WidePart;
  static constexpr int kLanesOfV = kPartLanes;

  TW_MEMBER static Part multiply_add(const Part& a, const Part& b, const Part& c) {
    return TOKENWEAVE_ISA::multiply_add(a, b, c);
  }
  TW_MEMBER static PartBits bits(const Part& v) { return (PartBits)v; }
  TW_MEMBER static Part from_bits(const PartBits& b) { return (Part)b; }
  // With AVX-512, gcc's own ~ reads the register that it writes, so that each would wait for whatever was there.
  TW_MEMBER static PartBits complement(const PartBits& b) {
#if defined(__AVX512F__)
    return (PartBits)_mm512_ternarylogic_epi32((__m512i)b, (__m512i)b, (__m512i)b, 0x55);
#else
    return ~b;
#endif
  }
  TW_MEMBER static PartInts as_ints(const PartBits& b) { return (PartInts)b; }
  TW_MEMBER static PartBits as_bits(const PartInts& i) { return (PartBits)i; }
  TW_MEMBER static Part convert(const PartInts& i) { return __builtin_convertvector(i, Part); }
  TW_MEMBER static PartInts truncate(const Part& v) { return __builtin_convertvector(v, PartInts); }
  // Halves are exact, so that their sum rounds once, as a conversion does.
  TW_MEMBER static Part convert(const PartBits& b) {
#if defined(__AVX512F__)
    return _mm512_cvtepu32_ps((__m512i)b);
#else
    return convert((PartInts)(b >> 16)) * 65536.0f + convert((PartInts)(b & 0xffffu));
#endif
  }
  TW_MEMBER static Part not_below(const Part& v, float bound) {
#if defined(__AVX512F__)
    return _mm512_max_ps(v, _mm512_set1_ps(bound));
#else
    return v > bound ? v : Part{} + bound;
#endif
  }
  TW_MEMBER static Part not_above(const Part& v, float bound) {
#if defined(__AVX512F__)
    return _mm512_min_ps(v, _mm512_set1_ps(bound));
#else
    return v < bound ? v : Part{} + bound;
#endif
  }
  TW_MEMBER static Part divide(const Part& a, const Part& b) { return a / b; }
  TW_MEMBER static Part square_root(const Part& v) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(v);
#elif defined(__x86_64__)
    return _mm_sqrt_ps(v);
#else
    Part result;
    for (int lane = 0; lane < kPartLanes; ++lane) result[lane] = __builtin_sqrtf(v[lane]);
    return result;
#endif
  }
  TW_MEMBER static bool any(const PartInts& condition) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)condition) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < kPartLanes; ++lane) found |= condition[lane];
    return found != 0;
#endif
  }

  TW_MEMBER static void philox(PartBits (&words)[4], uint32_t key0, uint32_t key1) {
    using TOKENWEAVE_ISA::SpreadBits;
    SpreadBits spread[4];
    for (int i = 0; i < 4; ++i) spread[i] = {(WideBits)words[i], (WideBits)words[i] >> 32};
    philox_rounds(spread, key0, key1, [](uint32_t a, const SpreadBits& b, SpreadBits& high, SpreadBits& low) {
      low = {multiply_words(a, b.even), multiply_words(a, b.odd)};
      high = {low.even >> 32, low.odd >> 32};
    });
    for (int i = 0; i < 4; ++i) words[i] = (PartBits)((spread[i].even & 0xffffffffu) | (spread[i].odd << 32));
  }

  TW_MEMBER static WidePart widen(const Part& v) {
    FloatHalf halves[2];
    std::memcpy(halves, &v, sizeof(halves));
    return {{__builtin_convertvector(halves[0], WideHalf), __builtin_convertvector(halves[1], WideHalf)}};
  }
  TW_MEMBER static WidePart scale(const Part& v, const PartInts& exponent) {
    const PartInts biased = exponent + 1023;
    IntHalf halves[2];
    std::memcpy(halves, &biased, sizeof(halves));
    WidePart result = widen(v);
    for (int i = 0; i < 2; ++i) {
      result.half[i] = result.half[i] * (WideHalf)(__builtin_convertvector(halves[i], WideInts) << 52);
    }
    return result;
  }
  TW_MEMBER static WidePart wide_multiply_add(const WidePart& a, const WidePart& b, const WidePart& c) {
    return {{TOKENWEAVE_ISA::multiply_add(a.half[0], b.half[0], c.half[0]),
             TOKENWEAVE_ISA::multiply_add(a.half[1], b.half[1], c.half[1])}};
  }
  TW_MEMBER static WidePart where(const PartInts& condition, const WidePart& a, const WidePart& b) {
    IntHalf halves[2];
    std::memcpy(halves, &condition, sizeof(halves));
    WidePart result;
    for (int i = 0; i < 2; ++i) {
      result.half[i] = __builtin_convertvector(halves[i], WideInts) ? a.half[i] : b.half[i];
    }
    return result;
  }
  TW_MEMBER static WidePart at_most_one(const WidePart& v) {
    WidePart result;
    for (int i = 0; i < 2; ++i) result.half[i] = v.half[i] < 1.0 ? v.half[i] : WideHalf{} + 1.0;
    return result;
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
