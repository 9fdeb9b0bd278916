// Kernels in which threads, blocks and ranks signal each other through memory, with every order right and wrong.
#pragma once

#include "core/arch.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using arch::Scope;
using arch::Vec16;

// How a producer makes its data visible before the flag.
enum class Publish : int32_t {
  release_sys,
  relaxed,  // wrong
  fence_then_relaxed,
  release_gpu,  // wrong between ranks
  add_release,
  add_relaxed,  // wrong
  cas_release,
  cas_relaxed,              // wrong
  release_without_barrier,  // wrong: the other threads' data is not ordered before it
  release_after_sync_warp,  // for one warp
};

// Each thread writes its 16 bytes of data, thread 0 then raises the flag.
TW_KERNEL void produce(Vec16* data, uint32_t* flag, uint32_t value, Publish publish) {
  const uint32_t i = static_cast<uint32_t>(arch::thread_index());
  arch::store_streaming(data + i, Vec16{{value, value + i, value, value}});
  if (publish == Publish::release_after_sync_warp) {
    arch::sync_warp();
  } else if (publish != Publish::release_without_barrier) {
    arch::sync_block();
  }
  if (i != 0) return;
  if (publish == Publish::fence_then_relaxed) arch::fence_acq_rel<Scope::sys>();
  if (publish == Publish::relaxed || publish == Publish::fence_then_relaxed) {
    arch::store_relaxed<Scope::sys>(flag, value);
  } else if (publish == Publish::release_gpu) {
    arch::store_release<Scope::gpu>(flag, value);
  } else if (publish == Publish::add_release) {
    arch::add_release<Scope::sys>(flag, value);
  } else if (publish == Publish::add_relaxed) {
    arch::add_relaxed<Scope::sys>(flag, value);
  } else if (publish == Publish::cas_release) {
    arch::cas_release<Scope::sys>(flag, 0u, value);
  } else if (publish == Publish::cas_relaxed) {
    arch::cas_relaxed<Scope::sys>(flag, 0u, value);
  } else {
    arch::store_release<Scope::sys>(flag, value);
  }
}

enum class Consume : int32_t {
  acquire_sys,
  relaxed,  // wrong
  relaxed_then_fence,
  acquire_gpu,  // wrong between ranks
  add_acquire,
  cas_acquire,
  cas_relaxed,  // wrong
};

// Thread 0 waits for the flag, a barrier passes it on, each thread sums its 16 bytes.
TW_KERNEL void consume(const Vec16* data, uint32_t* flag, uint32_t* out, uint32_t value, Consume how) {
  const int i = arch::thread_index();
  if (i == 0) {
    arch::wait_until(
        [&] {
          if (how == Consume::acquire_sys) return arch::load_acquire<Scope::sys>(flag) == value;
          if (how == Consume::acquire_gpu) return arch::load_acquire<Scope::gpu>(flag) == value;
          if (how == Consume::add_acquire) return arch::add_acquire<Scope::sys>(flag, 0u) == value;
          if (how == Consume::cas_acquire) return arch::cas_acquire<Scope::sys>(flag, value, value) == value;
          if (how == Consume::cas_relaxed) return arch::cas_relaxed<Scope::sys>(flag, value, value) == value;
          return arch::load_relaxed<Scope::sys>(flag) == value;
        },
        UINT64_MAX);
    if (how == Consume::relaxed_then_fence) arch::fence_acq_rel<Scope::sys>();
  }
  arch::sync_block();
  const Vec16 words = arch::load_streaming(data + i);
  out[i] = words.words[0] + words.words[1] + words.words[2] + words.words[3];
}

constexpr int kMaxRanks = 8;
struct Peers {
  uint32_t* buffer[kMaxRanks];  // [ranks][blocks * threads]: what rank r sends to this one stands in part r
  uint32_t* pad[kMaxRanks];     // [blocks][ranks] flags
};

// Every rank sends a number to every rank, block by block, signals, waits and sums: the shape of an all-reduce. One
// rank may be late by virtual time. False in `ok`: a deadline passed.
TW_KERNEL void all_to_all(Peers peers, uint32_t* out, uint32_t* ok, int32_t rank, int32_t num_ranks, uint32_t late_ns,
                          bool release, bool acquire) {
  const int i = arch::thread_index();
  const int64_t n = int64_t{gridDim.x} * blockDim.x, element = int64_t{blockIdx.x} * blockDim.x + i;
  if (late_ns > 0 && i == 0) arch::nanosleep(late_ns);
  arch::sync_block();
  for (int peer = 0; peer < num_ranks; ++peer) {
    uint32_t* slot = peers.buffer[peer] + rank * n + element;
    arch::store_relaxed<Scope::sys>(slot, static_cast<uint32_t>(element) + 1000u * static_cast<uint32_t>(rank));
  }
  arch::sync_block();
  bool arrived = true;
  if (i < num_ranks) {
    uint32_t* theirs = peers.pad[i] + blockIdx.x * num_ranks + rank;
    if (release) {
      arch::store_release<Scope::sys>(theirs, 1);
    } else {
      arch::store_relaxed<Scope::sys>(theirs, 1);
    }
    const uint32_t* mine = peers.pad[rank] + blockIdx.x * num_ranks + i;
    arrived = arch::wait_until(
        [&] { return (acquire ? arch::load_acquire<Scope::sys>(mine) : arch::load_relaxed<Scope::sys>(mine)) == 1; },
        arch::globaltimer_ns() + 1'000'000'000u);
    if (!arrived) *ok = 0;
  }
  arch::sync_block();
  uint32_t sum = 0;
  for (int peer = 0; peer < num_ranks; ++peer)
    sum += arch::load_relaxed<Scope::sys>(peers.buffer[rank] + peer * n + element);
  out[element] = sum;
}

enum class GridBarrier : int32_t { none, relaxed, ordered };

// Rounds of: write a cell, grid barrier, read the next block's cell, grid barrier.
TW_KERNEL void grid_barrier(uint32_t* cells, uint32_t* counter, uint32_t* out, int32_t rounds, GridBarrier barrier) {
  const uint32_t block = blockIdx.x, blocks = gridDim.x;
  uint32_t arrivals = 0, sum = 0;
  for (int round = 1; round <= rounds; ++round) {
    if (arch::thread_index() == 0) arch::store_relaxed<Scope::gpu>(cells + block, static_cast<uint32_t>(round));
    for (int phase = 0; phase < 2; ++phase) {
      arch::sync_block();
      arrivals += blocks;
      if (arch::thread_index() == 0 && barrier == GridBarrier::ordered) {
        arch::add_release<Scope::gpu>(counter, 1u);
        arch::wait_until([&] { return arch::load_acquire<Scope::gpu>(counter) >= arrivals; }, UINT64_MAX);
      }
      if (arch::thread_index() == 0 && barrier == GridBarrier::relaxed) {
        arch::add_relaxed<Scope::gpu>(counter, 1u);
        arch::wait_until([&] { return arch::load_relaxed<Scope::gpu>(counter) >= arrivals; }, UINT64_MAX);
      }
      arch::sync_block();
      if (phase == 0) sum += arch::load_relaxed<Scope::gpu>(cells + (block + 1) % blocks);
    }
  }
  if (arch::thread_index() == 0) out[block] = sum;
}

enum class Wait : int32_t {
  with_deadline,
  without_deadline,
  spin_load,
  spin_cas,
  spin_sleep,
  spin_deadlines,
  poll_meets
};

// Waits in several ways for a flag that nobody raises.
TW_KERNEL void wait_in_vain(uint32_t* flag, uint64_t* elapsed_ns, uint32_t* result, Wait how) {
  if (arch::thread_index() % 32 != 0) return;
  const uint64_t start = arch::globaltimer_ns();
  if (how == Wait::with_deadline || how == Wait::without_deadline) {
    *result = arch::wait_until([&] { return arch::load_acquire<Scope::sys>(flag) != 0; },
                               how == Wait::with_deadline ? start + 1'000'000'000u : UINT64_MAX);
    *elapsed_ns = arch::globaltimer_ns() - start;
  }
  if (how == Wait::spin_load) {
    while (arch::load_acquire<Scope::sys>(flag) == 0) {
    }
  }
  if (how == Wait::spin_cas) {
    while (arch::cas_acquire<Scope::sys>(flag, 1u, 0u) == 0) {
    }
  }
  if (how == Wait::spin_sleep) {
    while (arch::load_acquire<Scope::sys>(flag) == 0) arch::nanosleep(100);
  }
  if (how == Wait::spin_deadlines) {
    while (!arch::wait_until([&] { return arch::load_acquire<Scope::sys>(flag) != 0; }, arch::globaltimer_ns() + 100)) {
    }
  }
  if (how == Wait::poll_meets) {
    arch::wait_until([] { return arch::any(true); }, UINT64_MAX);
  }
}

// Each thread takes a ticket at each of its steps: the tickets are the schedule.
TW_KERNEL void record_schedule(uint32_t* counter, uint32_t* order, int32_t steps) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    order[arch::add_relaxed<Scope::gpu>(counter, 1u)] = thread;
    arch::sync_block();
  }
}

// A thread reads its own stores, whole and in parts, whether they are held back or not; counts what it got wrong.
TW_KERNEL void read_own_writes(Vec16* memory, uint32_t* errors, int32_t rounds) {
  Vec16* mine = memory + arch::thread_index();
  uint32_t* words = reinterpret_cast<uint32_t*>(mine);
  uint32_t wrong = 0;
  for (uint32_t round = 1; round <= static_cast<uint32_t>(rounds); ++round) {
    arch::store_streaming(mine, Vec16{{round, round, round, round}});
    arch::store_relaxed<Scope::sys>(words + 1, round + 100);
    arch::store_relaxed<Scope::gpu>(reinterpret_cast<uint64_t*>(words + 2),
                                    uint64_t{round + 300} << 32 | (round + 200));
    const Vec16 whole = arch::load_streaming(mine);
    wrong += whole.words[0] != round || whole.words[1] != round + 100;
    wrong += whole.words[2] != round + 200 || whole.words[3] != round + 300;
    wrong +=
        arch::load_relaxed<Scope::gpu>(reinterpret_cast<uint64_t*>(words)) != (uint64_t{round + 100} << 32 | round);
    wrong += arch::add_relaxed<Scope::gpu>(words + 3, 7u) != round + 300;
    wrong += arch::load_relaxed<Scope::sys>(words + 3) != round + 307;
  }
  if (wrong != 0) arch::add_relaxed<Scope::gpu>(errors, wrong);
}

// Block 0 counts a word up; the others read it again and again. It may be late, but must never go back: in one thread
// (block 1), or from one thread to the next over a barrier (block 2).
struct CoherenceShared {
  arch::Array<uint32_t, 64> newest;
};
TW_KERNEL void coherence(uint32_t* word, uint32_t* errors, int32_t rounds) {
  auto& shared = arch::shared<CoherenceShared>();
  const int i = arch::thread_index();
  uint32_t newest = 0, wrong = 0;
  for (uint32_t round = 1; round <= static_cast<uint32_t>(rounds); ++round) {
    if (blockIdx.x == 0 && i == 0) {
      arch::store_relaxed<Scope::sys>(word, round);
      arch::nanosleep(200);
    }
    if (blockIdx.x == 0) continue;
    const uint32_t value = arch::load_relaxed<Scope::sys>(word);
    wrong += value < newest;
    newest = value > newest ? value : newest;
    if (blockIdx.x == 1) {
      arch::nanosleep(50);
      continue;
    }
    shared.newest[i] = newest;
    arch::sync_block();
    for (int other = 0; other < 64; ++other) newest = shared.newest[other] > newest ? shared.newest[other] : newest;
    arch::sync_block();
  }
  if (wrong != 0) arch::add_relaxed<Scope::gpu>(errors, wrong);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
