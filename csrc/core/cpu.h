// What CPU kernels (<op>_cpu.cpp) are written with: 32 fp32 lanes on every instruction set, and the run-time choice
// among the sets. CMake builds each <op>_cpu.cpp once per set, with TOKENWEAVE_ISA naming the namespace its code lives
// in; the baseline build also emits the dispatcher. Everything here is static or a lambda's: nothing built for AVX-512
// may be merged by the linker into what a baseline machine runs. The lanes and the order of additions are the same on
// every set and multiplies are not contracted into adds (-ffp-contract=off), so all sets give the same bits,
// unless an op asks for multiply_add.
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

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kLanes = 32;
constexpr int kPartLanes = kRegisterBytes / 4;
constexpr int kParts = kLanes / kPartLanes;

// One register's worth of lanes; gcc's vector types, so + * & >> and comparisons work lane by lane.
typedef float Part __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t PartBits __attribute__((vector_size(kRegisterBytes)));

// 32 consecutive elements as fp32. Which lane holds which element depends on the element type (bf16: see below), so
// lanes loaded from one type must be stored to that type, and only lanes of one type may meet in an expression.
struct Lanes {
  Part part[kParts];
};

#define TW_CPU_OPERATOR(op)                                                   \
  TW_CPU Lanes operator op(const Lanes& a, const Lanes& b) {                  \
    Lanes result;                                                             \
    for (int i = 0; i < kParts; ++i) result.part[i] = a.part[i] op b.part[i]; \
    return result;                                                            \
  }
TW_CPU_OPERATOR(+)
TW_CPU_OPERATOR(-)
TW_CPU_OPERATOR(*)
#undef TW_CPU_OPERATOR

TW_CPU Lanes broadcast(float value) {
  Lanes result;
  for (int i = 0; i < kParts; ++i) result.part[i] = Part{} + value;
  return result;
}

// Lane by lane: a * b + c. Rounded once where there is an instruction for it, twice elsewhere: an op that uses it gives
// the same bits on AVX2 and AVX-512 only, and its contract says so.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
constexpr bool kRoundsMultiplyAddOnce = true;
#else
constexpr bool kRoundsMultiplyAddOnce = false;
#endif
TW_CPU Part multiply_add(const Part& a, const Part& b, const Part& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger, and b where a is NaN.
TW_CPU Part maximum(const Part& a, const Part& b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// In a fixed tree: lanes 16 apart, then 8, 4, 2, 1.
TW_CPU float sum_lanes(const Lanes& lanes) {
  float v[kLanes];
  std::memcpy(v, &lanes, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

TW_CPU void load_lanes(Lanes& lanes, const float* source) {
  for (int i = 0; i < kParts; ++i) std::memcpy(&lanes.part[i], source + i * kPartLanes, kRegisterBytes);
}
TW_CPU void store_lanes(float* destination, const Lanes& lanes) {
  for (int i = 0; i < kParts; ++i) std::memcpy(destination + i * kPartLanes, &lanes.part[i], kRegisterBytes);
}

// 16-bit elements come in pairs, one in each half of a 32-bit lane. The first half of the parts takes the even elements
// (low halves), the second the odd ones (high halves): a shift or a mask each, where keeping memory order would cost
// shuffles, on whose one port these kernels would then wait. Values here are the words in the lanes' high halves.
struct HighHalves {
  PartBits part[kParts];
};

TW_CPU HighHalves load_high_halves(const void* source) {
  HighHalves result;
  for (int i = 0; i < kParts / 2; ++i) {
    PartBits pairs;
    std::memcpy(&pairs, static_cast<const char*>(source) + i * kRegisterBytes, kRegisterBytes);
    result.part[i] = pairs << 16;
    result.part[i + kParts / 2] = pairs & 0xffff0000u;
  }
  return result;
}
TW_CPU void store_high_halves(void* destination, const HighHalves& lanes) {
  for (int i = 0; i < kParts / 2; ++i) {
    const PartBits pairs = (lanes.part[i] >> 16) | (lanes.part[i + kParts / 2] & 0xffff0000u);
    std::memcpy(static_cast<char*>(destination) + i * kRegisterBytes, &pairs, kRegisterBytes);
  }
}

// The conversions below are those of numeric.cuh, lane by lane.
TW_CPU void load_lanes(Lanes& lanes, const bf16* source) {
  const HighHalves bits = load_high_halves(source);
  for (int i = 0; i < kParts; ++i) lanes.part[i] = (Part)bits.part[i];
}
TW_CPU void store_lanes(bf16* destination, const Lanes& lanes) {
  HighHalves result;
  for (int i = 0; i < kParts; ++i) {
    const PartBits bits = (PartBits)lanes.part[i];
    const PartBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    result.part[i] = lanes.part[i] == lanes.part[i] ? rounded : PartBits{} + 0x7fff0000u;
  }
  store_high_halves(destination, result);
}

#if defined(__AVX512F__)
TW_CPU void load_lanes(Lanes& lanes, const fp16* source) {
  for (int i = 0; i < kParts; ++i) {
    lanes.part[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * kPartLanes)));
  }
}
TW_CPU void store_lanes(fp16* destination, const Lanes& lanes) {
  for (int i = 0; i < kParts; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination + i * kPartLanes),
                        _mm512_cvtps_ph(lanes.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#elif defined(__F16C__)
TW_CPU void load_lanes(Lanes& lanes, const fp16* source) {
  for (int i = 0; i < kParts; ++i) {
    lanes.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * kPartLanes)));
  }
}
TW_CPU void store_lanes(fp16* destination, const Lanes& lanes) {
  for (int i = 0; i < kParts; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(destination + i * kPartLanes),
                     _mm256_cvtps_ph(lanes.part[i], _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
// In memory order like the two above, so that the sums add up in the same order: one element at a time.
TW_CPU void load_lanes(Lanes& lanes, const fp16* source) {
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(source[i]);
  load_lanes(lanes, v);
}
TW_CPU void store_lanes(fp16* destination, const Lanes& lanes) {
  float v[kLanes];
  store_lanes(v, lanes);
  for (int i = 0; i < kLanes; ++i) destination[i] = to_fp16(v[i]);
}
#endif

// 32 whole elements; and the last `count` < 32 of a row: lanes past its end are zero when loaded and dropped when
// stored.
template <class T>
TW_CPU Lanes load(const T* source) {
  Lanes lanes;
  load_lanes(lanes, source);
  return lanes;
}
template <class T>
TW_CPU void store(T* destination, const Lanes& lanes) {
  store_lanes(destination, lanes);
}
template <class T>
TW_CPU Lanes load_tail(const T* source, int64_t count) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = source[i];
  return load(padded);
}
template <class T>
TW_CPU void store_tail(T* destination, int64_t count, const Lanes& lanes) {
  T padded[kLanes];
  store_lanes(padded, lanes);
  for (int64_t i = 0; i < count; ++i) destination[i] = padded[i];
}

// body(i, load, store) for i = 0, 32, ... of a row: whole vectors first, then the tail if there is one. `load` and
// `store` take a row's start and act on its elements from i on.
template <class Body>
TW_CPU void for_each_vector(int64_t count, const Body& body) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    body(
        i, [i](const auto* row) __attribute__((always_inline)) { return load(row + i); },
        [i](auto* row, const Lanes& lanes) __attribute__((always_inline)) { store(row + i, lanes); });
  }
  const int64_t rest = count - whole;
  if (rest > 0) {
    body(
        whole, [whole, rest](const auto* row) __attribute__((always_inline)) { return load_tail(row + whole, rest); },
        [whole, rest](auto* row, const Lanes& lanes)
            __attribute__((always_inline)) { store_tail(row + whole, rest, lanes); });
  }
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

// TOKENWEAVE_CPU_DISPATCH(rms_norm, RmsNormParams): defines Status rms_norm(const RmsNormParams&, const
// ExecutionContext&) as a choice among isa_*::rms_norm_kernel, each defined in the same file. Expands to nothing but in
// the baseline build.
#define TW_IS_BASELINE_isa_baseline 1
#define TW_CONCATENATE_EXPANDED(a, b) a##b
#define TW_CONCATENATE(a, b) TW_CONCATENATE_EXPANDED(a, b)
#if TW_CONCATENATE(TW_IS_BASELINE_, TOKENWEAVE_ISA)
#if defined(__x86_64__)
#define TOKENWEAVE_CPU_DISPATCH(op, Params)                                  \
  namespace tokenweave::inline TOKENWEAVE_BACKEND {                          \
  namespace isa_avx2 {                                                       \
  Status op##_kernel(const Params& params, const ExecutionContext& context); \
  }                                                                          \
  namespace isa_avx512 {                                                     \
  Status op##_kernel(const Params& params, const ExecutionContext& context); \
  }                                                                          \
  Status op(const Params& params, const ExecutionContext& context) {         \
    switch (cpu_isa()) {                                                     \
      case CpuIsa::avx512:                                                   \
        return isa_avx512::op##_kernel(params, context);                     \
      case CpuIsa::avx2:                                                     \
        return isa_avx2::op##_kernel(params, context);                       \
      default:                                                               \
        return isa_baseline::op##_kernel(params, context);                   \
    }                                                                        \
  }                                                                          \
  }
#else
#define TOKENWEAVE_CPU_DISPATCH(op, Params)                          \
  namespace tokenweave::inline TOKENWEAVE_BACKEND {                  \
  Status op(const Params& params, const ExecutionContext& context) { \
    return isa_baseline::op##_kernel(params, context);               \
  }                                                                  \
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
