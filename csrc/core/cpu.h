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

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about passing lanes by value; every such function is inlined
#endif

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

constexpr int kLanes = 16;
typedef float Float16Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits16Lanes __attribute__((vector_size(64)));
typedef uint16_t Half16Lanes __attribute__((vector_size(32)));

#define TW_CPU static inline __attribute__((always_inline))

TW_CPU Float16Lanes broadcast(float value) { return Float16Lanes{} + value; }

// In a fixed tree: lanes 8 apart, then 4, 2, 1.
TW_CPU float sum_lanes(const Float16Lanes& lanes) {
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

TW_CPU void load_lanes(Float16Lanes& lanes, const float* source) { std::memcpy(&lanes, source, sizeof(lanes)); }
TW_CPU void store_lanes(float* destination, const Float16Lanes& lanes) {
  std::memcpy(destination, &lanes, sizeof(lanes));
}

TW_CPU void load_lanes(Float16Lanes& lanes, const bf16* source) {
  Half16Lanes bits;
  std::memcpy(&bits, source, sizeof(bits));
  const Bits16Lanes wide = __builtin_convertvector(bits, Bits16Lanes) << 16;
  std::memcpy(&lanes, &wide, sizeof(lanes));
}
TW_CPU void store_lanes(bf16* destination, const Float16Lanes& lanes) {
  Bits16Lanes bits;
  std::memcpy(&bits, &lanes, sizeof(bits));
  const Bits16Lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits16Lanes result = (bits & 0x7fffffffu) > 0x7f800000u ? Bits16Lanes{} + 0x7fffu : rounded;
  const Half16Lanes narrow = __builtin_convertvector(result, Half16Lanes);
  std::memcpy(destination, &narrow, sizeof(narrow));
}

TW_CPU void load_lanes(Float16Lanes& lanes, const fp16* source) {
#if defined(__F16C__)
  __m128i bits[2];
  std::memcpy(bits, source, sizeof(bits));
  const __m256 wide[2] = {_mm256_cvtph_ps(bits[0]), _mm256_cvtph_ps(bits[1])};
  std::memcpy(&lanes, wide, sizeof(lanes));
#else
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(source[i]);
  std::memcpy(&lanes, v, sizeof(lanes));
#endif
}
TW_CPU void store_lanes(fp16* destination, const Float16Lanes& lanes) {
#if defined(__F16C__)
  __m256 wide[2];
  std::memcpy(wide, &lanes, sizeof(wide));
  const __m128i bits[2] = {_mm256_cvtps_ph(wide[0], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(wide[1], _MM_FROUND_TO_NEAREST_INT)};
  std::memcpy(destination, bits, sizeof(bits));
#else
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  for (int i = 0; i < kLanes; ++i) destination[i] = to_fp16(v[i]);
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
