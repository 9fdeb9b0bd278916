// Kernels with faults in their barriers, exchanges and shared memory, each beside its correct twin.
#pragma once

#include "core/arch.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

struct ReverseShared {
  arch::Array<float, 1024> values;
};

enum class Barriers : int32_t { both, not_after_write, not_after_read };

// Reverses each block's part of the array `rounds` times through shared memory.
TW_KERNEL void reverse(const float* in, float* out, int32_t rounds, Barriers barriers) {
  auto& shared = arch::shared<ReverseShared>();
  const int n = static_cast<int>(blockDim.x), i = arch::thread_index();
  const int64_t base = int64_t{blockIdx.x} * n;
  float value = in[base + i];
  for (int round = 0; round < rounds; ++round) {
    shared.values[i] = value;
    if (barriers != Barriers::not_after_write) arch::sync_block();
    value = shared.values[n - 1 - i];
    if (barriers != Barriers::not_after_read) arch::sync_block();
  }
  out[base + i] = value;
}

enum class BarrierFault : int32_t { none, divergent, exited };

TW_KERNEL void barrier_fault(BarrierFault fault) {
  const int i = arch::thread_index();
  if (fault == BarrierFault::exited && i == 7) return;
  if (fault == BarrierFault::divergent && i >= 40) {
    arch::sync_block();
  } else {
    arch::sync_block();
  }
}

enum class SharedFault : int32_t { none, out_of_range, negative, wild };

TW_KERNEL void shared_fault(SharedFault fault) {
  auto& shared = arch::shared<ReverseShared>();
  const int i = arch::thread_index();
  shared.values[i] = 1.0f;
  if (i != 5) return;
  if (fault == SharedFault::out_of_range) shared.values[1019 + i] = 1.0f;
  if (fault == SharedFault::negative) shared.values[i - 6] = 1.0f;
  if (fault == SharedFault::wild) *(static_cast<float*>(static_cast<void*>(&shared)) + 1024) = 1.0f;  // by raw pointer
}

enum class WarpFault : int32_t {
  none,
  halves,  // correct: two half warps, each with its own mask
  lane_not_in_own_mask,
  masks_disagree,
  kinds_disagree,
  sites_disagree,
  lane_exited,
  lane_at_barrier,
  source_not_in_mask,
};

TW_KERNEL void warp_fault(uint32_t* out, WarpFault fault) {
  const int i = arch::thread_index();
  const uint32_t lane = static_cast<uint32_t>(arch::lane_index());
  uint32_t mask = arch::kFullWarp;
  uint32_t value = lane;
  if (fault == WarpFault::halves || fault == WarpFault::source_not_in_mask)
    mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (fault == WarpFault::lane_not_in_own_mask && lane == 3) mask = ~(1u << 3);
  if (fault == WarpFault::masks_disagree && lane >= 30) mask = 0xc0000001u;
  if (fault == WarpFault::lane_exited && lane == 9) return;
  if (fault == WarpFault::lane_at_barrier && i == 9) arch::sync_block();
  if (fault == WarpFault::kinds_disagree && lane == 4) {
    value = arch::ballot(true, mask);
  } else if (fault == WarpFault::sites_disagree && lane == 4) {
    value = arch::shuffle_xor(value, 1u, mask);
  } else if (fault == WarpFault::source_not_in_mask) {
    value = arch::shuffle(value, 20u, mask);
  } else {
    value = arch::shuffle_xor(value, 1u, mask);
  }
  out[i] = value;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
