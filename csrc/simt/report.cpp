// Faults in words. A report names kernel, rank, block, thread and the line of the kernel's source.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>

#include "simt/machine.h"

namespace simt {
namespace {

std::string index_text(Dim3 index, Dim3 extent) {
  if (extent.y == 1 && extent.z == 1) return std::to_string(index.x);
  std::string text = "(" + std::to_string(index.x) + "," + std::to_string(index.y);
  if (extent.z > 1) text += "," + std::to_string(index.z);
  return text + ")";
}

std::string site_text(Site site) { return std::string(short_path(site.file)) + ":" + std::to_string(site.line); }

}  // namespace

// The last three parts of a path say enough, and reports must not depend on where the project was built.
const char* short_path(const char* file) {
  const char* begin = file + std::strlen(file);
  for (int slashes = 0; begin != file; --begin) {
    if (begin[-1] == '/' && ++slashes == 3) break;
  }
  return begin;
}

std::string Machine::name_of(const Fiber& fiber) const {
  const Rank& rank = *fiber.block->rank;
  std::string name = "kernel '" + rank.running().kernel + "'";
  if (name_ranks_) name += ", rank " + std::to_string(rank.number);
  name += ", block " + index_text(fiber.block_idx, fiber.grid_dim);
  name += ", thread " + std::to_string(fiber.linear);
  if (fiber.block_dim.y > 1 || fiber.block_dim.z > 1) name += " " + index_text(fiber.thread_idx, fiber.block_dim);
  return name;
}

void Machine::fail(std::string message) {
  if (report_.empty()) report_ = std::move(message);
}

void Machine::fail_from_thread(Site site, const char* format, va_list arguments) {
  char message[512];
  std::vsnprintf(message, sizeof(message), format, arguments);
  fail(name_of(me()) + ": " + message + " [" + site_text(site) + "]");
  switch_context(me().context, scheduler_);
  __builtin_unreachable();  // a failed launch resumes nobody
}

void fault(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (current != nullptr) machine.fail_from_thread(site, format, arguments);
  std::fprintf(stderr, "%s: outside a kernel: ", site_text(site).c_str());
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// Nobody can go on: who waits where, threads in the same place together.
void Machine::describe_stall() {
  std::map<std::tuple<int, State, std::string, uint32_t>, std::pair<size_t, std::string>> groups;
  std::string kernel;
  for (const Rank& rank : ranks_) {
    if (rank.done()) continue;
    kernel = rank.running().kernel;
    for (const auto& block : rank.blocks) {
      if (block->num_alive == 0 || block->rank != &rank) continue;
      for (uint32_t i = 0; i < block->num_threads; ++i) {
        const Fiber& fiber = block->fibers[i];
        if (fiber.state == State::exited) continue;
        const uint32_t mask = fiber.state == State::in_exchange ? fiber.warp->mask[fiber.lane] : 0;
        auto& [count, names] = groups[{rank.number, fiber.state, site_text(fiber.site), mask}];
        if (++count <= 3) {
          names += (count == 1 ? "block " : ", block ") + index_text(fiber.block_idx, fiber.grid_dim) + " thread " +
                   std::to_string(fiber.linear);
        }
      }
    }
  }
  std::string text = "kernel '" + kernel + "': hang, no thread can make progress";
  for (const auto& [key, group] : groups) {
    const auto& [rank, state, site, mask] = key;
    const auto& [count, names] = group;
    text += "; " + std::to_string(count) + (count == 1 ? " thread" : " threads");
    if (name_ranks_) text += " of rank " + std::to_string(rank);
    text += state == State::waiting      ? " in wait_until"
            : state == State::in_barrier ? " at a block barrier"
                                         : " in a warp exchange";
    if (state == State::in_exchange) {
      char number[32];
      std::snprintf(number, sizeof(number), " with mask 0x%08x", mask);
      text += number;
    }
    text += " [" + site + "]: " + names + (count > 3 ? ", ..." : "");
  }
  fail(text);
}

}  // namespace simt
