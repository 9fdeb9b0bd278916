// How the processes of one host meet before and after a collective: the CPU's half of the protocol in workspace.h. A
// rank says its entry word (allreduce.h) to every peer, waits for theirs, does its rows, and says and awaits the same
// word again. Every wait ends: with the peers, or with a Failure that names one of them.
//
// A call that fails before its rows (other arguments, a refusal, a closed workspace) fails on every rank, since every
// rank sees every word, and the next call finds the workspace usable: what the failed call left in the slots has an
// older number than the next call and is dropped. Any other failure leaves ranks at unknown places, so it is written
// into every pad as an abort word, and all calls fail until the workspace is reset.
//
// An emulated link carries nothing: the memory of the host does. A rank only stays away from the exit, asleep, until
// such a link would have been done. Calls of a rank on several channels have the link one after the other.
//
// Words are read with acquire and written with release, and nothing else orders the data in the buffers: the bell, the
// count of sleepers and the calls' numbers are relaxed, so that the thread sanitizer does not take them for more.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "allreduce_rmsnorm/allreduce.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// A waiting rank spins for what a wake-up would cost anyway, then lets others run, then sleeps; asleep it looks up this
// often for what rings no bell: dead processes and this process's signals.
constexpr uint64_t kSpinNs = 20'000, kYieldNs = 500'000, kSleepNs = 20'000'000;
// With an emulated link, which needs no processor: then others have something to compute.
constexpr uint64_t kLinkYieldNs = 50'000;

TW_CPU uint64_t read_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
TW_CPU void write_word(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
// False, and `expected` is what stands there, if that is another word.
TW_CPU bool replace_word(uint64_t* word, uint64_t& expected, uint64_t value) {
  return __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

TW_CPU uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

TW_CPU void pause_briefly() {
#if defined(__x86_64__)
  for (int i = 0; i < 4; ++i) _mm_pause();
#endif
}

// Whether each rank may have a processor to itself: otherwise spinning keeps a peer from coming.
TW_CPU bool has_processors_for(int ranks) {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) >= ranks;
}

// --------------------------------------------------------------------------------------------------- bell and sleepers

TW_CPU uint32_t* bell_of(uint64_t* pad) { return reinterpret_cast<uint32_t*>(pad + kBellWord); }

// Wakes whoever sleeps on the peers' pads, after something was written for them. The fence pairs with the one in
// lie_down(): of "the word is written" and "somebody sleeps", at least one side sees the other's.
TW_CPU void ring_bells(const Workspace& workspace) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  for (int rank = 0; rank < workspace.world_size; ++rank) {
    uint64_t* pad = workspace.pad[rank];
    if (rank == workspace.rank || __atomic_load_n(pad + kSleepersWord, __ATOMIC_RELAXED) == 0) continue;
    __atomic_fetch_add(bell_of(pad), 1, __ATOMIC_RELAXED);
    syscall(SYS_futex, bell_of(pad), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
}

// lie_down(), look once more for what is awaited, sleep(), get_up(): a ring after lie_down() is not missed. (Not a
// class with a destructor: its exception tables would be shared with code for other instruction sets.)
TW_CPU uint32_t lie_down(uint64_t* pad) {
  __atomic_fetch_add(pad + kSleepersWord, 1, __ATOMIC_RELAXED);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return __atomic_load_n(bell_of(pad), __ATOMIC_ACQUIRE);
}
// Until the bell is not as it was heard, a signal comes or the time is over.
TW_CPU void sleep(uint64_t* pad, uint32_t heard, uint64_t limit_ns) {
  const timespec limit{static_cast<time_t>(limit_ns / 1'000'000'000), static_cast<long>(limit_ns % 1'000'000'000)};
  syscall(SYS_futex, bell_of(pad), FUTEX_WAIT, heard, &limit, nullptr, 0);
}
TW_CPU void get_up(uint64_t* pad) { __atomic_fetch_sub(pad + kSleepersWord, 1, __ATOMIC_RELAXED); }

// ------------------------------------------------------------------------------------------------------------ the call

// What ends a wait early.
struct Setback {
  Failure failure = Failure::none;
  int peer = 0;
  uint64_t got = 0;

  explicit operator bool() const { return failure != Failure::none; }
};

// One call of one rank that has peers in other processes.
class HostCall {
 public:
  explicit HostCall(const AllreduceParams& params)
      : params_(params), workspace_(params.workspace), word_(entry_word(params, 1)), start_ns_(now_ns()) {}

  // Another rank has given up: nothing may be written any more, not even to the own buffer, which peers may be reading.
  bool is_aborted() { return report(Stage::entry, find_abort()); }

  // True when all ranks have come with the same word: from here on their buffers may be read and written.
  bool enter() {
    pending_ = all_peers();
    if (!meet(Stage::entry)) return false;
    take_link();
    return true;
  }

  // True when all ranks have done their rows, and an emulated link would have carried them.
  bool leave() {
    pending_ = all_peers();
    return !report(Stage::exit, wait_for_link()) && meet(Stage::exit);
  }

  // After leave() has failed.
  bool has_left(int peer) const {
    return (pending_ >> peer & 1) == 0 || read_word(slot(Stage::exit, workspace_.rank, peer)) == word_;
  }

  // Instead of enter().
  void refuse() {
    write_word(refusal_of(workspace_.rank), params_.sequence);
    ring_bells(workspace_);
  }

 private:
  // The writer's word, and behind it the whole number of its call.
  uint64_t* slot(Stage stage, int reader, int writer) const {
    return workspace_.pad[reader] + kFirstChannelWord + params_.channel * kHostChannelWords +
           (static_cast<int64_t>(stage) * kMaxWorldSize + writer) * kHostSlotWords;
  }
  uint64_t* refusal_of(int rank) const { return workspace_.pad[rank] + kFirstRefusalWord + params_.channel; }

  uint32_t all_peers() const { return ((1u << workspace_.world_size) - 1) & ~(1u << workspace_.rank); }
  template <class Body>
  void for_each_pending(const Body& body) const {
    for (uint32_t left = pending_; left != 0; left &= left - 1) body(__builtin_ctz(left));
  }

  bool meet(Stage stage) {
    for (int peer = 0; peer < workspace_.world_size; ++peer) {
      if (peer == workspace_.rank) continue;
      uint64_t* const own_slot = slot(stage, peer, workspace_.rank);
      __atomic_store_n(own_slot + 1, params_.sequence, __ATOMIC_RELAXED);
      write_word(own_slot, word_);
    }
    ring_bells(workspace_);
    return !report(stage, wait(stage));
  }

  Setback wait(Stage stage) {
    Setback setback = look(stage);
    if (is_over(setback)) return setback;
    uint64_t* const pad = workspace_.pad[workspace_.rank];
    const uint64_t begin_ns = now_ns();
    const uint64_t yield_ns = has_link() ? kLinkYieldNs : kYieldNs;
    const uint64_t spin_ns = has_processors_for(workspace_.world_size) ? kSpinNs : 0;
    for (;;) {
      const uint64_t time_ns = now_ns();
      const uint64_t waited_ns = time_ns - begin_ns, due_ns = deadline_ns(stage);
      if (time_ns >= due_ns) {
        setback = look(stage);
        return is_over(setback) ? setback : Setback{Failure::timeout, __builtin_ctz(pending_)};
      }
      if (waited_ns < yield_ns) {
        if (waited_ns < spin_ns) {
          pause_briefly();
        } else {
          sched_yield();
        }
        setback = look(stage);
      } else {
        const uint32_t heard = lie_down(pad);
        setback = look(stage);
        if (!is_over(setback)) setback = look_at_processes(stage);
        if (!is_over(setback)) sleep(pad, heard, shorter(due_ns - time_ns, kSleepNs));
        get_up(pad);
      }
      if (is_over(setback)) return setback;
    }
  }

  // The deadline is for peers, not for links: at the exit nobody's link counts.
  uint64_t deadline_ns(Stage stage) const {
    uint64_t since_ns = start_ns_;
    if (has_link() && stage == Stage::exit) {
      for (int rank = 0; rank < workspace_.world_size; ++rank) {
        const uint64_t free_ns = __atomic_load_n(workspace_.pad[rank] + kLinkWord, __ATOMIC_RELAXED);
        if (free_ns > since_ns) since_ns = free_ns;
      }
    }
    return since_ns + params_.timeout_ns;
  }

  bool has_link() const { return params_.link_ns != 0; }

  // From now on, or from when the calls before this one are through.
  void take_link() {
    if (!has_link()) return;
    uint64_t* const word = workspace_.pad[workspace_.rank] + kLinkWord;
    const uint64_t time_ns = now_ns();
    uint64_t free_ns = read_word(word);
    do {
      link_done_ns_ = (free_ns > time_ns ? free_ns : time_ns) + params_.link_ns;
    } while (!replace_word(word, free_ns, link_done_ns_));
  }

  Setback wait_for_link() {
    if (!has_link()) return {};
    // Timers may be late by the thread's slack, 50 us by default: as much as a short call takes.
    const int slack_ns = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, 1ul);
    const Setback setback = sleep_until_link_is_done();
    if (slack_ns > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(slack_ns));
    return setback;
  }

  // As alert as any other wait. Peers whose link was faster may have come to the exit already.
  Setback sleep_until_link_is_done() {
    uint64_t* const pad = workspace_.pad[workspace_.rank];
    for (;;) {
      const uint64_t time_ns = now_ns();
      if (time_ns >= link_done_ns_) return {};
      const uint32_t heard = lie_down(pad);
      Setback setback = look(Stage::exit);
      if (!setback) setback = look_at_processes(Stage::exit);
      if (!setback) sleep(pad, heard, shorter(link_done_ns_ - time_ns, kSleepNs));
      get_up(pad);
      if (setback) return setback;
    }
  }

  static uint64_t shorter(uint64_t a_ns, uint64_t b_ns) { return a_ns < b_ns ? a_ns : b_ns; }

  bool is_over(const Setback& setback) const { return setback || pending_ == 0; }

  // At everything in memory that could end the wait. An abort counts even when all have come: the rank that gave up
  // may already be changing its buffer.
  Setback look(Stage stage) {
    if (const Setback setback = find_abort()) return setback;
    Setback first;
    for_each_pending([&](int peer) {
      Setback setback = look_at_slot(stage, peer);
      const Failure absence = setback || !is_pending(peer) ? Failure::none : find_absence(peer);
      if (absence != Failure::none) {
        setback = look_at_slot(stage, peer);  // it may have come, and then refused its next call or closed
        if (!setback && is_pending(peer)) setback = {absence, peer};
      }
      if (!first) first = setback;
    });
    return first;
  }

  Setback find_abort() const {
    const uint64_t word = read_word(workspace_.pad[workspace_.rank] + kAbortWord);
    return word == 0 ? Setback{} : Setback{Failure::aborted, rank_of_abort(word), word};
  }

  bool is_pending(int peer) const { return pending_ >> peer & 1; }

  Setback look_at_slot(Stage stage, int peer) {
    uint64_t* const slot_of_peer = slot(stage, workspace_.rank, peer);
    uint64_t word = read_word(slot_of_peer);
    while (word != 0) {
      // The word has only the number's last bits, which a peer that fails or refuses often enough comes back to.
      const uint64_t sequence = __atomic_load_n(slot_of_peer + 1, __ATOMIC_RELAXED);
      if ((word >> kSequenceShift & kSequenceMask) != (sequence & kSequenceMask)) break;  // it is writing its next word
      if (sequence > params_.sequence) {  // its call of this number is over: it failed, or was refused
        const bool is_refused = read_word(refusal_of(peer)) == params_.sequence;
        return {is_refused ? Failure::refused : Failure::disagreement, peer, word};
      }
      // Not a plain store: a peer whose call has failed may be writing its next word.
      if (!replace_word(slot_of_peer, word, 0)) continue;
      if (sequence < params_.sequence) break;  // left by a call that failed
      pending_ &= ~(1u << peer);
      return word == word_ ? Setback{} : Setback{Failure::disagreement, peer, word};
    }
    return {};
  }

  // Why a peer whose word is not there will not come.
  Failure find_absence(int peer) const {
    if (read_word(refusal_of(peer)) >= params_.sequence) return Failure::refused;
    if (read_word(workspace_.pad[peer] + kClosedWord) != 0) return Failure::closed;
    return Failure::none;
  }

  Setback look_at_processes(Stage stage) {
    // Who has entered must stay alive until it has left; who has left may end.
    const uint32_t watched = stage == Stage::entry ? all_peers() : pending_;
    pollfd processes[kMaxWorldSize];
    for (int peer = 0; peer < workspace_.world_size; ++peer) {
      processes[peer] = {watched >> peer & 1 ? workspace_.liveness[peer] : -1, POLLIN, 0};  // poll() skips -1
    }
    if (poll(processes, static_cast<nfds_t>(workspace_.world_size), 0) > 0) {
      // Its last words count.
      if (const Setback setback = look(stage); is_over(setback)) return setback;
      for (int peer = 0; peer < workspace_.world_size; ++peer) {
        if (processes[peer].revents != 0 && (stage == Stage::entry || is_pending(peer))) return {Failure::lost, peer};
      }
    }
    if (workspace_.interrupted != nullptr && workspace_.interrupted() != 0) {
      return {Failure::interrupted, pending_ != 0 ? __builtin_ctz(pending_) : workspace_.rank};
    }
    return {};
  }

  // Tells the host, and the peers if they must give up too. Whether there was anything to tell.
  bool report(Stage stage, const Setback& setback) {
    const Failure failure = setback.failure;
    if (failure == Failure::none) return false;
    const bool fails_everywhere = stage == Stage::entry && (failure == Failure::disagreement ||
                                                            failure == Failure::refused || failure == Failure::closed);
    if (!fails_everywhere && failure != Failure::aborted) {
      for (int rank = 0; rank < workspace_.world_size; ++rank) {
        uint64_t nobody = 0;
        replace_word(workspace_.pad[rank] + kAbortWord, nobody, abort_word(failure, workspace_.rank, setback.peer));
      }
      ring_bells(workspace_);
    }
    uint64_t* const record = workspace_.record;
    record[kRecordCollective] = static_cast<uint64_t>(params_.collective);
    record[kRecordStage] = static_cast<uint64_t>(stage);
    record[kRecordRank] = static_cast<uint64_t>(workspace_.rank);
    record[kRecordPeer] = static_cast<uint64_t>(setback.peer);
    record[kRecordBlock] = 0;
    record[kRecordChannel] = static_cast<uint64_t>(params_.channel);
    record[kRecordExpected] = word_;
    record[kRecordGot] = setback.got;
    record[kRecordTimeoutNs] = params_.timeout_ns;
    record[kRecordRecoverable] = fails_everywhere;
    write_word(record + kRecordFailure, static_cast<uint64_t>(failure));
    return true;
  }

  const AllreduceParams& params_;
  const Workspace& workspace_;
  const uint64_t word_;
  const uint64_t start_ns_;
  uint64_t link_done_ns_ = 0;  // when the emulated link has carried this call's rows
  uint32_t pending_ = 0;       // a bit per peer that has not come yet
};

}  // namespace

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA
