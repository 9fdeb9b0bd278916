// Kernels that reach every rank through one multicast address: sums, broadcasts, and an all-reduce with every order
// right and wrong.
#pragma once

#include "core/numeric.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels {

using arch::Scope;
using arch::Vec16;

template <class T>
TW_KERNEL void load_add(const Vec16* multicast, Vec16* out) {
  const int i = arch::thread_index();
  out[i] = arch::multimem_load_add<T>(multicast + i);
}

TW_KERNEL void broadcast(const Vec16* in, Vec16* multicast) {
  const int i = arch::thread_index();
  arch::multimem_store(multicast + i, in[i]);
}

// Many threads count at once: no increment may be lost on any rank.
TW_KERNEL void count(uint64_t* multicast, int32_t rounds) {
  for (int round = 0; round < rounds; ++round) arch::multimem_add_release(multicast, uint64_t{1} << 32 | 1u);
}

// A thread loads through the multicast address what it has stored through the ranks' own, and the other way round.
TW_KERNEL void read_own_stores(float* ranks0, float* ranks1, Vec16* multicast, uint32_t* errors) {
  const int i = arch::thread_index();
  Vec16* mine[2] = {reinterpret_cast<Vec16*>(ranks0) + i, reinterpret_cast<Vec16*>(ranks1) + i};
  const Vec16 one{{0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u}};
  arch::store_streaming(mine[0], one);
  arch::store_streaming(mine[1], one);
  const Vec16 two = arch::multimem_load_add<float>(multicast + i);
  arch::multimem_store(multicast + i, two);
  const Vec16 first = arch::load_streaming(mine[0]), second = arch::load_streaming(mine[1]);
  uint32_t wrong = 0;
  for (int word = 0; word < 4; ++word) wrong += first.words[word] != 0x40000000u || second.words[word] != 0x40000000u;
  if (wrong != 0) arch::add_relaxed<Scope::gpu>(errors, wrong);
}

enum class Reach : int32_t { store, add };

// Block 0 counts two ranks up; block 1 sees which of them was ever ahead of the other: bit 0 for rank 0, bit 1 for rank
// 1. It looks with acquire loads, which are never stale, and at the one that may be ahead first.
TW_KERNEL void watch(uint64_t* rank0, uint64_t* rank1, uint64_t* multicast, uint32_t* ahead, Reach reach) {
  constexpr uint32_t kSteps = 400;
  if (blockIdx.x == 0) {
    for (uint32_t step = 1; step <= kSteps; ++step) {
      if (reach == Reach::store) arch::multimem_store(reinterpret_cast<Vec16*>(multicast), Vec16{{step, 0, 0, 0}});
      if (reach == Reach::add) arch::multimem_add_release(multicast, 1);
    }
    return;
  }
  uint32_t seen = 0;
  for (uint32_t step = 0; step < 2 * kSteps; ++step) {
    if (arch::load_acquire<Scope::sys>(rank0) > arch::load_acquire<Scope::sys>(rank1)) seen |= 1;
    if (arch::load_acquire<Scope::sys>(rank1) > arch::load_acquire<Scope::sys>(rank0)) seen |= 2;
  }
  *ahead = seen;
}

// Where the order of the all-reduce below is broken.
enum class Break : int32_t {
  nothing,
  fence_and_relaxed_signals,  // correct too
  entry_release,
  entry_acquire,
  exit_release,
  exit_acquire,
  exit_barrier,
};

constexpr int kMostRanks = 8;
struct MultimemPeers {
  Vec16* buffer[kMostRanks];
  uint64_t* pad[kMostRanks];  // a counter of arrivals for the entry, one for the exit
  Vec16* multicast_buffer;
  uint64_t* multicast_pad;
  int32_t rank, num_ranks;
};

// Thread 0 tells every rank that this one has come, and waits until all have; false: somebody did not come in time.
TW_DEVICE bool meet_ranks(const MultimemPeers& peers, int word, bool release, bool acquire) {
  if (release) {
    arch::multimem_add_release(peers.multicast_pad + word, 1);
  } else {
    for (int rank = 0; rank < peers.num_ranks; ++rank) arch::add_relaxed<Scope::sys>(peers.pad[rank] + word, 1);
  }
  const uint64_t* mine = peers.pad[peers.rank] + word;
  const uint64_t all = static_cast<uint64_t>(peers.num_ranks);
  return arch::wait_until(
      [&] { return (acquire ? arch::load_acquire<Scope::sys>(mine) : arch::load_relaxed<Scope::sys>(mine)) == all; },
      arch::globaltimer_ns() + 1'000'000'000u);
}

// Two-shot: each rank writes its buffer, sums its share of all buffers, broadcasts the sum, and reads the whole result.
// One block, as many threads as there are 16-byte pieces.
TW_KERNEL void multimem_all_reduce(MultimemPeers peers, const Vec16* in, Vec16* out, uint32_t* ok, Break what) {
  const int i = arch::thread_index();
  const bool fence = what == Break::fence_and_relaxed_signals;
  Vec16* mine = peers.buffer[peers.rank] + i;
  arch::store_streaming(mine, in[i]);
  arch::sync_block();
  if (i == 0) {
    if (fence) arch::fence_acq_rel<Scope::sys>();
    if (!meet_ranks(peers, 0, what != Break::entry_release && !fence, what != Break::entry_acquire && !fence)) *ok = 0;
    if (fence) arch::fence_acq_rel<Scope::sys>();
  }
  arch::sync_block();
  if (i % peers.num_ranks == peers.rank) {
    arch::multimem_store(peers.multicast_buffer + i, arch::multimem_load_add<float>(peers.multicast_buffer + i));
  }
  if (what != Break::exit_barrier) arch::sync_block();
  if (i == 0) {
    if (fence) arch::fence_acq_rel<Scope::sys>();
    if (!meet_ranks(peers, 1, what != Break::exit_release && !fence, what != Break::exit_acquire && !fence)) *ok = 0;
    if (fence) arch::fence_acq_rel<Scope::sys>();
  }
  arch::sync_block();
  out[i] = arch::load_streaming(mine);
}

enum class Misuse : int32_t {
  none,
  load_streaming,
  store_streaming,
  load_relaxed,
  load_acquire,
  store_relaxed,
  store_release,
  cas,
  add,
  multimem_load,
  multimem_store,
  multimem_add,
};

// Does one thing with one address.
TW_KERNEL void misuse(Vec16* address, Misuse what) {
  if (arch::thread_index() != 3) return;
  const Vec16 zero{{0, 0, 0, 0}};
  auto* word = reinterpret_cast<uint64_t*>(address);
  if (what == Misuse::load_streaming) arch::load_streaming(address);
  if (what == Misuse::store_streaming) arch::store_streaming(address, zero);
  if (what == Misuse::load_relaxed) arch::load_relaxed<Scope::sys>(word);
  if (what == Misuse::load_acquire) arch::load_acquire<Scope::sys>(word);
  if (what == Misuse::store_relaxed) arch::store_relaxed<Scope::sys>(word, 0);
  if (what == Misuse::store_release) arch::store_release<Scope::sys>(word, 0);
  if (what == Misuse::cas) arch::cas_relaxed<Scope::sys>(word, 0, 0);
  if (what == Misuse::add) arch::add_relaxed<Scope::sys>(word, 0);
  if (what == Misuse::multimem_load) arch::multimem_load_add<float>(address);
  if (what == Misuse::multimem_store) arch::multimem_store(address, zero);
  if (what == Misuse::multimem_add) arch::multimem_add_release(word, 0);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::test_kernels
