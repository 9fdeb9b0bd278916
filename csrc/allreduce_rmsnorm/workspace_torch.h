// The workspaces that are open in this process, by the id that ops are given; and what a failed call is called. Part of
// the glue.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "allreduce_rmsnorm/allreduce.h"
#include "torch/check.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

inline pid_t this_thread() {
  static thread_local const pid_t id = static_cast<pid_t>(syscall(SYS_gettid));
  return id;
}

struct OpenWorkspace {
  Workspace view;
  int64_t buffer_bytes = 0;   // of each rank's buffer, where users' tensors lie
  int64_t staging_bytes = 0;  // behind it, for each channel
  int64_t num_channels = 0;
  int32_t device_type = 0, device_index = 0;
  pid_t process = 0;
  uint64_t timeout_ns = 0, first_timeout_ns = 0;
  EmulatedLink link;
  std::atomic<bool> closing{false};  // set before close() waits for running calls; looked at once a call is running

  struct Channel {
    std::atomic<pid_t> thread{0};  // that is inside a call; 0: the channel is free
    std::atomic<uint64_t> calls{0};
  };
  Channel channels[kMaxChannels];

  // The first of several failures at once is kept.
  std::atomic<bool> has_record{false};
  void keep_record(const uint64_t* record) {
    if (has_record.exchange(true)) return;
    for (int word = kRecordFailure + 1; word < kRecordWords; ++word) view.record[word] = record[word];
    __atomic_store_n(view.record + kRecordFailure, record[kRecordFailure], __ATOMIC_RELEASE);
  }

  int64_t staging_offset(int64_t channel) const { return buffer_bytes + channel * staging_bytes; }
};

// The record of an asynchronous failure is read while a kernel may be writing it.
inline Failure recorded_failure(const Workspace& w) {
  return static_cast<Failure>(__atomic_load_n(w.record + kRecordFailure, __ATOMIC_ACQUIRE));
}

namespace registry {

struct Table {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<OpenWorkspace>> open;
};
inline Table& table() {
  static Table* const instance = new Table;  // never destroyed: a thread may still be in an op when the process ends
  return *instance;
}

inline void add(int64_t id, std::shared_ptr<OpenWorkspace> workspace) {
  const std::lock_guard lock(table().mutex);
  table().open[id] = std::move(workspace);
}
// Null if there is none.
inline std::shared_ptr<OpenWorkspace> take(int64_t id) {
  const std::lock_guard lock(table().mutex);
  const auto entry = table().open.find(id);
  if (entry == table().open.end()) return nullptr;
  const std::shared_ptr<OpenWorkspace> found = entry->second;
  table().open.erase(entry);
  return found;
}

// Shared, so that closing it under a running call does not pull it away.
inline std::shared_ptr<OpenWorkspace> find(const char* op, int64_t id, const TensorInfo& token) {
  std::shared_ptr<OpenWorkspace> found;
  {
    const std::lock_guard lock(table().mutex);
    if (const auto entry = table().open.find(id); entry != table().open.end()) found = entry->second;
  }
  const std::string name = "workspace " + std::to_string(id);
  if (found == nullptr) {
    fail(op, token, "belong to an open workspace", name + ", which is closed or was made for another device");
  }
  if (found->process != getpid()) {
    fail(op, token, "belong to a workspace of this process",
         name + " of process " + std::to_string(found->process) + ": a forked child has to make its own");
  }
  if (found->device_type != token.device_type || found->device_index != token.device_index) {
    fail(op, token, "be the token of its workspace", name + " of another device");
  }
  return found;
}

}  // namespace registry

// ------------------------------------------------------------------------------------------------- failures into words

inline const char* error_name(Failure failure) {
  switch (failure) {
    case Failure::timeout:
      return "CommunicationTimeout";
    case Failure::disagreement:
    case Failure::refused:
      return "RankDisagreement";
    case Failure::lost:
    case Failure::closed:
      return "PeerLost";
    default:
      return "CommunicationError";
  }
}

// "RankDisagreement: rank 1 came ...": the name is that of the exception that Python raises.
inline std::string describe_failure(const Workspace& w) {
  const auto number = [&](RecordWord word) { return std::to_string(w.record[word]); };
  const auto failure = static_cast<Failure>(w.record[kRecordFailure]);
  const bool at_exit = static_cast<Stage>(w.record[kRecordStage]) == Stage::exit;
  constexpr const char* kNames[] = {"allreduce", "allreduce_rmsnorm", "gather_residual"};
  const std::string collective = kNames[w.record[kRecordCollective] % 3];
  const std::string rank = "rank " + number(kRecordRank), peer = "rank " + number(kRecordPeer);
  const std::string where = " (" + collective + ", " + (at_exit ? "exit" : "entry") + ", block " +
                            number(kRecordBlock) + ", channel " + number(kRecordChannel) + ")";
  const uint64_t expected = w.record[kRecordExpected], got = w.record[kRecordGot];
  Failure kind = failure;
  std::string text;
  switch (failure) {
    case Failure::timeout:
      text = rank + " waited " + shortest(static_cast<double>(w.record[kRecordTimeoutNs]) * 1e-9) + " s for " + peer;
      break;
    case Failure::disagreement: {
      const auto differs = [&](int shift, uint64_t mask) {
        return (expected >> shift & mask) != (got >> shift & mask);
      };
      constexpr uint64_t kOffsetMask = (uint64_t{1} << kHashShift) - 1;
      if (differs(kSequenceShift, kSequenceMask)) {
        text = peer + " is at another call of this channel than " + rank;
      } else if (differs(kHashShift, kHashMask)) {
        text =
            peer + " came with another op, num_tokens, hidden, dtype, eps, weight_bias, max_ctas or tag than " + rank;
      } else {
        text = peer + " has its tensor at byte " + std::to_string((got & kOffsetMask) * 16) + " of the workspace, " +
               rank + " at byte " + std::to_string((expected & kOffsetMask) * 16);
      }
      break;
    }
    case Failure::busy:
      text = "another call was running on this channel of " + rank + "; calls on one channel must follow each other";
      break;
    case Failure::lost:
      text = "the process of " + peer + " has ended; " + rank + " was waiting";
      break;
    case Failure::closed:
      text = peer + " has closed its workspace; " + rank + " was waiting";
      break;
    case Failure::refused:
      text = peer + " refused its call because of a bad argument; its own error says which";
      break;
    case Failure::interrupted:
      text = rank + " was interrupted while it waited for " + peer;
      break;
    default: {
      kind = failure_of_abort(got);
      if (kind == Failure::closed && rank_of_abort(got) == static_cast<int>(w.record[kRecordRank])) {
        text = rank + " closed its workspace while a call of it waited for " + peer;
        break;
      }
      const std::string origin = "rank " + std::to_string(rank_of_abort(got));
      const std::string named = "rank " + std::to_string(peer_of_abort(got));
      text = origin + (kind == Failure::timeout        ? " gave up waiting for " + named
                       : kind == Failure::disagreement ? " found that " + named + " came with other arguments"
                       : kind == Failure::lost         ? " found that the process of " + named + " has ended"
                       : kind == Failure::closed       ? " found that " + named + " has closed its workspace"
                       : kind == Failure::refused      ? " refused its call because of a bad argument"
                       : kind == Failure::interrupted  ? " was interrupted"
                                                       : " gave up");
      text += "; " + rank + " stopped waiting for " + peer;
    }
  }
  return std::string(error_name(kind)) + ": " + text + where;
}

[[noreturn]] inline void raise_failure(const char* op, const Workspace& w) {
  raise(std::string(op) + ": " + describe_failure(w));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
