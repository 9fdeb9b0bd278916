// The 16-bit float formats as plain bits, and their conversions: to fp32 exact, from fp32 round-to-nearest-even.
// NaN stays NaN (its payload is not kept), infinities and subnormals are kept, overflow goes to infinity.
// Used by kernels on every backend and by the CPU kernels, hence bits and not a compiler's type.
#pragma once

#include "core/arch.cuh"
#include "core/op.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

TW_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
TW_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TW_HOST_DEVICE float to_float(float value) { return value; }
TW_HOST_DEVICE float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
TW_HOST_DEVICE float to_float(fp16 value) {
#if defined(__CUDA_ARCH__)
  return arch::convert_from_fp16_bits(value.bits);
#else
  // Shift exponent and mantissa into fp32's place, then fix the exponent bias; subnormals by one exact subtraction.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  if (exponent == 0x0f800000u) return float_of(sign | (magnitude + 0x70000000u));  // infinity, NaN
  if (exponent == 0) return float_of(sign | bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u)));
  return float_of(sign | (magnitude + 0x38000000u));
#endif
}

TW_HOST_DEVICE bf16 to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return bf16{arch::convert_to_bf16_bits(value)};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half up, minus the tie on an even bit
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>(is_nan ? 0x7fffu : rounded)};
#endif
}

TW_HOST_DEVICE fp16 to_fp16(float value) {
#if defined(__CUDA_ARCH__)
  return fp16{arch::convert_to_fp16_bits(value)};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 puts the subnormal's last bit on fp32's last bit
    result = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return fp16{static_cast<uint16_t>(sign | result)};
#endif
}

template <class T>
TW_HOST_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(value);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return to_fp16(value);
  } else {
    static_assert(std::is_same_v<T, float>);
    return value;
  }
}

template <class T>
inline constexpr DType kDType = std::is_same_v<T, bf16>   ? DType::bf16
                                : std::is_same_v<T, fp16> ? DType::fp16
                                                          : DType::fp32;

// Calls visitor.operator()<T>() with the element type of `dtype`. The one place where a dtype becomes a type.
template <class Visitor>
auto with_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::bf16:
      return visitor.template operator()<bf16>();
    case DType::fp16:
      return visitor.template operator()<fp16>();
    default:
      return visitor.template operator()<float>();
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
