// The scheduler: which warp runs next, who waits for what, and what happens when nobody can run.
#include "simt/machine.h"

#include <algorithm>
#include <bit>

namespace simt {

Thread* current = nullptr;
Machine machine;

static void run_kernel(Fiber& me) {
  try {
    me.block->rank->running().body();
  } catch (const std::exception& exception) {
    machine.fail(machine.name_of(me) + ": uncaught C++ exception: " + exception.what());
  } catch (...) {
    machine.fail(machine.name_of(me) + ": uncaught C++ exception");
  }
}

static void fiber_entry(Context& scheduler) {
  finish_first_switch(scheduler);
  run_kernel(Machine::me());
  machine.end_thread();
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
