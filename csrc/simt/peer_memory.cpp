#include "simt/peer_memory.h"

#include <algorithm>
#include <cstring>

namespace simt {
namespace {

constexpr size_t kMostGranulesWithHistory = 1
                                            << 16;  // then all history is dropped: fewer stale loads, never a wrong one
constexpr size_t kMostSeen = 1 << 12;               // then the view counts as having acquired everything

int hash(uintptr_t granule) { return static_cast<int>((granule >> 4) * 0x9E3779B97F4A7C15u >> 58); }

bool overlaps(const HeldStore& store, uintptr_t granule, int offset, int length) {
  return store.granule == granule && store.offset < offset + length && offset < store.offset + store.length;
}

// Calls piece(granule, offset, length, position) for the parts of [address, address + bytes) in 16-byte granules.
template <class Piece>
void split(uintptr_t address, size_t bytes, Piece&& piece) {
  for (size_t position = 0; position < bytes;) {
    const uintptr_t granule = (address + position) & ~uintptr_t{15};
    const int offset = static_cast<int>((address + position) & 15);
    const int length = static_cast<int>(std::min<size_t>(16 - offset, bytes - position));
    piece(granule, offset, length, position);
    position += length;
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ ranges, views

void PeerMemory::add_range(uintptr_t begin, size_t bytes) { ranges_.push_back({begin, begin + bytes}); }

void PeerMemory::remove_range(uintptr_t begin) {
  std::erase_if(ranges_, [=](const Range& range) { return range.begin == begin; });
}

bool PeerMemory::contains(uintptr_t address, size_t bytes) const {
  for (const Range& range : ranges_) {
    if (address >= range.begin && address + bytes <= range.end) return true;
  }
  return false;
}

void PeerMemory::begin(Random* random, uint32_t chance_percent, size_t num_ranks, Counters* counters) {
  random_ = random;
  chance_percent_ = chance_percent;
  num_ranks_ = num_ranks;
  counters_ = counters;
}

void PeerMemory::end() {
  history_.clear();
  holding_.clear();
  unused_.clear();
  views_.clear();
  num_held_ = 0;
}

View* PeerMemory::create_view(View* parent, int rank, size_t most_held) {
  if (unused_.empty()) {
    views_.push_back(std::make_unique<View>());
    unused_.push_back(views_.back().get());
  }
  View* view = unused_.back();
  unused_.pop_back();
  view->parent = parent;
  view->rank = rank;
  view->most_held = most_held;
  view->seen.clear();
  // A kernel begins after everything before it; the threads inherit this through the chain.
  view->gpu_mark = view->sys_mark = parent == nullptr ? commits_ : 0;
  view->released = 0;
  return view;
}

void PeerMemory::retire(View* view, View& orphans) {
  for (const HeldStore& store : view->held) {
    commit_overlapping(view->parent, store.granule, store.offset, store.length);
    hold(orphans, store);
  }
  drop_held(*view);
  unused_.push_back(view);
}

void PeerMemory::retire_and_commit(View* view) {
  commit_all(*view);
  unused_.push_back(view);
}

void PeerMemory::merge_up(View& view) {
  move_held(view, *view.parent);
  move_seen(view, *view.parent);
  view.parent->gpu_mark = std::max(view.parent->gpu_mark, view.gpu_mark);
  view.parent->sys_mark = std::max(view.parent->sys_mark, view.sys_mark);
}

// ------------------------------------------------------------------------------------------------------- held stores

void PeerMemory::append(View& view, const HeldStore& store) {
  if (view.held.empty()) {
    view.holding_index = holding_.size();
    holding_.push_back(&view);
  }
  view.held.push_back(store);
  ++view.held_by_hash[hash(store.granule)];
  ++num_held_;
}

void PeerMemory::hold(View& view, const HeldStore& store) {
  append(view, store);
  while (view.held.size() > view.most_held) {
    commit_at(view, earliest_before(view, random_->below(static_cast<uint32_t>(view.held.size()))));
  }
}

void PeerMemory::erase(View& view, size_t index) {
  --view.held_by_hash[hash(view.held[index].granule)];
  --num_held_;
  view.held.erase(view.held.begin() + static_cast<ptrdiff_t>(index));
  if (view.held.empty()) {
    holding_.back()->holding_index = view.holding_index;
    std::swap(holding_[view.holding_index], holding_.back());
    holding_.pop_back();
  }
}

void PeerMemory::drop_held(View& view) {
  while (!view.held.empty()) erase(view, view.held.size() - 1);
}

void PeerMemory::move_held(View& from, View& to) {
  for (const HeldStore& store : from.held) hold(to, store);
  drop_held(from);
}

void PeerMemory::move_seen(View& from, View& to) {
  for (const auto& [granule, commit] : from.seen) note_seen(to, granule, commit);
  from.seen.clear();
}

// The first in program order of those that must be committed before the store at `index`, or `index` itself.
size_t PeerMemory::earliest_before(const View& view, size_t index) const {
  for (size_t i = 0; i < index;) {
    const HeldStore& store = view.held[index];
    if (overlaps(view.held[i], store.granule, store.offset, store.length)) {
      index = i;
      i = 0;
    } else {
      ++i;
    }
  }
  return index;
}

void PeerMemory::commit_at(View& view, size_t index) {
  const HeldStore store = view.held[index];
  commit_overlapping(view.parent, store.granule, store.offset, store.length);
  erase(view, index);
  commit(view, store);
}

void PeerMemory::commit_overlapping(View* view, uintptr_t granule, int offset, int length) {
  if (view == nullptr) return;
  commit_overlapping(view->parent, granule, offset, length);
  if (view->held_by_hash[hash(granule)] == 0) return;
  for (size_t i = 0; i < view->held.size();) {
    if (overlaps(view->held[i], granule, offset, length)) {
      commit_at(*view, earliest_before(*view, i));
      i = 0;
    } else {
      ++i;
    }
  }
}

void PeerMemory::commit_all(View& view) {
  for (const HeldStore& store : view.held) {  // in program order, which keeps same-address order
    commit_overlapping(view.parent, store.granule, store.offset, store.length);
    commit(view, store);
  }
  drop_held(view);
}

uintptr_t PeerMemory::commit_one() {
  View& view = *holding_[random_->below(static_cast<uint32_t>(holding_.size()))];
  const size_t index = earliest_before(view, random_->below(static_cast<uint32_t>(view.held.size())));
  const uintptr_t granule = view.held[index].granule;
  commit_at(view, index);
  return granule;
}

// Writes memory, and keeps what it replaces. Whoever shares the view has read the store already and must go on seeing
// it.
void PeerMemory::commit(View& view, const HeldStore& store) {
  if (history_.size() >= kMostGranulesWithHistory) history_.clear();
  History& history = history_[store.granule];
  if (history.count == History::kMost) {
    std::copy(history.versions + 1, history.versions + History::kMost, history.versions);
    --history.count;
  }
  Version& version = history.versions[history.count++];
  version.commit = ++commits_;
  version.rank = view.rank;
  uintptr_t begin = store.granule, end = store.granule + 16;  // never touch bytes outside the range
  for (const Range& range : ranges_) {
    if (store.granule + store.offset < range.begin || store.granule + store.offset >= range.end) continue;
    begin = std::max(begin, range.begin);
    end = std::min(end, range.end);
  }
  std::memcpy(version.old_bytes + (begin - store.granule), reinterpret_cast<const void*>(begin), end - begin);
  std::memcpy(reinterpret_cast<void*>(store.granule + store.offset), store.data + store.offset, store.length);
  note_seen(view, store.granule, version.commit);
}

// ------------------------------------------------------------------------------------------------------------- access

void PeerMemory::store(View& view, uintptr_t destination, const void* source, size_t bytes, bool may_hold) {
  split(destination, bytes, [&](uintptr_t granule, int offset, int length, size_t position) {
    HeldStore piece;
    piece.granule = granule;
    piece.offset = static_cast<uint8_t>(offset);
    piece.length = static_cast<uint8_t>(length);
    std::memcpy(piece.data + offset, static_cast<const unsigned char*>(source) + position, length);
    if (may_hold && random_->percent(chance_percent_)) {
      ++counters_->held_stores;
      hold(view, piece);
    } else {
      commit_overlapping(&view, granule, offset, length);
      commit(view, piece);
    }
  });
}

void PeerMemory::settle(View& view, uintptr_t address, size_t bytes) {
  split(address, bytes,
        [&](uintptr_t granule, int offset, int length, size_t) { commit_overlapping(&view, granule, offset, length); });
}

void PeerMemory::load(View& view, void* destination, uintptr_t source, size_t bytes, bool fresh) {
  split(source, bytes, [&](uintptr_t granule, int offset, int length, size_t position) {
    load_piece(view, static_cast<unsigned char*>(destination) + position, granule, offset, length, fresh);
  });
}

void PeerMemory::load_piece(View& view, unsigned char* destination, uintptr_t granule, int offset, int length,
                            bool fresh) {
  std::memcpy(destination, reinterpret_cast<const void*>(granule + offset), length);
  if (auto found = history_.find(granule); found != history_.end()) {
    const History& history = found->second;
    uint64_t gpu_mark = 0, sys_mark = 0, seen = 0;
    for (const View* level = &view; level != nullptr; level = level->parent) {
      gpu_mark = std::max(gpu_mark, level->gpu_mark);
      sys_mark = std::max(sys_mark, level->sys_mark);
      if (auto entry = level->seen.find(granule); entry != level->seen.end()) seen = std::max(seen, entry->second);
    }
    // Commits, newest first, that nothing obliges this thread to see.
    int unseen = 0;
    for (; unseen < history.count; ++unseen) {
      const Version& version = history.versions[history.count - 1 - unseen];
      const uint64_t mark = version.rank == view.rank ? std::max(gpu_mark, sys_mark) : sys_mark;
      if (version.commit <= mark || version.commit <= seen) break;
    }
    if (unseen > 0) {
      if (!fresh && random_->percent(chance_percent_)) {
        const Version& version = history.versions[history.count - 1 - static_cast<int>(random_->below(unseen))];
        if (std::memcmp(destination, version.old_bytes + offset, length) != 0) ++counters_->stale_loads;
        std::memcpy(destination, version.old_bytes + offset, length);
        note_seen(view, granule, version.commit - 1);
      } else {
        note_seen(view, granule, history.versions[history.count - 1].commit);
      }
    }
  }
  overlay(&view, destination, granule, offset, length);
}

// Own stores that are still held back, oldest first.
void PeerMemory::overlay(const View* view, unsigned char* bytes, uintptr_t granule, int offset, int length) const {
  if (view == nullptr) return;
  overlay(view->parent, bytes, granule, offset, length);
  if (view->held_by_hash[hash(granule)] == 0) return;
  for (const HeldStore& store : view->held) {
    if (!overlaps(store, granule, offset, length)) continue;
    const int first = std::max<int>(offset, store.offset);
    const int last = std::min<int>(offset + length, store.offset + store.length);
    std::memcpy(bytes + (first - offset), store.data + first, last - first);
  }
}

void PeerMemory::note_seen(View& view, uintptr_t granule, uint64_t commit) {
  if (view.seen.size() >= kMostSeen) {
    view.seen.clear();
    view.gpu_mark = view.sys_mark = commits_;
    return;
  }
  uint64_t& seen = view.seen[granule];
  seen = std::max(seen, commit);
}

// ----------------------------------------------------------------------------------------------------------- ordering

// Moves what the chain from `view` up holds and has seen to its rank's view, oldest first.
void PeerMemory::raise_to(View& root, View& view) {
  root.released = std::max(root.released, view.sys_mark);
  if (&view == &root) return;
  raise_to(root, *view.parent);
  move_held(view, root);
  move_seen(view, root);
}

void PeerMemory::publish(View& view, Scope scope) {
  View* root = &view;
  while (root->parent != nullptr) root = root->parent;
  raise_to(*root, view);
  if (scope == Scope::sys || num_ranks_ == 1) {
    commit_all(*root);
    return;
  }
  // Ordered for this rank only: its threads read it through the rank's view, the others see it when it is committed.
  for (size_t half = root->held.size() / 2; root->held.size() > half;) {
    commit_at(*root, earliest_before(*root, random_->below(static_cast<uint32_t>(root->held.size()))));
  }
}

void PeerMemory::acquire(View& view, Scope scope) {
  view.gpu_mark = commits_;
  if (scope == Scope::sys || num_ranks_ == 1) {
    view.sys_mark = commits_;
    view.seen.clear();
  } else {
    const View* root = &view;
    while (root->parent != nullptr) root = root->parent;
    view.sys_mark = std::max(view.sys_mark, root->released);  // what the releaser had acquired is passed on
  }
}

}  // namespace simt
