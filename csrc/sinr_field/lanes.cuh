// Math<V>: the operations that the samplers need beyond + - * < ?: on lanes of type V. This is V = float, a thread's
// one lane; lanes_cpu.h has a register's worth of them. All are exact or correctly rounded, so that the functions of
// arithmetic.cuh give the same bits for either.
#pragma once

#include "core/numeric.cuh"
#include "core/philox.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

template <class V>
struct Math;

template <>
struct Math<float> {
  using Bits = uint32_t;
  using Ints = int32_t;
  using Wide = double;
  static constexpr int kLanesOfV = 1;

  TW_MEMBER static float multiply_add(float a, float b, float c) { return arch::fused_multiply_add(a, b, c); }
  TW_MEMBER static uint32_t bits(float v) { return bits_of(v); }
  TW_MEMBER static float from_bits(uint32_t b) { return float_of(b); }
  TW_MEMBER static uint32_t complement(uint32_t b) { return ~b; }
  TW_MEMBER static int32_t as_ints(uint32_t b) { return static_cast<int32_t>(b); }
  TW_MEMBER static uint32_t as_bits(int32_t i) { return static_cast<uint32_t>(i); }
  TW_MEMBER static float convert(uint32_t b) { return static_cast<float>(b); }
  TW_MEMBER static int32_t truncate(float v) { return static_cast<int32_t>(v); }
  TW_MEMBER static float convert(int32_t i) { return static_cast<float>(i); }
  TW_MEMBER static void philox(uint32_t (&words)[4], uint32_t key0, uint32_t key1) {
    philox_rounds(words, key0, key1, MultiplyWords());
  }
  // The bound may not be 0; NaN becomes the bound.
  TW_MEMBER static float not_below(float v, float bound) { return arch::maximum(v, bound); }
  TW_MEMBER static float not_above(float v, float bound) { return arch::minimum(v, bound); }
  TW_MEMBER static float divide(float a, float b) { return arch::divide(a, b); }
  TW_MEMBER static float square_root(float v) { return arch::square_root(v); }
  TW_MEMBER static bool any(bool condition) { return condition; }

  TW_MEMBER static double widen(float v) { return v; }
  // v * 2^exponent, for exponents of normal doubles
  TW_MEMBER static double scale(float v, int32_t exponent) {
    return static_cast<double>(v) * double_of(static_cast<uint64_t>(exponent + 1023) << 52);
  }
  TW_MEMBER static double wide_multiply_add(double a, double b, double c) { return arch::fused_multiply_add(a, b, c); }
  TW_MEMBER static double where(bool condition, double a, double b) { return condition ? a : b; }

  TW_MEMBER static double at_most_one(double v) { return v < 1.0 ? v : 1.0; }

 private:
  TW_MEMBER static double double_of(uint64_t b) {
    double v;
    __builtin_memcpy(&v, &b, sizeof(v));
    return v;
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
