// Launches and blocks: what exists before their threads run, and what is checked when they have ended.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr uint64_t kStartTime = 1'000'000'000;
constexpr size_t kStacksKept = 8192;  // memory of more is given back after a launch
constexpr size_t kSharedCanaryBytes = 64;
constexpr unsigned char kSharedCanary = 0xa5;
constexpr const char* kStackOverflow = "stack overflow";
constexpr size_t kThreadHolds = 64, kSharedHolds = 1024;  // held-back stores of one thread; of a warp, block or rank

}  // namespace

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
    if (overflowed && report_.find(kStackOverflow) == std::string::npos)
      report_ += std::string(", after a ") + kStackOverflow;
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
      if (peers_.any_range()) {
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
  std::memset(block.shared + launch.shared_bytes, kSharedCanary, kSharedCanaryBytes);

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
    if (static_cast<unsigned char>(block.shared[shared_bytes + i]) == kSharedCanary) continue;
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

}  // namespace simt
