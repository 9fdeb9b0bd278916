// The emulator's inside: threads as fibers, gathered in warps, blocks and ranks, and the one scheduler that runs them.
// host.cpp is the door, launches.cpp sets launches up, machine.cpp schedules, threads.cpp and memory.cpp hold what a
// kernel calls, report.cpp puts faults into words.
#pragma once

#include <cstdarg>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/peer_memory.h"
#include "simt/random.h"
#include "simt/simt.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr uint32_t kMaxWarps = 32;
constexpr uint64_t kNever = UINT64_MAX;

struct Block;
struct Rank;
struct Warp;

// In the order in which a hang lists them: most often the first is why the others wait.
enum class State : uint8_t { runnable, waiting, sleeping, in_exchange, in_barrier, exited };

struct Fiber : Thread {
  Context context;
  Block* block;
  Warp* warp;
  View* view;                          // made at the first access to peer memory
  Site site;                           // of the call it is in
  uint64_t deadline_ns;                // of a wait or a sleep
  uint64_t polled_at;                  // Machine::events_ when its poll last failed
  uintptr_t polled_begin, polled_end;  // what the poll read
  uint32_t parked_index;
  uint8_t lane;
  State state;
  bool started, polling;
};

struct Warp {
  Block* block;
  Fiber* fibers;
  uint32_t index;
  uint32_t runnable, in_barrier, in_exchange, exited;  // a bit per lane
  View* view;
  // What the lanes brought to an exchange; `value` becomes the result.
  uint64_t value[kWarpSize];
  uint32_t operand[kWarpSize];
  uint32_t mask[kWarpSize];
  uint8_t kind[kWarpSize];
};

struct Block {
  Rank* rank;
  Fiber* fibers;
  uint32_t slot;  // among the rank's resident blocks
  uint64_t linear;
  uint32_t num_threads, num_warps;
  uint32_t runnable_warps;  // a bit per warp
  uint32_t runnable_index;
  uint32_t num_alive, num_in_barrier;
  Fiber* first_in_barrier;
  Fiber* first_exited;
  View* view;
  char* shared;
  std::vector<char> shared_buffer;
  Warp warps[kMaxWarps];
};

struct QueuedLaunch {
  Launch launch;
  std::string kernel;
  std::function<void()> body;
};

struct Rank {
  int number = 0;
  std::vector<QueuedLaunch> launches;
  size_t num_done = 0;
  size_t first_fiber = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // resident ones; reused by the next launch
  uint64_t next_block = 0, num_blocks = 0, num_finished = 0;
  View* view = nullptr;     // while a launch runs and peer memory is registered
  View* orphans = nullptr;  // what threads held that have ended
  bool draining = false;    // all blocks have ended, their stores need not have arrived

  bool done() const { return num_done == launches.size(); }
  const QueuedLaunch& running() const { return launches[num_done]; }
};

// An address range behind which the same bytes of every rank's buffer stand.
struct Multicast {
  uintptr_t begin, end;
  std::vector<uintptr_t> rank_begins;
};

class Machine {
 public:
  // --- host side (host.cpp holds the lock) ---
  bool run(std::vector<Rank> ranks, bool name_ranks);
  void set_options(const Options& options);
  const Options& options() const { return options_; }
  const Counters& counters() const { return counters_; }
  const std::string& report() const { return report_; }
  PeerMemory& peers() { return peers_; }
  std::vector<Multicast>& multicasts() { return multicasts_; }

  // --- for running threads ---
  static Fiber& me() { return *static_cast<Fiber*>(current); }
  void block_me(State state, Site site);  // returns when made runnable again
  void make_runnable(Warp& warp, uint32_t lanes);
  void park_me(State state, uint64_t deadline_ns, Site site);
  void yield(Site site);  // lets others run; a fault after too many switches without progress
  // A step in which another thread may come between; a loop of these is a loop that must not hang.
  void may_yield(uint32_t one_in, Site site) {
    if (!me().polling && random_.one_in(one_in)) yield(site);
  }
  void progress() { idle_switches_ = 0; }
  [[noreturn]] void fail_from_thread(Site site, const char* format, va_list arguments);
  [[noreturn]] void end_thread();
  void check_barrier(Block& block);
  View& view_of(Fiber& fiber);
  Random& random() { return random_; }
  uint64_t time_ns() const { return time_ns_; }
  void advance_time(uint64_t duration_ns) { time_ns_ += duration_ns; }
  uint64_t events() const { return events_; }
  void note_event() { ++events_; }
  bool too_long_without_progress() const { return idle_switches_ > options_.switches_without_progress; }

  // --- reports ---
  std::string name_of(const Fiber& fiber) const;
  void fail(std::string message);
  bool failed() const { return !report_.empty(); }

 private:
  bool start_launch(Rank& rank);
  void start_block(Rank& rank, uint32_t slot);
  void finish_block(Block& block);
  void finish_launch(Rank& rank);
  void finish_drained_launches(bool all);
  void schedule();
  Warp& pick_warp();
  void run_turn(Warp& warp, uint32_t lanes, uint32_t sweeps);
  Fiber* next_in_turn();
  void enter(Context& from, Fiber& next);
  void leave(Fiber& fiber);
  void now_and_then();
  bool resolve_stall();
  void poll(Fiber& fiber);
  void commit_one_store();
  void unpark(Fiber& fiber);
  void wake_expired();
  void describe_stall();
  void clean_up();

  size_t index_of(const Fiber& fiber) const { return static_cast<size_t>(&fiber - fibers_.data()); }

  Options options_;
  Counters counters_;
  uint64_t launches_since_options_ = 0;
  Random random_;
  uint64_t time_ns_ = 0;
  uint64_t next_wake_ns_ = kNever;
  uint64_t events_ = 0;  // anything that may change what a poll returns
  uint64_t idle_switches_ = 0;

  StackSlab stacks_;
  Context scheduler_;
  PeerMemory peers_;
  std::vector<Multicast> multicasts_;
  std::vector<Fiber> fibers_;  // fiber i runs on stack i
  size_t fibers_used_ = 0;     // by this launch or group
  std::vector<Rank> ranks_;
  size_t ranks_running_ = 0, ranks_draining_ = 0;
  bool name_ranks_ = false;

  std::vector<Block*> runnable_;  // blocks with a runnable warp
  std::vector<Block*> finished_;
  std::vector<Fiber*> parked_;  // waiting and sleeping threads

  struct Turn {  // one warp's lanes, in an order drawn for each sweep over them
    Warp* warp = nullptr;
    uint32_t lanes = 0, multiplier = 1, position = 0, sweeps = 0;
  } turn_;

  // Drawn once per launch: some seeds starve one rank, block or warp, some never commit a store before it must be.
  int slow_rank_ = -1;
  uint32_t slow_slot_ = UINT32_MAX, slow_warp_ = UINT32_MAX, commit_one_in_ = 0;

  std::string report_;
};

extern Machine machine;

const char* short_path(const char* file);

}  // namespace simt
