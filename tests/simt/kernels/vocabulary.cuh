// One small kernel for each word of csrc/core, so that a test can compare it with Python.
#pragma once

#include "core/philox.cuh"
#include "core/reduce.cuh"
#include "core/vec.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

TW_KERNEL void warp_sums(const float* in, float* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  out[i] = warp_sum(in[i]);
}

TW_KERNEL void warp_sums_fp64(const double* in, double* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  out[i] = warp_sum(in[i]);
}

// The words of `in` counted by value in shared memory: out[block][value].
struct CountsStorage {
  arch::Array<uint32_t, 32> counts;
};
TW_KERNEL void count_shared(const uint32_t* in, uint32_t* out, int64_t n) {
  auto& storage = arch::shared<CountsStorage>();
  if (arch::thread_index() < 32) storage.counts[arch::thread_index()] = 0;
  arch::sync_block();
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index(); i < n; i += stride) {
    arch::add_shared(storage.counts[in[i]], 1);
  }
  arch::sync_block();
  if (arch::thread_index() < 32) out[32 * blockIdx.x + arch::thread_index()] = storage.counts[arch::thread_index()];
}

// Twice with one storage, so that its reuse is tested too: out[0][thread], out[1][thread].
TW_KERNEL void block_sums(const float* in, float* out) {
  auto& storage = arch::shared<BlockSumStorage>();
  const int64_t threads = int64_t{blockDim.x} * blockDim.y;
  const int64_t i = blockIdx.x * threads + arch::thread_index();
  out[i] = block_sum(in[i], storage);
  out[gridDim.x * threads + i] = block_sum(2.0f * in[i], storage);
}

// Pack i of `in` to pack i of `out`, through fp32.
template <class T>
TW_KERNEL void copy_packs(const T* in, T* out, float* unpacked, int64_t num_packs) {
  constexpr int kSize = kPackSize<T>;
  for (int64_t i = arch::thread_index(); i < num_packs; i += blockDim.x) {
    const Vec16 loaded = load_pack<T>(in + i * kSize);
    float values[kSize];
    unpack<T>(loaded, values);
    for (int k = 0; k < kSize; ++k) unpacked[i * kSize + k] = values[k];
    store_pack<T>(out + i * kSize, pack<T>(values));
  }
}

template <class T>
TW_KERNEL void set_element(uint32_t* words, int32_t place, float value) {
  if (arch::thread_index() != 0) return;
  Vec16 pack{{words[0], words[1], words[2], words[3]}};
  pack_set<T>(pack, place, value);
  for (int i = 0; i < 4; ++i) words[i] = pack.words[i];
}

TW_KERNEL void philox(const PhiloxBlock* counters, const uint32_t* keys, PhiloxBlock* out, float* uniforms, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  if (i >= n) return;
  out[i] = philox4x32_10(counters[i], keys[2 * i], keys[2 * i + 1]);
  uniforms[i] = uniform_from_bits(out[i].words[0]);
}

template <class T>
TW_KERNEL void widen(const T* in, float* out, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  if (i < n) out[i] = to_float(in[i]);
}

template <class T>
TW_KERNEL void narrow(const float* in, T* out, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  if (i < n) out[i] = from_float<T>(in[i]);
}

enum class WarpOp : int32_t { shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, any, all };

// Lane by lane: its value, its operand and the mask of the group it belongs to.
TW_KERNEL void warp_op(const uint32_t* values, const uint32_t* operands, const uint32_t* masks, uint32_t* out,
                       WarpOp op) {
  const int i = arch::thread_index();
  const uint32_t value = values[i], operand = operands[i], mask = masks[i];
  if (mask == 0) return;  // a lane in no group
  uint32_t result = 0;
  if (op == WarpOp::shuffle) result = arch::shuffle(value, operand, mask);
  if (op == WarpOp::shuffle_xor) result = arch::shuffle_xor(value, operand, mask);
  if (op == WarpOp::shuffle_up) result = arch::shuffle_up(value, operand, mask);
  if (op == WarpOp::shuffle_down) result = arch::shuffle_down(value, operand, mask);
  if (op == WarpOp::ballot) result = arch::ballot((value & 1) != 0, mask);
  if (op == WarpOp::any) result = arch::any((value & 1) != 0, mask);
  if (op == WarpOp::all) result = arch::all((value & 1) != 0, mask);
  out[i] = result;
}

enum class MemoryOp : int32_t {
  load_relaxed,
  load_acquire,
  store_relaxed,
  store_release,
  cas_relaxed,
  cas_acquire,
  cas_release,
  cas_acq_rel,
  add_relaxed,
  add_acquire,
  add_release,
  add_acq_rel,
};

template <arch::Scope scope, class T>
TW_DEVICE T memory_op(T* word, MemoryOp op, T a, T b) {
  switch (op) {
    case MemoryOp::load_relaxed:
      return arch::load_relaxed<scope>(word);
    case MemoryOp::load_acquire:
      return arch::load_acquire<scope>(word);
    case MemoryOp::store_relaxed:
      arch::store_relaxed<scope>(word, a);
      return 0;
    case MemoryOp::store_release:
      arch::store_release<scope>(word, a);
      return 0;
    case MemoryOp::cas_relaxed:
      return arch::cas_relaxed<scope>(word, a, b);
    case MemoryOp::cas_acquire:
      return arch::cas_acquire<scope>(word, a, b);
    case MemoryOp::cas_release:
      return arch::cas_release<scope>(word, a, b);
    case MemoryOp::cas_acq_rel:
      return arch::cas_acq_rel<scope>(word, a, b);
    case MemoryOp::add_relaxed:
      return arch::add_relaxed<scope>(word, a);
    case MemoryOp::add_acquire:
      return arch::add_acquire<scope>(word, a);
    case MemoryOp::add_release:
      return arch::add_release<scope>(word, a);
    default:
      return arch::add_acq_rel<scope>(word, a);
  }
}

// Step k does ops[k] with a[k], b[k] on words[which[k]] and writes what it returned.
template <class T>
TW_KERNEL void memory_ops(T* words, const int32_t* ops, const int32_t* which, const T* a, const T* b, T* results,
                          int32_t steps, bool sys_scope) {
  if (arch::thread_index() != 0) return;
  for (int k = 0; k < steps; ++k) {
    const auto op = static_cast<MemoryOp>(ops[k]);
    T* word = words + which[k];
    results[k] = sys_scope ? memory_op<arch::Scope::sys>(word, op, a[k], b[k])
                           : memory_op<arch::Scope::gpu>(word, op, a[k], b[k]);
  }
}

enum class Arithmetic : int32_t {
  divide,
  square_root,
  fused_multiply_add,
  maximum,
  minimum,
  ceiling,
  exp2,
  log2,
  round_down,
  lowest_bit,
};

TW_KERNEL void arithmetic(const float* a, const float* b, const float* c, float* out, int64_t n, Arithmetic op) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + arch::thread_index();
  if (i >= n) return;
  switch (op) {
    case Arithmetic::divide:
      out[i] = arch::divide(a[i], b[i]);
      break;
    case Arithmetic::square_root:
      out[i] = arch::square_root(a[i]);
      break;
    case Arithmetic::fused_multiply_add:
      out[i] = arch::fused_multiply_add(a[i], b[i], c[i]);
      break;
    case Arithmetic::maximum:
      out[i] = arch::maximum(a[i], b[i]);
      break;
    case Arithmetic::minimum:
      out[i] = arch::minimum(a[i], b[i]);
      break;
    case Arithmetic::ceiling:
      out[i] = arch::ceiling(a[i]);
      break;
    case Arithmetic::exp2:
      out[i] = arch::exp2(a[i]);
      break;
    case Arithmetic::log2:
      out[i] = arch::log2(a[i]);
      break;
    case Arithmetic::round_down:  // of a sum that fp32 cannot hold
      out[i] = arch::round_down(static_cast<double>(a[i]) + static_cast<double>(b[i]));
      break;
    case Arithmetic::lowest_bit:  // of a word that is not 0
      out[i] = static_cast<float>(arch::lowest_bit(bits_of(a[i]) | 0x80000000u));
      break;
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
