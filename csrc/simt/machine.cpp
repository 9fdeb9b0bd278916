#include "simt/machine.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace simt {

Thread* current = nullptr;
Machine machine;

namespace {

constexpr uint64_t kStartTime = 1'000'000'000;
constexpr size_t kStacksKept = 8192;  // memory of more is given back after a launch
constexpr size_t kSharedCanaryBytes = 64;
constexpr const char* kStackOverflow = "stack overflow";
constexpr size_t kThreadHolds = 64, kSharedHolds = 1024;  // held-back stores of one thread; of a warp, block or rank

bool run_kernel(Fiber& me) {
  try {
    me.block->rank->running().body();
    return true;
  } catch (const std::exception& exception) {
    machine.fail(machine.name_of(me) + ": uncaught C++ exception: " + exception.what());
  } catch (...) {
    machine.fail(machine.name_of(me) + ": uncaught C++ exception");
  }
  return false;
}

}  // namespace

static void fiber_entry(Context& scheduler) {
  finish_first_switch(scheduler);
  run_kernel(Machine::me());
  machine.end_thread();
}

// ------------------------------------------------------------------------------------------------------ launch, block

void Machine::set_options(const Options& options) {
  options_ = options;
  launches_since_options_ = 0;
  time_ns_ = kStartTime;
}

bool Machine::run(std::vector<Rank> ranks, bool name_ranks) {
  ranks_ = std::move(ranks);
  name_ranks_ = name_ranks;
  report_.clear();
  random_ = Random(Random(options_.seed).next() + launches_since_options_++);
  if (time_ns_ == 0) time_ns_ = kStartTime;
  events_ = 1;
  idle_switches_ = 0;
  scheduler_ = Context();
  slow_rank_ = random_.one_in(2) ? ranks_[random_.below(static_cast<uint32_t>(ranks_.size()))].number : -1;
  slow_slot_ = random_.one_in(2) ? random_.below(options_.resident_blocks) : UINT32_MAX;
  slow_warp_ = random_.one_in(2) ? random_.below(kMaxWarps) : UINT32_MAX;
  commit_one_in_ = random_.one_in(4) ? 0 : 1u << random_.below(6);
  peers_.begin(&random_, options_.hold_back_percent, ranks_.size(), &counters_);

  size_t num_fibers = 0;
  for (Rank& rank : ranks_) {
    rank.first_fiber = num_fibers;
    size_t most = 0;
    for (const QueuedLaunch& queued : rank.launches) {
      const Launch& launch = queued.launch;
      const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
      const uint64_t resident = launch.cooperative ? blocks : std::min<uint64_t>(blocks, options_.resident_blocks);
      most = std::max<size_t>(most, resident * ((launch.block.x * launch.block.y * launch.block.z + 31) / 32 * 32));
    }
    num_fibers += most;
  }
  if (num_fibers > stacks_.capacity()) {
    fail("kernel '" + ranks_.front().running().kernel + "': " + std::to_string(num_fibers) +
         " threads must be resident at once, the emulator has stacks for " + std::to_string(stacks_.capacity()));
    return false;
  }
  if (fibers_.size() < num_fibers) fibers_.resize(num_fibers);
  fibers_used_ = num_fibers;

  ranks_running_ = ranks_.size();
  ranks_draining_ = 0;
  for (Rank& rank : ranks_) {
    if (!start_launch(rank)) --ranks_running_;
  }
  schedule();
  clean_up();
  return !failed();
}

void Machine::clean_up() {
  current = nullptr;
  if (failed()) {  // the fibers stay where they are and are never resumed
    bool overflowed = false;
    for (size_t i = 0; i < fibers_used_; ++i) overflowed |= stacks_.repair(i);
    if (overflowed && report_.find(kStackOverflow) == std::string::npos) report_ += std::string(", after a ") + kStackOverflow;
    runnable_.clear();
    finished_.clear();
    parked_.clear();
  }
  next_wake_ns_ = kNever;
  ranks_.clear();
  peers_.end();
  if (fibers_.size() > kStacksKept) {
    stacks_.release_beyond(kStacksKept);
    fibers_.resize(kStacksKept);
  }
}

// False: nothing is left to launch on this rank.
bool Machine::start_launch(Rank& rank) {
  while (!rank.done()) {
    const Launch& launch = rank.running().launch;
    ++counters_.launches;
    rank.num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    rank.next_block = rank.num_finished = 0;
    if (rank.num_blocks > 0) {
      const uint64_t resident =
          launch.cooperative ? rank.num_blocks : std::min<uint64_t>(rank.num_blocks, options_.resident_blocks);
      if (peer_memory_registered) {
        rank.view = peers_.create_view(nullptr, rank.number, kSharedHolds);
        rank.orphans = peers_.create_view(rank.view, rank.number, kSharedHolds);
      }
      while (rank.blocks.size() < resident) rank.blocks.push_back(std::make_unique<Block>());
      for (uint32_t slot = 0; slot < resident; ++slot) start_block(rank, slot);
      return true;
    }
    ++rank.num_done;
  }
  return false;
}

void Machine::start_block(Rank& rank, uint32_t slot) {
  const Launch& launch = rank.running().launch;
  Block& block = *rank.blocks[slot];
  block.rank = &rank;
  block.slot = slot;
  block.linear = rank.next_block++;
  block.num_threads = block.num_alive = launch.block.x * launch.block.y * launch.block.z;
  block.num_warps = (block.num_threads + 31) / 32;
  block.runnable_warps = 0;
  block.num_in_barrier = 0;
  block.first_in_barrier = block.first_exited = nullptr;
  block.view = nullptr;
  block.fibers = &fibers_[rank.first_fiber + size_t{slot} * block.num_warps * 32];
  ++counters_.blocks;

  // Shared memory starts as garbage that is NaN in every float format, and ends in a canary.
  block.shared_buffer.resize(launch.shared_bytes + 128 + kSharedCanaryBytes);
  block.shared = block.shared_buffer.data();
  block.shared += (128 - reinterpret_cast<uintptr_t>(block.shared) % 128) % 128;
  for (size_t i = 0; i < launch.shared_bytes; i += 8) {
    const uint64_t garbage = (random_.next() & 0x803f803f803f803fu) | 0x7fc07fc07fc07fc0u;
    std::memcpy(block.shared + i, &garbage, std::min<size_t>(8, launch.shared_bytes - i));
  }
  std::memset(block.shared + launch.shared_bytes, 0xa5, kSharedCanaryBytes);

  const uint32_t y_stride = launch.grid.x, z_stride = launch.grid.x * launch.grid.y;
  const Dim3 block_idx{static_cast<uint32_t>(block.linear % y_stride),
                       static_cast<uint32_t>(block.linear / y_stride % launch.grid.y),
                       static_cast<uint32_t>(block.linear / z_stride)};
  Dim3 thread_idx{0, 0, 0};
  for (uint32_t i = 0; i < block.num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread_idx = thread_idx;
    fiber.block_idx = block_idx;
    fiber.block_dim = launch.block;
    fiber.grid_dim = launch.grid;
    fiber.linear = i;
    fiber.block = &block;
    fiber.warp = &block.warps[i / 32];
    fiber.view = nullptr;
    fiber.site = {"", 0};
    fiber.lane = static_cast<uint8_t>(i % 32);
    fiber.state = State::runnable;
    fiber.started = fiber.polling = false;
    if (++thread_idx.x == launch.block.x) {
      thread_idx.x = 0;
      if (++thread_idx.y == launch.block.y) {
        thread_idx.y = 0;
        ++thread_idx.z;
      }
    }
  }
  for (uint32_t w = 0; w < block.num_warps; ++w) {
    Warp& warp = block.warps[w];
    const uint32_t lanes = std::min(32u, block.num_threads - 32 * w);
    warp.block = &block;
    warp.fibers = block.fibers + 32 * w;
    warp.index = w;
    warp.runnable = warp.in_barrier = warp.in_exchange = 0;
    warp.exited = lanes == 32 ? 0 : ~0u << lanes;  // lanes a partial warp does not have
    warp.view = nullptr;
    make_runnable(warp, ~warp.exited);
  }
}

void Machine::finish_block(Block& block) {
  Rank& rank = *block.rank;
  const size_t shared_bytes = rank.running().launch.shared_bytes;
  for (size_t i = 0; i < kSharedCanaryBytes; ++i) {
    if (static_cast<unsigned char>(block.shared[shared_bytes + i]) == 0xa5) continue;
    return fail(name_of(block.fibers[0]) + ": its block wrote past its " + std::to_string(shared_bytes) +
                " bytes of shared memory");
  }
  for (uint32_t i = block.num_threads; i-- > 0;) {  // from the top: an overflow runs down into the stacks below
    if (stacks_.canary_intact(index_of(block.fibers[i]))) continue;
    return fail(name_of(block.fibers[i]) + ": " + kStackOverflow + ", a thread has " +
                std::to_string(StackSlab::kStackBytes / 1024) + " KB");
  }
  if (block.view != nullptr) {
    for (uint32_t w = 0; w < block.num_warps; ++w) {
      if (block.warps[w].view != nullptr) peers_.retire(block.warps[w].view, *rank.orphans);
    }
    peers_.retire(block.view, *rank.orphans);
  }
  progress();
  if (rank.next_block < rank.num_blocks) start_block(rank, block.slot);
  if (++rank.num_finished < rank.num_blocks) return;
  if (rank.view == nullptr) return finish_launch(rank);
  rank.draining = true;
  ++ranks_draining_;
}

// The kernel's stores have arrived; the rank's next launch begins after them.
void Machine::finish_launch(Rank& rank) {
  if (rank.view != nullptr) {
    peers_.retire_and_commit(rank.orphans);
    peers_.retire_and_commit(rank.view);
    rank.view = rank.orphans = nullptr;
    ++events_;
  }
  ++rank.num_done;
  if (!start_launch(rank)) --ranks_running_;
}

void Machine::finish_drained_launches(bool all) {
  for (Rank& rank : ranks_) {
    if (!rank.draining) continue;
    const bool drained = rank.view->held.empty() && rank.orphans->held.empty();
    if (!drained && !all && !random_.one_in(64)) continue;
    rank.draining = false;
    --ranks_draining_;
    finish_launch(rank);
  }
}

View& Machine::view_of(Fiber& fiber) {
  if (fiber.view == nullptr) {
    Block& block = *fiber.block;
    Rank& rank = *block.rank;
    if (block.view == nullptr) block.view = peers_.create_view(rank.view, rank.number, kSharedHolds);
    if (fiber.warp->view == nullptr) fiber.warp->view = peers_.create_view(block.view, rank.number, kSharedHolds);
    fiber.view = peers_.create_view(fiber.warp->view, rank.number, kThreadHolds);
  }
  return *fiber.view;
}

// ---------------------------------------------------------------------------------------------------------- schedule

void Machine::schedule() {
  while (ranks_running_ > 0 && !failed()) {
    if (runnable_.empty()) {
      if (!resolve_stall()) describe_stall();
    } else {
      Warp& warp = pick_warp();
      ++events_;
      run_turn(warp, warp.runnable, random_.below(16));
      now_and_then();
    }
    while (!finished_.empty() && !failed()) {
      Block& block = *finished_.back();
      finished_.pop_back();
      finish_block(block);
    }
  }
}

Warp& Machine::pick_warp() {
  Block* block = runnable_[random_.below(static_cast<uint32_t>(runnable_.size()))];
  if ((block->rank->number == slow_rank_ || block->slot == slow_slot_) && !random_.one_in(32)) {
    block = runnable_[random_.below(static_cast<uint32_t>(runnable_.size()))];
  }
  uint32_t warps = block->runnable_warps;
  if (slow_warp_ < block->num_warps && warps != 1u << slow_warp_ && !random_.one_in(16)) warps &= ~(1u << slow_warp_);
  const int first = static_cast<int>(random_.below(block->num_warps));
  const int pick = (std::countr_zero(std::rotr(warps, first)) + first) % 32;
  return block->warps[pick];
}

// A turn runs the warp's runnable lanes one after the other, each until it stops, in up to `sweeps` + 1 passes. Lanes
// switch directly to each other; the last one switches back here.
void Machine::run_turn(Warp& warp, uint32_t lanes, uint32_t sweeps) {
  const uint64_t order = random_.next();
  turn_ = {&warp, lanes, static_cast<uint32_t>(order) | 1, static_cast<uint32_t>(order >> 32), sweeps};
  if (Fiber* first = next_in_turn()) enter(scheduler_, *first);
  turn_.warp = nullptr;
  current = nullptr;
}

// Most of the time a switch takes is waiting for the next stack to come into the cache.
static inline void prefetch(const Fiber& next, const Fiber& after_next) {
  const char* stack = static_cast<const char*>(next.context.stack_pointer);
  for (int line = 0; line < 4; ++line) __builtin_prefetch(stack + 64 * line);
  __builtin_prefetch(&after_next.context);
}

Fiber* Machine::next_in_turn() {
  if (turn_.warp == nullptr || failed()) return nullptr;
  Warp& warp = *turn_.warp;
  for (;;) {
    while ((turn_.lanes & warp.runnable) != 0) {
      turn_.position += turn_.multiplier;  // odd, so that every lane comes up once in 32 steps
      const uint32_t lane = turn_.position % 32, bit = 1u << lane;
      if ((turn_.lanes & warp.runnable & bit) == 0) continue;
      turn_.lanes &= ~bit;
      prefetch(warp.fibers[(lane + turn_.multiplier) % 32], warp.fibers[(lane + 2 * turn_.multiplier) % 32]);
      return &warp.fibers[lane];
    }
    if (turn_.sweeps == 0 || warp.runnable == 0) return nullptr;
    --turn_.sweeps;
    const uint64_t order = random_.next();
    turn_.lanes = warp.runnable;
    turn_.multiplier = static_cast<uint32_t>(order) | 1;
    turn_.position = static_cast<uint32_t>(order >> 32);
  }
}

void Machine::enter(Context& from, Fiber& next) {
  ++counters_.switches;
  ++idle_switches_;
  ++time_ns_;
  current = &next;
  if (!next.started) {
    next.started = true;
    stacks_.prepare(next.context, index_of(next), [] { fiber_entry(machine.scheduler_); });
  }
  switch_context(from, next.context);
}

// Goes from a thread to whatever runs next.
void Machine::leave(Fiber& fiber) {
  Fiber* next = next_in_turn();
  if (next == &fiber) {
    ++counters_.switches;
    ++idle_switches_;
    ++time_ns_;
  } else if (next != nullptr) {
    enter(fiber.context, *next);
  } else {
    switch_context(fiber.context, scheduler_);
  }
}

void Machine::make_runnable(Warp& warp, uint32_t lanes) {
  Block& block = *warp.block;
  warp.runnable |= lanes;
  if (block.runnable_warps == 0) {
    block.runnable_index = static_cast<uint32_t>(runnable_.size());
    runnable_.push_back(&block);
  }
  block.runnable_warps |= 1u << warp.index;
}

static void stop_running(Fiber& fiber, std::vector<Block*>& runnable) {
  Warp& warp = *fiber.warp;
  warp.runnable &= ~(1u << fiber.lane);
  if (warp.runnable != 0) return;
  Block& block = *warp.block;
  block.runnable_warps &= ~(1u << warp.index);
  if (block.runnable_warps != 0) return;
  runnable.back()->runnable_index = block.runnable_index;
  runnable[block.runnable_index] = runnable.back();
  runnable.pop_back();
}

void Machine::block_me(State state, Site site) {
  Fiber& fiber = me();
  fiber.state = state;
  fiber.site = site;
  stop_running(fiber, runnable_);
  leave(fiber);
  fiber.state = State::runnable;
}

void Machine::yield(Site site) {
  Fiber& fiber = me();
  fiber.site = site;
  if (too_long_without_progress()) {
    fault(site, "spins outside wait_until: no thread made progress in %llu switches",
          static_cast<unsigned long long>(idle_switches_));
  }
  leave(fiber);
}

void Machine::end_thread() {
  Fiber& fiber = me();
  if (!failed()) {
    Block& block = *fiber.block;
    Warp& warp = *fiber.warp;
    fiber.state = State::exited;
    warp.exited |= 1u << fiber.lane;
    if (block.first_exited == nullptr) block.first_exited = &fiber;
    if (fiber.view != nullptr) peers_.retire(fiber.view, *block.rank->orphans);
    progress();
    stop_running(fiber, runnable_);
    if (--block.num_alive == 0) {
      finished_.push_back(&block);
    } else {
      check_barrier(block);
      for (uint32_t lanes = warp.in_exchange; lanes != 0; lanes &= lanes - 1) {
        const int lane = std::countr_zero(lanes);
        if ((warp.mask[lane] >> fiber.lane & 1) == 0) continue;
        fault(warp.fibers[lane].site, "exited while thread %u waits for it in a warp exchange with mask 0x%08x",
              warp.fibers[lane].linear, warp.mask[lane]);
      }
    }
  }
  leave(fiber);
  __builtin_unreachable();
}

// ----------------------------------------------------------------------------------------------------- waiting threads

void Machine::park_me(State state, uint64_t deadline_ns, Site site) {
  Fiber& fiber = me();
  fiber.deadline_ns = deadline_ns;
  fiber.parked_index = static_cast<uint32_t>(parked_.size());
  parked_.push_back(&fiber);
  next_wake_ns_ = std::min(next_wake_ns_, deadline_ns);
  block_me(state, site);
}

void Machine::unpark(Fiber& fiber) {
  parked_.back()->parked_index = fiber.parked_index;
  parked_[fiber.parked_index] = parked_.back();
  parked_.pop_back();
  make_runnable(*fiber.warp, 1u << fiber.lane);
}

// The thread looks for itself, on its own stack: a poll may do anything a kernel may.
void Machine::poll(Fiber& fiber) {
  unpark(fiber);
  run_turn(*fiber.warp, 1u << fiber.lane, 0);
}

void Machine::wake_expired() {
  next_wake_ns_ = kNever;
  for (size_t i = 0; i < parked_.size();) {
    Fiber& fiber = *parked_[i];
    if (fiber.deadline_ns < time_ns_) {
      unpark(fiber);
    } else {
      next_wake_ns_ = std::min(next_wake_ns_, fiber.deadline_ns);
      ++i;
    }
  }
}

// After each turn: the world goes on a little beside the threads.
void Machine::now_and_then() {
  if (ranks_draining_ > 0) finish_drained_launches(false);
  if (time_ns_ > next_wake_ns_) wake_expired();
  if (commit_one_in_ != 0 && peers_.num_held() > 0 && random_.one_in(commit_one_in_)) commit_one_store();
  if (!parked_.empty() && random_.one_in(4) && !failed()) {
    Fiber& fiber = *parked_[random_.below(static_cast<uint32_t>(parked_.size()))];
    if (fiber.state == State::waiting) poll(fiber);
  }
}

void Machine::commit_one_store() {
  const uintptr_t granule = peers_.commit_one();
  for (Fiber* fiber : parked_) {
    if (fiber->polled_begin < granule + 16 && granule < fiber->polled_end) fiber->polled_at = 0;
  }
  if (peers_.num_held() == 0) ++events_;
}

// Nothing is runnable. Does the least that may help, so that every order of held-back stores can be seen.
bool Machine::resolve_stall() {
  bool sleeper = false;
  for (size_t i = 0; i < parked_.size();) {
    Fiber& fiber = *parked_[i];
    sleeper |= fiber.state == State::sleeping;
    if (fiber.state == State::waiting && fiber.polled_at != events_) {
      poll(fiber);
      if (!runnable_.empty() || failed() || !finished_.empty()) return true;
    } else {
      ++i;
    }
  }
  if (peers_.num_held() > 0 && !(sleeper && random_.one_in(2))) {
    commit_one_store();
    return true;
  }
  if (ranks_draining_ > 0) {
    finish_drained_launches(true);
    return true;
  }
  next_wake_ns_ = kNever;
  for (const Fiber* fiber : parked_) next_wake_ns_ = std::min(next_wake_ns_, fiber->deadline_ns);
  if (next_wake_ns_ == kNever) return false;
  time_ns_ = std::max(time_ns_, next_wake_ns_ + 1);
  ++events_;
  wake_expired();
  return true;
}

}  // namespace simt
