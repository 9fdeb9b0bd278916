// What CPU kernels (<op>_cpu.cpp) are written with: 16 fp32 lanes on every instruction set, and the run-time choice among
// the sets. CMake builds each <op>_cpu.cpp once per set, with TOKENWEAVE_ISA naming the namespace its code lives in; the
// baseline build also emits the dispatcher. Everything here is static or a lambda's: nothing built for AVX-512 may be
// merged by the linker into what a baseline machine runs. The lanes and the order of additions are the same on every set
// and multiplies are not contracted into adds (-ffp-contract=off), so all sets give the same bits.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/numeric.cuh"
#include "core/op.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"                // about passing lanes by value; every such function is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 on its own AVX-512 intrinsics
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

#define TW_CPU static inline __attribute__((always_inline))

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kParts = kLanes * 4 / kRegisterBytes;
constexpr int kPartLanes = kLanes / kParts;

// One register's worth of the 16 lanes; gcc's vector types, so + * & >> and comparisons work lane by lane.
typedef float Part __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t PartBits __attribute__((vector_size(kRegisterBytes)));

struct Float16Lanes {
  Part part[kParts];
};

#define TW_CPU_OPERATOR(op)                                                                \
  TW_CPU Float16Lanes operator op(const Float16Lanes& a, const Float16Lanes& b) {          \
    Float16Lanes result;                                                                   \
    for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] op b.part[i];              \
    return result;                                                                         \
  }
TW_CPU_OPERATOR(+)
TW_CPU_OPERATOR(-)
TW_CPU_OPERATOR(*)
#undef TW_CPU_OPERATOR

TW_CPU Float16Lanes broadcast(float value) {
  Float16Lanes result;
  for (int i = 0; i < kParts; ++i) result.part[i] = Part{} + value;
  return result;
}

// In a fixed tree: lanes 8 apart, then 4, 2, 1.
TW_CPU float sum_lanes(const Float16Lanes& lanes) {
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

TW_CPU void load_lanes(Float16Lanes& lanes, const float* source) {
  for (int i = 0; i < kParts; ++i) std::memcpy(&lanes.part[i], source + i * kPartLanes, kRegisterBytes);
}
TW_CPU void store_lanes(float* destination, const Float16Lanes& lanes) {
  for (int i = 0; i < kParts; ++i) std::memcpy(destination + i * kPartLanes, &lanes.part[i], kRegisterBytes);
}

// 16-bit words to and from the high halves of the 32-bit lanes; the low halves come as zero and are dropped.
struct Bits16Lanes {
  PartBits part[kParts];
};

TW_CPU Bits16Lanes load_high_halves(const void* source) {
  Bits16Lanes result;
  const uint16_t* words = static_cast<const uint16_t*>(source);
#if defined(__AVX512F__)
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  result.part[0] = (PartBits)_mm512_cvtepu16_epi32(v) << 16;
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i * kPartLanes));
    result.part[i] = (PartBits)_mm256_cvtepu16_epi32(v) << 16;
  }
#elif defined(__SSE2__)
  for (int i = 0; i < kParts; ++i) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + i * kPartLanes));
    result.part[i] = (PartBits)_mm_unpacklo_epi16(_mm_setzero_si128(), v);
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    result.part[lane / kPartLanes][lane % kPartLanes] = static_cast<uint32_t>(words[lane]) << 16;
  }
#endif
  return result;
}

TW_CPU void store_high_halves(void* destination, const Bits16Lanes& lanes) {
  uint16_t* words = static_cast<uint16_t*>(destination);
#if defined(__AVX512F__)
  const __m256i v = _mm512_cvtepi32_epi16((__m512i)(lanes.part[0] >> 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), v);
#elif defined(__AVX2__)
  // The arithmetic shift makes words that the signed pack keeps whole; it packs per 128 bits, hence the permute.
  const __m256i low = _mm256_srai_epi32((__m256i)lanes.part[0], 16), high = _mm256_srai_epi32((__m256i)lanes.part[1], 16);
  const __m256i v = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), v);
#elif defined(__SSE2__)
  for (int i = 0; i < kParts; i += 2) {
    const __m128i low = _mm_srai_epi32((__m128i)lanes.part[i], 16), high = _mm_srai_epi32((__m128i)lanes.part[i + 1], 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i * kPartLanes), _mm_packs_epi32(low, high));
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    words[lane] = static_cast<uint16_t>(lanes.part[lane / kPartLanes][lane % kPartLanes] >> 16);
  }
#endif
}

// The conversions below are those of numeric.cuh, lane by lane.
TW_CPU void load_lanes(Float16Lanes& lanes, const bf16* source) {
  const Bits16Lanes bits = load_high_halves(source);
  for (int i = 0; i < kParts; ++i) lanes.part[i] = (Part)bits.part[i];
}
TW_CPU void store_lanes(bf16* destination, const Float16Lanes& lanes) {
  Bits16Lanes result;
  for (int i = 0; i < kParts; ++i) {
    const PartBits bits = (PartBits)lanes.part[i];
    const PartBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    result.part[i] = lanes.part[i] == lanes.part[i] ? rounded : PartBits{} + 0x7fff0000u;
  }
  store_high_halves(destination, result);
}

TW_CPU void load_lanes(Float16Lanes& lanes, const fp16* source) {
#if defined(__AVX512F__)
  lanes.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  for (int i = 0; i < kParts; ++i) {
    lanes.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * kPartLanes)));
  }
#else
  const Bits16Lanes bits = load_high_halves(source);
  for (int i = 0; i < kParts; ++i) {
    const PartBits sign = bits.part[i] & 0x80000000u, magnitude = (bits.part[i] & 0x7fffffffu) >> 3;
    const PartBits exponent = magnitude & 0x0f800000u;
    const PartBits subnormal = (PartBits)((Part)(magnitude + 0x38800000u) - (Part)(PartBits{} + 0x38800000u));
    const PartBits finite = exponent == 0 ? subnormal : magnitude + 0x38000000u;
    lanes.part[i] = (Part)(sign | (exponent == 0x0f800000u ? magnitude + 0x70000000u : finite));
  }
#endif
}
TW_CPU void store_lanes(fp16* destination, const Float16Lanes& lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination),
                      _mm512_cvtps_ph(lanes.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (int i = 0; i < kParts; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(destination + i * kPartLanes),
                     _mm256_cvtps_ph(lanes.part[i], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  Bits16Lanes result;
  for (int i = 0; i < kParts; ++i) {
    const PartBits bits = (PartBits)lanes.part[i], sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const PartBits subnormal = (PartBits)((Part)magnitude + 0.5f) - 0x3f000000u;
    const PartBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const PartBits finite = magnitude < 0x38800000u ? subnormal : normal;
    const PartBits infinite = magnitude > 0x7f800000u ? PartBits{} + 0x7fffu : PartBits{} + 0x7c00u;
    result.part[i] = (sign | (magnitude >= 0x477ff000u ? infinite : finite)) << 16;
  }
  store_high_halves(destination, result);
#endif
}

// The first `count` < kLanes elements, the other lanes zero; and back.
template <class T>
TW_CPU void load_partial(Float16Lanes& lanes, const T* source, int64_t count) {
  float v[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(source[i]);
  std::memcpy(&lanes, v, sizeof(lanes));
}
template <class T>
TW_CPU void store_partial(T* destination, const Float16Lanes& lanes, int64_t count) {
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  for (int64_t i = 0; i < count; ++i) destination[i] = from_float<T>(v[i]);
}

// body(begin, end) over pieces of [begin, end) on the context's pool; small work stays on the calling thread.
template <class Body>
TW_CPU void parallel_for(const ExecutionContext& context, int64_t begin, int64_t end, int64_t grain, Body& body) {
  if (end - begin <= grain || context.parallel_for == nullptr) {
    body(begin, end);
    return;
  }
  context.parallel_for(
      begin, end, grain, [](int64_t from, int64_t to, void* argument) { (*static_cast<Body*>(argument))(from, to); },
      &body);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

// TOKENWEAVE_CPU_DISPATCH(rms_norm, RmsNormParams): defines Status rms_norm(const RmsNormParams&, const ExecutionContext&)
// as a choice among isa_*::rms_norm_kernel, each defined in the same file. Expands to nothing but in the baseline build.
#define TW_IS_BASELINE_isa_baseline 1
#define TW_CONCATENATE_EXPANDED(a, b) a##b
#define TW_CONCATENATE(a, b) TW_CONCATENATE_EXPANDED(a, b)
#if TW_CONCATENATE(TW_IS_BASELINE_, TOKENWEAVE_ISA)
#if defined(__x86_64__)
#define TOKENWEAVE_CPU_DISPATCH(op, Params)                                             \
  namespace tokenweave::inline TOKENWEAVE_BACKEND {                                     \
  namespace isa_avx2 {                                                                  \
  Status op##_kernel(const Params& params, const ExecutionContext& context);            \
  }                                                                                     \
  namespace isa_avx512 {                                                                \
  Status op##_kernel(const Params& params, const ExecutionContext& context);            \
  }                                                                                     \
  Status op(const Params& params, const ExecutionContext& context) {                    \
    switch (cpu_isa()) {                                                                \
      case CpuIsa::avx512:                                                              \
        return isa_avx512::op##_kernel(params, context);                                \
      case CpuIsa::avx2:                                                                \
        return isa_avx2::op##_kernel(params, context);                                  \
      default:                                                                          \
        return isa_baseline::op##_kernel(params, context);                              \
    }                                                                                   \
  }                                                                                     \
  }
#else
#define TOKENWEAVE_CPU_DISPATCH(op, Params)                                             \
  namespace tokenweave::inline TOKENWEAVE_BACKEND {                                     \
  Status op(const Params& params, const ExecutionContext& context) {                    \
    return isa_baseline::op##_kernel(params, context);                                  \
  }                                                                                     \
  }
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND {

enum class CpuIsa { baseline, avx2, avx512 };

// The widest set this processor has, or the one TOKENWEAVE_CPU_ISA asks for if the processor has it; read once.
[[maybe_unused]] static CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    CpuIsa widest = CpuIsa::baseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      widest = CpuIsa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        widest = CpuIsa::avx512;
      }
    }
#endif
    const char* asked = std::getenv("TOKENWEAVE_CPU_ISA");
    if (asked == nullptr) return widest;
    if (std::strcmp(asked, "baseline") == 0) return CpuIsa::baseline;
    if (std::strcmp(asked, "avx2") == 0 && widest == CpuIsa::avx512) return CpuIsa::avx2;
    return widest;
  }();
  return chosen;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
#else
#define TOKENWEAVE_CPU_DISPATCH(op, Params)
#endif
