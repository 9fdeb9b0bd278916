// The host's door to the emulator: launches, groups of launches, options. One launch or group runs at a time.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>

#include "simt/machine.h"

namespace simt {
namespace {

std::mutex machine_mutex;

struct Group {
  int rank = 0;
  std::map<int, Rank> ranks;
};
thread_local std::optional<Group> group;  // open on this host thread
thread_local bool inside_launch = false;

std::mutex launched_mutex;
std::vector<Launched> all_launched;

void note_launched(const Launch& launch) {
  const std::lock_guard lock(launched_mutex);
  if (all_launched.size() == kMostLaunched) return;
  Launched one{{}, 0, launch};
  one.launch.kernel = "";
  Dl_info place;
  if (dladdr(launch.function, &place) != 0) {
    one.library = place.dli_fname;
    one.offset = reinterpret_cast<uintptr_t>(launch.function) - reinterpret_cast<uintptr_t>(place.dli_fbase);
  }
  all_launched.push_back(std::move(one));
}

bool give_report(const std::string& text, char* report, size_t report_bytes) {
  if (report_bytes > 0) std::snprintf(report, report_bytes, "%s", text.c_str());
  return false;
}

bool run_ranks(std::vector<Rank> ranks, bool name_ranks, char* report, size_t report_bytes) {
  if (ranks.empty()) return true;
  const std::lock_guard lock(machine_mutex);
  inside_launch = true;
  const bool ok = machine.run(std::move(ranks), name_ranks);
  inside_launch = false;
  return ok || give_report(machine.report(), report, report_bytes);
}

void note_registered() { all_memory_plain = !machine.peers().any_range() && machine.multicasts().empty(); }

}  // namespace

bool run(const Launch& launch, std::function<void()> body, char* report, size_t report_bytes) {
  const std::string name = launch.kernel;
  if (inside_launch) return give_report("kernel '" + name + "': launched from inside a kernel", report, report_bytes);
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024) {
    return give_report("kernel '" + name + "': a block must have 1 to 1024 threads, not " + std::to_string(threads),
                       report, report_bytes);
  }
  note_launched(launch);
  QueuedLaunch queued{launch, name, std::move(body)};
  if (group) {
    Rank& rank = group->ranks[group->rank];
    rank.number = group->rank;
    rank.launches.push_back(std::move(queued));
    return true;
  }
  std::vector<Rank> ranks(1);
  ranks[0].launches.push_back(std::move(queued));
  return run_ranks(std::move(ranks), false, report, report_bytes);
}

void begin_group() { group.emplace(); }

void set_rank(int rank) {
  if (group) group->rank = rank;
}

bool run_group(char* report, size_t report_bytes) {
  if (!group) return give_report("run_group without begin_group", report, report_bytes);
  std::vector<Rank> ranks;
  for (auto& [number, rank] : group->ranks) ranks.push_back(std::move(rank));
  group.reset();
  return run_ranks(std::move(ranks), true, report, report_bytes);
}

void discard_group() { group.reset(); }

void register_peer_memory(const void* begin, size_t bytes) {
  const std::lock_guard lock(machine_mutex);
  machine.peers().add_range(reinterpret_cast<uintptr_t>(begin), bytes);
  note_registered();
}

void unregister_peer_memory(const void* begin) {
  const std::lock_guard lock(machine_mutex);
  machine.peers().remove_range(reinterpret_cast<uintptr_t>(begin));
  note_registered();
}

void register_multicast(const void* begin, size_t bytes, void* const* rank_begins, int num_ranks) {
  const std::lock_guard lock(machine_mutex);
  const auto first = reinterpret_cast<uintptr_t>(begin);
  Multicast multicast{first, first + bytes, {}};
  for (int rank = 0; rank < num_ranks; ++rank) {
    multicast.rank_begins.push_back(reinterpret_cast<uintptr_t>(rank_begins[rank]));
  }
  machine.multicasts().push_back(std::move(multicast));
  note_registered();
}

void unregister_multicast(const void* begin) {
  const std::lock_guard lock(machine_mutex);
  std::erase_if(machine.multicasts(),
                [=](const Multicast& range) { return range.begin == reinterpret_cast<uintptr_t>(begin); });
  note_registered();
}

void set_options(const Options& options) {
  const std::lock_guard lock(machine_mutex);
  machine.set_options(options);
  const std::lock_guard launched_lock(launched_mutex);
  all_launched.clear();
}

std::vector<Launched> launched() {
  const std::lock_guard lock(launched_mutex);
  return all_launched;
}

Options options() {
  const std::lock_guard lock(machine_mutex);
  return machine.options();
}

Counters counters() {
  const std::lock_guard lock(machine_mutex);
  return machine.counters();
}

}  // namespace simt
