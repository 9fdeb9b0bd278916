// What the ranks of one group share: a buffer each, and a pad each, where they signal. The glue keeps a registry of
// these (workspace_torch.cpp); kernels get a copy by value. Addresses are those of the process that uses them.
#pragma once

#include <cstdint>

#include "core/op.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int kMaxWorldSize = 16;
constexpr int kMaxChannels = 16;
constexpr int kMaxBlocks = 128;  // of one rank's launch

// peer: loads and stores through every rank's own address. multimem: through one multicast address, where the NVLink
// switch adds and copies.
enum class Transport : int32_t { peer, multimem };

// ----------------------------------------------------------------------------------------------------------- the pad
// 64-bit words, all zero at rest. Word 0 is where a rank is told to give up; then a block of words per channel, so that
// calls on different channels never meet. Slot (block, peer) of a channel's entry or exit is written by that peer only
// and reset by the pad's owner once it has been read: no epoch, so a captured graph can be replayed.

constexpr int64_t kAbortWord = 0;     // why some rank gave up (abort_word below); 0: nobody did
constexpr int64_t kClaimWord = 1;     // of the own threads that fail at once, one writes the record
constexpr int64_t kBellWord = 2;      // CPU: what a sleeping rank waits on (low 32 bits, a futex)
constexpr int64_t kSleepersWord = 3;  // CPU: threads of this rank that sleep
constexpr int64_t kClosedWord = 4;    // CPU: this rank has closed its workspace
constexpr int64_t kLinkWord = 5;      // CPU: when this rank's emulated link is free again, of CLOCK_MONOTONIC
// CPU, per channel: the last call that this rank refused, see host_protocol.h.
constexpr int64_t kFirstRefusalWord = 8;
constexpr int64_t kFirstProbeWord = 32;  // per peer: what it wrote when the workspace was made
constexpr int64_t kFirstChannelWord = 64;

// CPU ranks are one block each, and every slot there has a cache line of its own: the word, and behind it the whole
// number of the call, of which the word has the last bits only. (Write that first.)
constexpr int64_t kHostSlotWords = 8;
constexpr int64_t kHostChannelWords = 2 * kMaxWorldSize * kHostSlotWords;
constexpr int64_t kDeviceChannelWords = 2 * kMaxBlocks * kMaxWorldSize + 2 * kMaxBlocks;
constexpr int64_t pad_words(int64_t num_channels) {
  constexpr int64_t kChannelWords = kDeviceChannelWords > kHostChannelWords ? kDeviceChannelWords : kHostChannelWords;
  return kFirstChannelWord + num_channels * kChannelWords;
}

// -------------------------------------------------------------------------------------------------- when it goes wrong

enum class Failure : int32_t {
  none,
  timeout,       // `peer` did not come within the deadline
  disagreement,  // `peer` came with other arguments: expected and got are the entry words
  busy,          // another call is running on this channel
  aborted,       // another rank gave up: got is its abort word
  lost,          // CPU: the process of `peer` has ended
  closed,        // CPU: `peer` has closed its workspace
  refused,       // `peer` refused its call because of a bad argument
  interrupted,   // CPU: a signal handler of this process raised
};

enum class Stage : int32_t { entry, exit };

// The first failure of a process, in memory its host can read while kernels run (pinned on a GPU).
enum RecordWord : int32_t {
  kRecordFailure,  // Failure; written last
  kRecordCollective,
  kRecordStage,
  kRecordRank,
  kRecordPeer,
  kRecordBlock,
  kRecordChannel,
  kRecordExpected,
  kRecordGot,
  kRecordTimeoutNs,
  kRecordRecoverable,  // CPU: nonzero if the ranks are still in step and the next call works
  kRecordWords = 16,
};

// What a rank that gives up writes into every pad: its failure, itself, and the peer that it names.
constexpr uint64_t abort_word(Failure failure, int rank, int peer) {
  return uint64_t{1} << 63 | static_cast<uint64_t>(failure) << 32 | static_cast<uint64_t>(rank) << 16 |
         static_cast<uint64_t>(peer);
}
constexpr Failure failure_of_abort(uint64_t word) { return static_cast<Failure>(word >> 32 & 0xff); }
constexpr int rank_of_abort(uint64_t word) { return static_cast<int>(word >> 16 & 0xffff); }
constexpr int peer_of_abort(uint64_t word) { return static_cast<int>(word & 0xffff); }

// ------------------------------------------------------------------------------------------------------- the workspace

struct Workspace {
  int32_t world_size = 1;
  int32_t rank = 0;        // the first rank that this process plays
  int32_t ranks_here = 1;  // how many it plays: 1, or all of them (virtual ranks)
  Transport transport = Transport::peer;

  char* buffer[kMaxWorldSize] = {};   // per rank
  uint64_t* pad[kMaxWorldSize] = {};  // per rank
  char* multicast_buffer = nullptr;   // multimem only: one address for all ranks' buffers
  uint64_t* multicast_pad = nullptr;
  uint64_t* record = nullptr;  // [kRecordWords], this process's

  // CPU processes: a pidfd per peer that becomes readable when it ends (-1: unknown), and a function that runs the
  // host language's signal handlers and returns nonzero if one of them raised (null: none).
  int32_t liveness[kMaxWorldSize] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  int32_t (*interrupted)() = nullptr;

  bool is_virtual() const { return ranks_here > 1; }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
