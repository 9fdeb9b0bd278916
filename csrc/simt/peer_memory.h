// The memory that several ranks write: a model just weak enough that a missing release or acquire changes a result.
//
// Two things may go wrong for a kernel that orders its accesses badly, and both are drawn from the seed:
//   held-back stores  a weak or relaxed store may wait in a queue, overtaken by later stores to other addresses;
//   stale loads       a weak or relaxed load may return a value from before commits that the thread has not acquired.
// What a thread has stored and seen is kept in Views, one per thread, warp, block and rank. A barrier moves what the
// threads below it know into the view above, which is what makes a release cumulative: it publishes the whole chain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simt/random.h"
#include "simt/simt.h"

namespace simt {

// Stores are kept in pieces that lie inside one 16-byte granule, so that two pieces overlap or do not.
struct HeldStore {
  uintptr_t granule;
  uint8_t offset, length;
  unsigned char data[16];
};

struct View {
  View* parent = nullptr;  // thread -> warp -> block -> rank
  int rank = 0;
  size_t most_held = 0;

  std::vector<HeldStore> held;     // in program order; older than everything held by the views below
  uint16_t held_by_hash[64] = {};  // how many of them per hash of their granule: most loads find nothing here
  size_t holding_index = 0;

  std::unordered_map<uintptr_t, uint64_t> seen;  // per granule, the newest commit seen: never read anything older
  uint64_t gpu_mark = 0;                         // commits of the own rank up to here are acquired
  uint64_t sys_mark = 0;                         // commits of every rank up to here are acquired
  uint64_t released = 0;  // rank views: the largest sys_mark any thread of the rank had when it released
};

class PeerMemory {
 public:
  void add_range(uintptr_t begin, size_t bytes);
  void remove_range(uintptr_t begin);
  bool any_range() const { return !ranges_.empty(); }
  bool contains(uintptr_t address, size_t bytes) const;

  void begin(Random* random, uint32_t chance_percent, size_t num_ranks, Counters* counters);
  void end();  // forgets history; held stores must have been committed, or the launch failed

  View* create_view(View* parent, int rank, size_t most_held);
  void merge_up(View& view);  // a barrier: everything it holds and knows goes to its parent
  // Its thread, warp or block is gone. What it holds is nobody's to publish any more and goes to a view of orphans.
  void retire(View* view, View& orphans);
  void retire_and_commit(View* view);  // the end of a kernel

  void load(View& view, void* destination, uintptr_t source, size_t bytes, bool fresh);
  void store(View& view, uintptr_t destination, const void* source, size_t bytes, bool may_hold);
  // Before a read-modify-write of the newest value: commits what the chain holds of these bytes.
  void settle(View& view, uintptr_t address, size_t bytes);

  void publish(View& view, Scope scope);  // the effect of a release
  void acquire(View& view, Scope scope);

  size_t num_held() const { return num_held_; }
  uintptr_t commit_one();  // a random store that may go next; returns its granule

 private:
  struct Range {
    uintptr_t begin, end;
  };
  struct Version {  // what a granule held before a commit
    uint64_t commit;
    int rank;
    unsigned char old_bytes[16];
  };
  struct History {
    static constexpr int kMost = 4;
    Version versions[kMost];  // oldest first
    int count = 0;
  };

  void load_piece(View& view, unsigned char* destination, uintptr_t granule, int offset, int length, bool fresh);
  void overlay(const View* view, unsigned char* bytes, uintptr_t granule, int offset, int length) const;
  void hold(View& view, const HeldStore& store);
  void append(View& view, const HeldStore& store);
  void erase(View& view, size_t index);
  void drop_held(View& view);
  void move_held(View& from, View& to);
  void move_seen(View& from, View& to);
  void raise_to(View& root, View& view);
  void commit(View& view, const HeldStore& store);
  size_t earliest_before(const View& view, size_t index) const;
  void commit_at(View& view, size_t index);
  void commit_overlapping(View* view, uintptr_t granule, int offset, int length);
  void commit_all(View& view);
  void note_seen(View& view, uintptr_t granule, uint64_t commit);

  std::vector<Range> ranges_;
  std::unordered_map<uintptr_t, History> history_;
  uint64_t commits_ = 0;

  std::vector<std::unique_ptr<View>> views_;  // all ever made; `unused_` can be taken again
  std::vector<View*> unused_;
  std::vector<View*> holding_;  // views with held stores
  size_t num_held_ = 0;

  Random* random_ = nullptr;
  Counters* counters_ = nullptr;
  uint32_t chance_percent_ = 0;
  size_t num_ranks_ = 1;
};

}  // namespace simt
