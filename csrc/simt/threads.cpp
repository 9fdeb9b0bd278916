// What a running kernel calls: barriers, exchanges, time. Memory is in memory.cpp.
#include <algorithm>
#include <bit>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr uint8_t kSyncWarp = 255;  // an exchange of nothing, beside the kinds of enum Exchange
constexpr uint64_t kClockStepNs = 10;

void must_not_poll(const Fiber& me, Site site) {
  if (me.polling) fault(site, "a poll of wait_until must not meet other threads");
}

void merge_up(View* view) {
  if (view != nullptr) machine.peers().merge_up(*view);
}

// All lanes of `mask` have come to an exchange: they must mean the same one. Then each gets its result.
void complete_exchange(Warp& warp, uint32_t mask, uint8_t kind, Site site) {
  bool same = true;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    const Site other = warp.fibers[lane].site;
    same &= warp.mask[lane] == mask && warp.kind[lane] == kind && other.line == site.line;
    if (same && (other.file == site.file || std::strcmp(other.file, site.file) == 0)) continue;
    fault(site, "meets thread %u, which is in another warp exchange (mask 0x%08x instead of 0x%08x) at %s:%d",
          warp.fibers[lane].linear, warp.mask[lane], mask, short_path(other.file), other.line);
  }
  if (kind == kSyncWarp) {
    for (uint32_t lanes = mask; warp.view != nullptr && lanes != 0; lanes &= lanes - 1) {
      merge_up(warp.fibers[std::countr_zero(lanes)].view);
    }
    return;
  }
  uint64_t brought[kWarpSize];
  std::memcpy(brought, warp.value, sizeof(brought));
  uint32_t votes = 0;
  if (kind >= static_cast<uint8_t>(Exchange::ballot)) {
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      votes |= static_cast<uint32_t>(brought[lane] != 0) << lane;
    }
  }
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    const int operand = static_cast<int>(warp.operand[lane] % kWarpSize);
    int source = lane;
    switch (static_cast<Exchange>(kind)) {
      case Exchange::shuffle:
        source = operand;
        break;
      case Exchange::shuffle_xor:
        source = lane ^ operand;
        break;
      case Exchange::shuffle_up:
        source = lane >= operand ? lane - operand : lane;
        break;
      case Exchange::shuffle_down:
        source = lane + operand < kWarpSize ? lane + operand : lane;
        break;
      case Exchange::ballot:
        warp.value[lane] = votes;
        continue;
      case Exchange::any:
        warp.value[lane] = votes != 0;
        continue;
      case Exchange::all:
        warp.value[lane] = votes == mask;
        continue;
    }
    if ((mask >> source & 1) == 0) {
      fault(site, "shuffle: thread %u reads lane %d, which is not in the mask 0x%08x", warp.fibers[lane].linear, source,
            mask);
    }
    warp.value[lane] = brought[source];
  }
}

uint64_t meet_in_warp(uint8_t kind, uint32_t mask, uint64_t value, uint32_t operand, Site site) {
  Fiber& me = Machine::me();
  Warp& warp = *me.warp;
  const uint32_t lane = me.lane, bit = 1u << lane;
  must_not_poll(me, site);
  if ((mask & bit) == 0) fault(site, "lane %u calls a warp exchange whose mask 0x%08x leaves it out", lane, mask);
  if ((mask & warp.exited) != 0) {
    fault(site, "the mask 0x%08x of a warp exchange names lane %d, which has exited or never existed", mask,
          std::countr_zero(mask & warp.exited));
  }
  warp.value[lane] = value;
  warp.operand[lane] = operand;
  warp.mask[lane] = mask;
  warp.kind[lane] = kind;
  me.site = site;
  if ((mask & ~warp.in_exchange) == bit) {  // the last to come need not stop
    complete_exchange(warp, mask, kind, site);
    machine.progress();
    warp.in_exchange &= ~mask;
    if (mask != bit) machine.make_runnable(warp, mask & ~bit);
  } else {
    warp.in_exchange |= bit;
    machine.block_me(State::in_exchange, site);
  }
  return warp.value[lane];
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- exchanges

uint64_t exchange(Exchange kind, uint32_t mask, uint64_t value, uint32_t operand, Site site) {
  return meet_in_warp(static_cast<uint8_t>(kind), mask, value, operand, site);
}

void sync_warp(uint32_t mask, Site site) { meet_in_warp(kSyncWarp, mask, 0, 0, site); }

void sync_block(Site site) {
  Fiber& me = Machine::me();
  Block& block = *me.block;
  must_not_poll(me, site);
  if (block.num_in_barrier == 0) {
    block.first_in_barrier = &me;
  } else if (const Site first = block.first_in_barrier->site;
             first.line != site.line || (first.file != site.file && std::strcmp(first.file, site.file) != 0)) {
    fault(site, "divergent barrier: thread %u of this block waits at another one, %s:%d",
          block.first_in_barrier->linear, short_path(first.file), first.line);
  }
  me.site = site;
  ++block.num_in_barrier;
  me.warp->in_barrier |= 1u << me.lane;
  const bool last = block.num_in_barrier == block.num_alive;
  if (last) machine.check_barrier(block);
  if (!last) machine.block_me(State::in_barrier, site);
}

// Opens the barrier if every thread that has not exited stands in it. The caller may be one of them, and goes on.
void Machine::check_barrier(Block& block) {
  if (block.num_in_barrier == 0 || block.num_in_barrier < block.num_alive) return;
  if (block.first_exited != nullptr) {
    fault(block.first_in_barrier->site,
          "barrier: thread %u has exited while %u threads of the block wait, thread %u first",
          block.first_exited->linear, block.num_in_barrier, block.first_in_barrier->linear);
  }
  if (block.view != nullptr) {
    for (uint32_t i = 0; i < block.num_threads; ++i) merge_up(block.fibers[i].view);
    for (uint32_t w = 0; w < block.num_warps; ++w) merge_up(block.warps[w].view);
  }
  progress();
  block.num_in_barrier = 0;
  for (uint32_t w = 0; w < block.num_warps; ++w) {
    Warp& warp = block.warps[w];
    uint32_t lanes = warp.in_barrier;
    warp.in_barrier = 0;
    if (&warp == me().warp) lanes &= ~(1u << me().lane);
    if (lanes != 0) make_runnable(warp, lanes);
  }
}

void* shared_memory(size_t bytes, Site site) {
  Block& block = *Machine::me().block;
  const size_t reserved = block.rank->running().launch.shared_bytes;
  if (bytes > reserved) {
    fault(site, "takes %zu bytes of shared memory, the launch reserved %zu", bytes, reserved);
  }
  return block.shared;
}

// --------------------------------------------------------------------------------------------------------------- time

uint64_t now_ns() {
  Fiber& me = Machine::me();
  machine.advance_time(kClockStepNs);  // so that a loop that only waits for a time gets there
  machine.may_yield(8, me.site);
  return machine.time_ns();
}

void sleep_ns(uint64_t duration_ns, Site site) {
  must_not_poll(Machine::me(), site);
  if (machine.too_long_without_progress()) machine.yield(site);  // which is the fault
  machine.park_me(State::sleeping, machine.time_ns() + duration_ns, site);
}

bool wait(bool (*poll)(void*), void* argument, uint64_t deadline_ns, Site site) {
  Fiber& me = Machine::me();
  must_not_poll(me, site);
  me.site = site;
  for (;;) {
    me.polling = true;
    me.polled_begin = UINTPTR_MAX;
    me.polled_end = 0;
    const bool result = poll(argument);
    me.polling = false;
    if (result) {
      machine.progress();
      machine.note_event();
      return true;
    }
    if (machine.time_ns() > deadline_ns) {
      if (machine.too_long_without_progress()) machine.yield(site);  // the fault: waits again and again in vain
      machine.note_event();
      return false;
    }
    me.polled_at = machine.events();
    machine.park_me(State::waiting, deadline_ns, site);
  }
}

}  // namespace simt
