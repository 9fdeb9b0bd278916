// Every machine instruction our kernels use by name, one small function each, with its host twin beside it. nvcc sees
// the PTX; every other compiler sees the emulator (simt/simt.h). A kernel that uses only this file and plain C++ runs
// on both. Two rules make the twin able to find faults: shared memory comes from arch::shared<Struct>() with
// arch::Array members (bounds-checked when emulated), and waiting for memory is arch::wait_until(...), never a loop of
// one's own.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define TW_DEVICE __device__ __forceinline__
#define TW_HOST_DEVICE __host__ __device__ __forceinline__
#define TW_MEMBER __device__ __forceinline__
#define TW_KERNEL __global__
#define TW_UNROLL_4 _Pragma("unroll")
#else
#include <bit>
#include <cmath>
#include <cstring>

#include "simt/simt.h"
// static: an always-inlined copy per file, so that code built for another instruction set is never merged in.
#define TW_DEVICE static inline __attribute__((always_inline))
#define TW_HOST_DEVICE static inline __attribute__((always_inline))
#define TW_MEMBER __attribute__((always_inline)) inline
#define TW_KERNEL
#define TW_UNROLL_4 _Pragma("GCC unroll 4")  // of a loop that "unroll" alone leaves to the compiler, which leaves it
#define __launch_bounds__(...)
#define threadIdx (::simt::current->thread_idx)
#define blockIdx (::simt::current->block_idx)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)
#endif

// The call site, for the emulator's reports; costs nothing on a GPU, where the arguments are unused.
#define TW_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define TW_HERE (::simt::Site{site_file, site_line})

namespace tokenweave::inline TOKENWEAVE_BACKEND {
struct bf16;  // numeric.cuh, which stands above this file
struct fp16;
#if !defined(__CUDACC__)
template <class T>
TW_HOST_DEVICE T from_float(float value);
#endif
}  // namespace tokenweave::inline TOKENWEAVE_BACKEND

namespace tokenweave::inline TOKENWEAVE_BACKEND::arch {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// Linear index in the block, x fastest, and its split into warp and lane.
TW_DEVICE int thread_index() { return static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y); }
TW_DEVICE int lane_index() { return thread_index() % kWarpSize; }
TW_DEVICE int warp_index() { return thread_index() / kWarpSize; }

// ---------------------------------------------------------------------------------------------------- barriers, votes

TW_DEVICE void sync_block([[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.sync 0;" ::: "memory");
#else
  ::simt::sync_block(TW_HERE);
#endif
}

TW_DEVICE void sync_warp(uint32_t mask = kFullWarp, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
#else
  ::simt::sync_warp(mask, TW_HERE);
#endif
}

#if defined(__CUDACC__)
// Shuffles move 4-byte values; T may be any trivially copyable type of 4 bytes.
#define TW_SHUFFLE(name, ptx, clamp, kind)                                          \
  template <class T>                                                                \
  TW_DEVICE T name(T value, uint32_t operand, uint32_t mask = kFullWarp, TW_SITE) { \
    static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);               \
    uint32_t bits, result;                                                          \
    __builtin_memcpy(&bits, &value, 4);                                             \
    asm volatile("shfl.sync." ptx ".b32 %0, %1, %2, %3, %4;"                        \
                 : "=r"(result)                                                     \
                 : "r"(bits), "r"(operand), "n"(clamp), "r"(mask));                 \
    __builtin_memcpy(&value, &result, 4);                                           \
    return value;                                                                   \
  }
#else
#define TW_SHUFFLE(name, ptx, clamp, kind)                                                                  \
  template <class T>                                                                                        \
  TW_DEVICE T name(T value, uint32_t operand, uint32_t mask = kFullWarp, TW_SITE) {                         \
    static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);                                       \
    return std::bit_cast<T>(static_cast<uint32_t>(                                                          \
        ::simt::exchange(::simt::Exchange::kind, mask, std::bit_cast<uint32_t>(value), operand, TW_HERE))); \
  }
#endif
TW_SHUFFLE(shuffle, "idx", 0x1f, shuffle)             // from lane `operand`
TW_SHUFFLE(shuffle_xor, "bfly", 0x1f, shuffle_xor)    // from lane ^ operand
TW_SHUFFLE(shuffle_up, "up", 0x00, shuffle_up)        // from lane - operand, own value below it
TW_SHUFFLE(shuffle_down, "down", 0x1f, shuffle_down)  // from lane + operand, own value above it
#undef TW_SHUFFLE

TW_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kFullWarp, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  uint32_t result;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, %2; }"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result;
#else
  return static_cast<uint32_t>(::simt::exchange(::simt::Exchange::ballot, mask, predicate, 0, TW_HERE));
#endif
}

TW_DEVICE bool any(bool predicate, uint32_t mask = kFullWarp, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  uint32_t result;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, %2; selp.u32 %0, 1, 0, q; }"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
#else
  return ::simt::exchange(::simt::Exchange::any, mask, predicate, 0, TW_HERE) != 0;
#endif
}

TW_DEVICE bool all(bool predicate, uint32_t mask = kFullWarp, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  uint32_t result;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.all.pred q, p, %2; selp.u32 %0, 1, 0, q; }"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
#else
  return ::simt::exchange(::simt::Exchange::all, mask, predicate, 0, TW_HERE) != 0;
#endif
}

// ------------------------------------------------------------------------------------------------------ shared memory

// A fixed array inside a shared struct; an index out of range is a report when emulated and unchecked on a GPU.
template <class T, int kLength>
struct Array {
  T values[kLength];

#if defined(__CUDACC__)
  TW_MEMBER T& operator[](int index) { return values[index]; }
  TW_MEMBER const T& operator[](int index) const { return values[index]; }
#else
  // A conversion, because operator[] can have no defaulted argument: it catches the line that indexes.
  struct Index {
    TW_MEMBER Index(int64_t index, TW_SITE) : value(index) {
      if (index < 0 || index >= kLength) {
        ::simt::fault(TW_HERE, "index %lld is outside a shared array of %d elements", static_cast<long long>(index),
                      kLength);
      }
    }
    int64_t value;
  };
  TW_MEMBER T& operator[](Index index) { return values[index.value]; }
  TW_MEMBER const T& operator[](Index index) const { return values[index.value]; }
#endif
};

// The block's one shared struct. Its size is the launch's shared_bytes; contents are undefined at kernel start.
template <class Struct>
TW_DEVICE Struct& shared([[maybe_unused]] TW_SITE) {
  static_assert(std::is_trivially_destructible_v<Struct> && alignof(Struct) <= 128);
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Struct*>(dynamic_shared_memory);
#else
  return *static_cast<Struct*>(::simt::shared_memory(sizeof(Struct), TW_HERE));
#endif
}

// ------------------------------------------------------------------------------------------------------ global memory

struct alignas(16) Vec16 {
  uint32_t words[4];
};

// 16 bytes that this kernel reads once: not kept in L1, ordinary in L2, where the producer may just have left them.
TW_DEVICE Vec16 load_streaming(const Vec16* address, [[maybe_unused]] TW_SITE) {
  Vec16 v;
#if defined(__CUDACC__)
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(address)
               : "memory");
#else
  if (::simt::all_memory_plain) return *address;
  ::simt::load(&v, address, 16, ::simt::Order::weak, ::simt::Scope::gpu, TW_HERE);
#endif
  return v;
}

// 16 bytes that this kernel does not read again; the next kernel finds them in L2.
TW_DEVICE void store_streaming(Vec16* address, const Vec16& v, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.words[0]),
               "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
#else
  if (::simt::all_memory_plain) {
    *address = v;
    return;
  }
  ::simt::store(address, &v, 16, ::simt::Order::weak, ::simt::Scope::gpu, TW_HERE);
#endif
}

enum class Scope { gpu, sys };
#if !defined(__CUDACC__)
template <Scope scope>
inline constexpr ::simt::Scope kTwinScope = scope == Scope::gpu ? ::simt::Scope::gpu : ::simt::Scope::sys;
#endif

// load_relaxed, load_acquire, store_relaxed, store_release: one word of 4 or 8 bytes, at gpu or sys scope.
#if defined(__CUDACC__)
#define TW_LOAD(order)                                                                                \
  template <Scope scope, class T>                                                                     \
  TW_DEVICE T load_##order(const T* address, TW_SITE) {                                               \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                        \
    T value;                                                                                          \
    if constexpr (sizeof(T) == 4 && scope == Scope::gpu)                                              \
      asm volatile("ld." #order ".gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
    else if constexpr (sizeof(T) == 4)                                                                \
      asm volatile("ld." #order ".sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
    else if constexpr (scope == Scope::gpu)                                                           \
      asm volatile("ld." #order ".gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
    else                                                                                              \
      asm volatile("ld." #order ".sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
    return value;                                                                                     \
  }
#define TW_STORE(order)                                                                             \
  template <Scope scope, class T>                                                                   \
  TW_DEVICE void store_##order(T* address, std::type_identity_t<T> value, TW_SITE) {                \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                      \
    if constexpr (sizeof(T) == 4 && scope == Scope::gpu)                                            \
      asm volatile("st." #order ".gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
    else if constexpr (sizeof(T) == 4)                                                              \
      asm volatile("st." #order ".sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
    else if constexpr (scope == Scope::gpu)                                                         \
      asm volatile("st." #order ".gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
    else                                                                                            \
      asm volatile("st." #order ".sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
  }
#else
#define TW_LOAD(order)                                                                          \
  template <Scope scope, class T>                                                               \
  TW_DEVICE T load_##order(const T* address, TW_SITE) {                                         \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                  \
    T value;                                                                                    \
    ::simt::load(&value, address, sizeof(T), ::simt::Order::order, kTwinScope<scope>, TW_HERE); \
    return value;                                                                               \
  }
#define TW_STORE(order)                                                                          \
  template <Scope scope, class T>                                                                \
  TW_DEVICE void store_##order(T* address, std::type_identity_t<T> value, TW_SITE) {             \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                   \
    ::simt::store(address, &value, sizeof(T), ::simt::Order::order, kTwinScope<scope>, TW_HERE); \
  }
#endif
TW_LOAD(relaxed)
TW_LOAD(acquire)
TW_STORE(relaxed)
TW_STORE(release)
#undef TW_LOAD
#undef TW_STORE

// cas_{relaxed,acquire,release,acq_rel} and add_{...}: return the word's value before the operation.
#if defined(__CUDACC__)
#define TW_ATOMIC(order)                                                                                            \
  template <Scope scope, class T>                                                                                   \
  TW_DEVICE T cas_##order(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired, TW_SITE) { \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                                      \
    T old;                                                                                                          \
    if constexpr (sizeof(T) == 4 && scope == Scope::gpu)                                                            \
      asm volatile("atom." #order ".gpu.global.cas.b32 %0, [%1], %2, %3;"                                           \
                   : "=r"(old)                                                                                      \
                   : "l"(address), "r"(expected), "r"(desired)                                                      \
                   : "memory");                                                                                     \
    else if constexpr (sizeof(T) == 4)                                                                              \
      asm volatile("atom." #order ".sys.global.cas.b32 %0, [%1], %2, %3;"                                           \
                   : "=r"(old)                                                                                      \
                   : "l"(address), "r"(expected), "r"(desired)                                                      \
                   : "memory");                                                                                     \
    else if constexpr (scope == Scope::gpu)                                                                         \
      asm volatile("atom." #order ".gpu.global.cas.b64 %0, [%1], %2, %3;"                                           \
                   : "=l"(old)                                                                                      \
                   : "l"(address), "l"(expected), "l"(desired)                                                      \
                   : "memory");                                                                                     \
    else                                                                                                            \
      asm volatile("atom." #order ".sys.global.cas.b64 %0, [%1], %2, %3;"                                           \
                   : "=l"(old)                                                                                      \
                   : "l"(address), "l"(expected), "l"(desired)                                                      \
                   : "memory");                                                                                     \
    return old;                                                                                                     \
  }                                                                                                                 \
  template <Scope scope, class T>                                                                                   \
  TW_DEVICE T add_##order(T* address, std::type_identity_t<T> value, TW_SITE) {                                     \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                                      \
    T old;                                                                                                          \
    if constexpr (sizeof(T) == 4 && scope == Scope::gpu)                                                            \
      asm volatile("atom." #order ".gpu.global.add.u32 %0, [%1], %2;"                                               \
                   : "=r"(old)                                                                                      \
                   : "l"(address), "r"(value)                                                                       \
                   : "memory");                                                                                     \
    else if constexpr (sizeof(T) == 4)                                                                              \
      asm volatile("atom." #order ".sys.global.add.u32 %0, [%1], %2;"                                               \
                   : "=r"(old)                                                                                      \
                   : "l"(address), "r"(value)                                                                       \
                   : "memory");                                                                                     \
    else if constexpr (scope == Scope::gpu)                                                                         \
      asm volatile("atom." #order ".gpu.global.add.u64 %0, [%1], %2;"                                               \
                   : "=l"(old)                                                                                      \
                   : "l"(address), "l"(value)                                                                       \
                   : "memory");                                                                                     \
    else                                                                                                            \
      asm volatile("atom." #order ".sys.global.add.u64 %0, [%1], %2;"                                               \
                   : "=l"(old)                                                                                      \
                   : "l"(address), "l"(value)                                                                       \
                   : "memory");                                                                                     \
    return old;                                                                                                     \
  }
#else
#define TW_ATOMIC(order)                                                                                            \
  template <Scope scope, class T>                                                                                   \
  TW_DEVICE T cas_##order(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired, TW_SITE) { \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                                      \
    return static_cast<T>(::simt::compare_and_swap(address, sizeof(T), expected, desired, ::simt::Order::order,     \
                                                   kTwinScope<scope>, TW_HERE));                                    \
  }                                                                                                                 \
  template <Scope scope, class T>                                                                                   \
  TW_DEVICE T add_##order(T* address, std::type_identity_t<T> value, TW_SITE) {                                     \
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);                                      \
    return static_cast<T>(                                                                                          \
        ::simt::fetch_add(address, sizeof(T), value, ::simt::Order::order, kTwinScope<scope>, TW_HERE));            \
  }
#endif
TW_ATOMIC(relaxed)
TW_ATOMIC(acquire)
TW_ATOMIC(release)
TW_ATOMIC(acq_rel)
#undef TW_ATOMIC

// Adds to a word of the block's shared memory; what was there is not returned.
TW_DEVICE void add_shared(uint32_t& word, uint32_t value) {
#if defined(__CUDACC__)
  asm volatile(
      "red.relaxed.cta.shared::cta.add.u32 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&word))),
      "r"(value)
      : "memory");
#else
  word += value;  // fibers switch at barriers and waits only
#endif
}

template <Scope scope>
TW_DEVICE void fence_acq_rel([[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  if constexpr (scope == Scope::gpu)
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  else
    asm volatile("fence.acq_rel.sys;" ::: "memory");
#else
  ::simt::fence(kTwinScope<scope>, TW_HERE);
#endif
}

// ----------------------------------------------------------------------------------------------------------- multicast
// A multicast address stands for the same bytes of every rank's buffer: the NVLink switch adds what it loads and copies
// what it stores. Only these instructions may touch one. The order in which ranks are added or reached is unspecified.

#if !defined(__CUDACC__)
// What the switch does with the ranks' pieces: sums in fp32, one rounding, by numeric.cuh's conversions.
template <class T>
static void add_pieces(void* sum, const void* pieces, int num_pieces) {
  constexpr int kElements = 16 / sizeof(T);
  float sums[kElements];
  for (float& sum_of_one : sums) sum_of_one = -0.0f;  // the zero that changes nothing it is added to
  for (int piece = 0; piece < num_pieces; ++piece) {
    T elements[kElements];
    std::memcpy(elements, static_cast<const char*>(pieces) + 16 * piece, 16);
    for (int i = 0; i < kElements; ++i) {
      float value;
      if constexpr (std::is_same_v<T, float>) {
        value = elements[i];
      } else {
        value = to_float(elements[i]);
      }
      sums[i] += value;
    }
  }
  T results[kElements];
  for (int i = 0; i < kElements; ++i) results[i] = from_float<T>(sums[i]);
  std::memcpy(sum, results, 16);
}
#endif

// 16 bytes of elements T (bf16, fp16 or float), summed over all ranks in fp32 and rounded to T.
template <class T>
TW_DEVICE Vec16 multimem_load_add(const Vec16* multicast, [[maybe_unused]] TW_SITE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16> || std::is_same_v<T, float>);
  Vec16 v;
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(multicast)
                 : "memory");
  else if constexpr (std::is_same_v<T, fp16>)
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(multicast)
                 : "memory");
  else
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(multicast)
                 : "memory");
#else
  ::simt::multimem_load_add(&v, multicast, &add_pieces<T>, TW_HERE);
#endif
  return v;
}

// The same 16 bytes to every rank.
TW_DEVICE void multimem_store(Vec16* multicast, const Vec16& v, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(multicast), "r"(v.words[0]),
               "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
#else
  ::simt::multimem_store(multicast, &v, TW_HERE);
#endif
}

// Adds to the word of every rank, after everything that this thread has stored or seen.
TW_DEVICE void multimem_add_release(uint64_t* multicast, uint64_t value, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("multimem.red.release.sys.global.add.u64 [%0], %1;" ::"l"(multicast), "l"(value) : "memory");
#else
  ::simt::multimem_add_release(multicast, value, TW_HERE);
#endif
}

// --------------------------------------------------------------------------------------------------------------
// waiting

TW_DEVICE uint64_t globaltimer_ns() {
#if defined(__CUDACC__)
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#else
  return ::simt::now_ns();
#endif
}

TW_DEVICE void nanosleep(uint32_t duration_ns, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  asm volatile("nanosleep.u32 %0;" ::"r"(duration_ns));
#else
  ::simt::sleep_ns(duration_ns, TW_HERE);
#endif
}

// Polls until poll() is true (returns true) or globaltimer_ns() passes deadline_ns (returns false: the caller must
// leave by a path that writes no result). poll() must read through load_relaxed, load_acquire or an atomic.
template <class Poll>
TW_DEVICE bool wait_until(Poll poll, uint64_t deadline_ns, [[maybe_unused]] TW_SITE) {
#if defined(__CUDACC__)
  for (uint32_t attempt = 0;; ++attempt) {
    if (poll()) return true;
    if (globaltimer_ns() > deadline_ns) return false;
    if (attempt > 64) nanosleep(100);  // stop loading the link once it is clear that the wait is long
  }
#else
  return ::simt::wait([](void* argument) { return static_cast<bool>((*static_cast<Poll*>(argument))()); }, &poll,
                      deadline_ns, TW_HERE);
#endif
}

// ---------------------------------------------------------------------------------------------------------- arithmetic
// Correctly rounded on both sides, so that an emulated kernel and a compiled one give the same bits.

TW_DEVICE float divide(float a, float b) {
#if defined(__CUDACC__)
  float result;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a / b;
#endif
}

TW_DEVICE float square_root(float a) {
#if defined(__CUDACC__)
  float result;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return std::sqrt(a);
#endif
}

TW_DEVICE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDACC__)
  float result;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
#else
  return std::fma(a, b, c);
#endif
}

TW_DEVICE double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDACC__)
  double result;
  asm("fma.rn.f64 %0, %1, %2, %3;" : "=d"(result) : "d"(a), "d"(b), "d"(c));
  return result;
#else
  return std::fma(a, b, c);
#endif
}

// The place of the lowest set bit of a word that is not 0.
TW_DEVICE int lowest_bit(uint32_t word) {
#if defined(__CUDACC__)
  uint32_t reversed, place;
  asm("brev.b32 %0, %1;" : "=r"(reversed) : "r"(word));
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(place) : "r"(reversed));
  return static_cast<int>(place);
#else
  return __builtin_ctz(word);
#endif
}

// The larger; the other one if one is NaN.
TW_DEVICE float maximum(float a, float b) {
#if defined(__CUDACC__)
  float result;
  asm("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || b != b ? a : b;
#endif
}

// The smaller; the other one if one is NaN.
TW_DEVICE float minimum(float a, float b) {
#if defined(__CUDACC__)
  float result;
  asm("min.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b || b != b ? a : b;
#endif
}

TW_DEVICE float ceiling(float a) {
#if defined(__CUDACC__)
  float result;
  asm("cvt.rpi.f32.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return std::ceil(a);
#endif
}

// The largest float that is not above a.
TW_DEVICE float round_down(double a) {
#if defined(__CUDACC__)
  float result;
  asm("cvt.rm.f32.f64 %0, %1;" : "=f"(result) : "d"(a));
  return result;
#else
  const float nearest = static_cast<float>(a);
  return static_cast<double>(nearest) > a ? std::nextafter(nearest, -__builtin_inff()) : nearest;
#endif
}

// Not correctly rounded: one instruction on a GPU (relative error of exp2 and absolute error of log2 about 2^-22;
// results below the smallest normal number are 0), the C library on a host. Bits differ between the two.
TW_DEVICE float exp2(float a) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return std::exp2(a);
#endif
}

TW_DEVICE float log2(float a) {
#if defined(__CUDACC__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return std::log2(a);
#endif
}

// e^a to the last place or so: CUDA's library function, which nvcc knows by this name.
TW_DEVICE double exponential(double a) { return ::exp(a); }

// Conversions of the 16-bit formats; their host twins are the portable code in numeric.cuh, which CPU kernels share.
#if defined(__CUDACC__)
TW_DEVICE uint16_t convert_to_bf16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
TW_DEVICE uint16_t convert_to_fp16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
TW_DEVICE float convert_from_fp16_bits(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::arch
