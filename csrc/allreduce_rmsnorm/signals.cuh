// How blocks of different ranks meet, and how they give up: the protocol of allreduce.cuh, apart from its arithmetic.
// Block b of a rank meets block b of every other rank, twice a call. At the entry each tells each what it came for
// (entry_word) and that its partial sums are written; at the exit that its share of the result is. A word is put with
// release at system scope after a block barrier, which makes it cumulative over the block's stores, and taken with
// acquire before one. Every slot has one writer and is reset by its reader. A put needs no look at the slot: whoever
// comes to the entry has seen the peers' exits, hence their resets of the entry slots, and the other way round.
#pragma once

#include "allreduce_rmsnorm/allreduce.h"
#include "core/arch.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

using arch::Scope;

// What a launch needs to know beside its parameters; ranks and blocks are told from each other by blockIdx alone.
struct Place {
  int rank;        // of the workspace
  int local_rank;  // of those that this process plays
  int block;       // of its rank's blocks
  int grid;        // blocks of one rank
};

// Word offsets in a pad. Slots of one block lie side by side: its first warp polls them in one or two cache lines.
TW_DEVICE int64_t slot_word(int channel, Stage stage, int block, int peer) {
  return kFirstChannelWord + channel * kDeviceChannelWords +
         (static_cast<int64_t>(stage) * kMaxBlocks + block) * kMaxWorldSize + peer;
}
// Multimem: one bit per rank that has come to the exit, added by all through the switch.
TW_DEVICE int64_t arrivals_word(int channel, int block) {
  return kFirstChannelWord + channel * kDeviceChannelWords + 2 * kMaxBlocks * kMaxWorldSize + block;
}
// Nonzero while a call runs on the channel.
TW_DEVICE int64_t busy_word(int channel, int block) { return arrivals_word(channel, block) + kMaxBlocks; }

// The first failure of the process goes into its record; every rank is told to give up.
TW_DEVICE void give_up(const AllreduceParams& p, const Place& place, Failure failure, Stage stage, int peer,
                       uint64_t expected, uint64_t got) {
  const Workspace& w = p.workspace;
  if (arch::cas_relaxed<Scope::gpu>(w.pad[w.rank] + kClaimWord, uint64_t{0}, uint64_t{1}) == 0) {
    arch::store_relaxed<Scope::sys>(w.record + kRecordCollective, static_cast<uint64_t>(p.collective));
    arch::store_relaxed<Scope::sys>(w.record + kRecordStage, static_cast<uint64_t>(stage));
    arch::store_relaxed<Scope::sys>(w.record + kRecordRank, static_cast<uint64_t>(place.rank));
    arch::store_relaxed<Scope::sys>(w.record + kRecordPeer, static_cast<uint64_t>(peer));
    arch::store_relaxed<Scope::sys>(w.record + kRecordBlock, static_cast<uint64_t>(place.block));
    arch::store_relaxed<Scope::sys>(w.record + kRecordChannel, static_cast<uint64_t>(p.channel));
    arch::store_relaxed<Scope::sys>(w.record + kRecordExpected, expected);
    arch::store_relaxed<Scope::sys>(w.record + kRecordGot, got);
    arch::store_relaxed<Scope::sys>(w.record + kRecordTimeoutNs, p.timeout_ns);
    arch::store_release<Scope::sys>(w.record + kRecordFailure, static_cast<uint64_t>(failure));
  }
  if (failure == Failure::aborted) return;  // who gave up first has told everybody
#pragma unroll 1
  for (int rank = 0; rank < w.world_size; ++rank) {
    arch::store_relaxed<Scope::sys>(w.pad[rank] + kAbortWord, abort_word(failure, place.rank, peer));
  }
}

// Every thread of the block calls it; false if the call has failed and the block must leave. The barriers inside order
// what the block stored before against the put, and what it loads after against the taking.
template <Transport kTransport>
TW_DEVICE bool meet_peers(const AllreduceParams& p, const Place& place, Stage stage, uint64_t word,
                          uint64_t deadline_ns, uint32_t& failed) {
  const Workspace& w = p.workspace;
  const int thread = arch::thread_index();
  if (thread == 0) failed = 0;
  arch::sync_block();
  if (thread < w.world_size) {
    const int peer = thread;
    uint64_t* own_pad = w.pad[place.rank];
    const bool counts = kTransport == Transport::multimem && stage == Stage::exit;
    uint64_t* taken =
        own_pad + (counts ? arrivals_word(p.channel, place.block) : slot_word(p.channel, stage, place.block, peer));
    uint64_t expected = word, got = 0, aborted = 0;
    if (!counts) {
      arch::store_release<Scope::sys>(w.pad[peer] + slot_word(p.channel, stage, place.block, place.rank), word);
    } else {
      expected = (uint64_t{1} << w.world_size) - 1;
      if (thread == 0)
        arch::multimem_add_release(w.multicast_pad + arrivals_word(p.channel, place.block), uint64_t{1} << place.rank);
    }
    // An abort counts even if the peer has come: whoever gave up may have changed its rows before the peer read them.
    // It is looked at after the acquire, which shows all aborts that the peer's word comes after.
    const bool came = arch::wait_until(
        [&] {
          got = arch::load_acquire<Scope::sys>(taken);
          aborted = arch::load_relaxed<Scope::sys>(own_pad + kAbortWord);
          return aborted != 0 || (counts ? (got >> peer & 1) != 0 : got != 0);
        },
        deadline_ns);
    if (aborted != 0 || !came) {
      give_up(p, place, aborted != 0 ? Failure::aborted : Failure::timeout, stage, peer, expected,
              aborted != 0 ? aborted : got);
      failed = 1;
    } else if (!counts) {
      arch::store_relaxed<Scope::sys>(taken, uint64_t{0});
      if (got != expected) {
        give_up(p, place, Failure::disagreement, stage, peer, expected, got);
        failed = 1;
      }
    }
  } else if (thread == kMaxWorldSize && stage == Stage::entry) {
    // In the shadow of the waiting: is another call at work on this channel? Its words and ours would be mixed up.
    uint64_t* busy = w.pad[place.rank] + busy_word(p.channel, place.block);
    if (arch::cas_relaxed<Scope::gpu>(busy, uint64_t{0}, uint64_t{1}) != 0) {
      give_up(p, place, Failure::busy, stage, place.rank, 0, 0);
      failed = 1;
    }
  }
  arch::sync_block();
  if (stage == Stage::exit && thread == 0) {
    if (kTransport == Transport::multimem) {
      arch::store_relaxed<Scope::sys>(w.pad[place.rank] + arrivals_word(p.channel, place.block), uint64_t{0});
    }
    arch::store_relaxed<Scope::gpu>(w.pad[place.rank] + busy_word(p.channel, place.block), uint64_t{0});
  }
  return failed == 0;
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
