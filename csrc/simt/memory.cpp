// What a running kernel calls to reach memory: loads, stores, atomics, fences, and their multicast forms.
#include <algorithm>
#include <cstring>
#include <utility>

#include "simt/machine.h"

namespace simt {

bool all_memory_plain = true;

namespace {

bool is_acquire(Order order) { return order == Order::acquire || order == Order::acq_rel; }
bool is_release(Order order) { return order == Order::release || order == Order::acq_rel; }

uintptr_t checked_address(const void* pointer, size_t bytes, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes != 0) fault(site, "address %p of a %zu-byte access is not aligned", pointer, bytes);
  return address;
}

// Of an ordinary access.
uintptr_t unicast_address(const void* pointer, size_t bytes, Site site) {
  const uintptr_t address = checked_address(pointer, bytes, site);
  for (const Multicast& range : machine.multicasts()) {
    if (address < range.end && address + bytes > range.begin) {
      fault(site, "only multimem instructions may touch a multicast address (%p)", pointer);
    }
  }
  return address;
}

// What a multicast address stands for: the rank buffers' addresses, in the order in which they are reached this time.
struct RankAddresses {
  uintptr_t address[kMostMulticastRanks];
  int count;
};

RankAddresses rank_addresses(const void* multicast, size_t bytes, Site site) {
  const uintptr_t address = checked_address(multicast, bytes, site);
  for (const Multicast& range : machine.multicasts()) {
    if (address < range.begin || address + bytes > range.end) continue;
    RankAddresses ranks;
    ranks.count = static_cast<int>(range.rank_begins.size());
    for (int i = 0; i < ranks.count; ++i) ranks.address[i] = range.rank_begins[i] + (address - range.begin);
    for (int i = ranks.count - 1; i > 0; --i) {
      std::swap(ranks.address[i], ranks.address[machine.random().below(static_cast<uint32_t>(i) + 1)]);
    }
    return ranks;
  }
  fault(site, "a multimem instruction needs a multicast address: %p is in no registered range", multicast);
}

// A poll is run again when memory changes that it has read.
void note_polled(Fiber& me, uintptr_t address, size_t bytes) {
  if (!me.polling) return;
  me.polled_begin = std::min(me.polled_begin, address);
  me.polled_end = std::max(me.polled_end, address + bytes);
}

void acquire(Scope scope) {
  if (machine.peers().any_range()) machine.peers().acquire(machine.view_of(Machine::me()), scope);
}

void publish(Scope scope) {
  if (machine.peers().any_range()) machine.peers().publish(machine.view_of(Machine::me()), scope);
}

void load_now(void* destination, uintptr_t source, size_t bytes, bool fresh) {
  Fiber& me = Machine::me();
  note_polled(me, source, bytes);
  if (machine.peers().contains(source, bytes)) {
    machine.peers().load(machine.view_of(me), destination, source, bytes, me.polling || fresh);
  } else {
    std::memcpy(destination, reinterpret_cast<const void*>(source), bytes);
  }
}

void store_now(uintptr_t destination, const void* source, size_t bytes, bool may_hold) {
  if (machine.peers().contains(destination, bytes)) {
    machine.peers().store(machine.view_of(Machine::me()), destination, source, bytes, may_hold);
  } else {
    std::memcpy(reinterpret_cast<void*>(destination), source, bytes);
  }
}

// Replaces the newest value by change(value), whoever wrote it.
template <class Change>
uint64_t change_now(uintptr_t address, size_t bytes, Change&& change) {
  PeerMemory& peers = machine.peers();
  if (peers.contains(address, bytes)) peers.settle(machine.view_of(Machine::me()), address, bytes);
  uint64_t old = 0;
  std::memcpy(&old, reinterpret_cast<const void*>(address), bytes);
  const uint64_t desired = change(old);
  store_now(address, &desired, bytes, false);  // even if equal: the thread has then seen the newest value
  return old;
}

template <class Change>
uint64_t read_modify_write(void* pointer, size_t bytes, Order order, Scope scope, Site site, Change&& change) {
  const uintptr_t address = unicast_address(pointer, bytes, site);
  machine.may_yield(8, site);
  note_polled(Machine::me(), address, bytes);
  if (is_release(order)) publish(scope);
  const uint64_t old = change_now(address, bytes, change);
  if (is_acquire(order)) acquire(scope);
  return old;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- one
// address

void load(void* destination, const void* source, size_t bytes, Order order, Scope scope, Site site) {
  const uintptr_t address = unicast_address(source, bytes, site);
  if (order != Order::weak) {
    machine.may_yield(8, site);
  } else if (machine.peers().contains(address, bytes)) {
    machine.may_yield(32, site);
  }
  load_now(destination, address, bytes, is_acquire(order));
  if (is_acquire(order)) acquire(scope);
}

void store(void* destination, const void* source, size_t bytes, Order order, Scope scope, Site site) {
  const uintptr_t address = unicast_address(destination, bytes, site);
  if (order != Order::weak) machine.may_yield(8, site);
  if (is_release(order)) publish(scope);
  store_now(address, source, bytes, !is_release(order));
}

uint64_t compare_and_swap(void* address, size_t bytes, uint64_t expected, uint64_t desired, Order order, Scope scope,
                          Site site) {
  return read_modify_write(address, bytes, order, scope, site,
                           [=](uint64_t old) { return old == expected ? desired : old; });
}

uint64_t fetch_add(void* address, size_t bytes, uint64_t value, Order order, Scope scope, Site site) {
  return read_modify_write(address, bytes, order, scope, site, [=](uint64_t old) { return old + value; });
}

void fence(Scope scope, Site site) {
  machine.may_yield(8, site);
  publish(scope);
  acquire(scope);
}

// ------------------------------------------------------------------------------------------------------------
// multicast Ranks are reached one after the other, and other threads may come between.

void multimem_load_add(void* sum, const void* multicast, AddPieces add, Site site) {
  const RankAddresses ranks = rank_addresses(multicast, 16, site);
  alignas(16) unsigned char pieces[kMostMulticastRanks][16];
  for (int i = 0; i < ranks.count; ++i) {
    machine.may_yield(16, site);
    load_now(pieces[i], ranks.address[i], 16, false);
  }
  add(sum, pieces, ranks.count);
}

void multimem_store(void* multicast, const void* source, Site site) {
  const RankAddresses ranks = rank_addresses(multicast, 16, site);
  for (int i = 0; i < ranks.count; ++i) {
    machine.may_yield(16, site);
    store_now(ranks.address[i], source, 16, true);
  }
}

void multimem_add_release(void* multicast, uint64_t value, Site site) {
  const RankAddresses ranks = rank_addresses(multicast, 8, site);
  publish(Scope::sys);
  for (int i = 0; i < ranks.count; ++i) {
    machine.may_yield(8, site);
    change_now(ranks.address[i], 8, [=](uint64_t old) { return old + value; });
  }
}

}  // namespace simt
