// The SIMT emulator's interface: what the host twins in core/arch.cuh and core/launch.h call, and the controls tests
// use. One shared library (libtokenweave_emulator) holds its one state; see docs/emulator.md for what it can and cannot
// find. It runs one launch (or one group of launches) at a time; a second host thread waits its turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#define SIMT_API __attribute__((visibility("default")))

namespace simt {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// Where in a kernel something was called; made by the defaulted arguments of the arch:: functions.
struct Site {
  const char* file;
  int line;
};

enum class Order { weak, relaxed, acquire, release, acq_rel };
enum class Scope { gpu, sys };

// --- what a running thread sees
// ---------------------------------------------------------------------------------------

struct Thread {
  Dim3 thread_idx, block_idx, block_dim, grid_dim;
  uint32_t linear = 0;  // index in the block, x fastest; lane = linear % 32
};
SIMT_API extern Thread* current;  // null outside a launch

SIMT_API void sync_block(Site site);
SIMT_API void sync_warp(uint32_t mask, Site site);

enum class Exchange { shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot, any, all };
// All lanes of `mask` meet; each gets its result. `operand`: source lane, xor mask or delta.
SIMT_API uint64_t exchange(Exchange kind, uint32_t mask, uint64_t value, uint32_t operand, Site site);

// The block's shared memory, poisoned at block start; a fault if the launch reserved fewer bytes.
SIMT_API void* shared_memory(size_t bytes, Site site);

// Ends the launch with a report that names kernel, block, thread and site. Does not return to the kernel.
[[noreturn]] SIMT_API void fault(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// --- memory
// ----------------------------------------------------------------------------------------------------------- Addresses
// outside every registered peer range are plain memory. Inside one, stores may be held back until a release orders them
// and weak or relaxed loads may be stale until an acquire (docs/emulator.md, "The emulator's memory").

SIMT_API extern bool all_memory_plain;  // nothing is registered: streaming accesses need not come here
SIMT_API void load(void* destination, const void* source, size_t bytes, Order order, Scope scope, Site site);
SIMT_API void store(void* destination, const void* source, size_t bytes, Order order, Scope scope, Site site);
SIMT_API uint64_t compare_and_swap(void* address, size_t bytes, uint64_t expected, uint64_t desired, Order order,
                                   Scope scope, Site site);
SIMT_API uint64_t fetch_add(void* address, size_t bytes, uint64_t value, Order order, Scope scope, Site site);
SIMT_API void fence(Scope scope, Site site);

// Through a multicast address: 16 bytes of every rank (relaxed, sys), or a 64-bit word of every rank (release, sys).
// Ranks come in an order drawn from the seed; a kernel must give the same result in any.
using AddPieces = void (*)(void* sum, const void* pieces, int num_pieces);  // 16 bytes each, added in this order
SIMT_API void multimem_load_add(void* sum, const void* multicast, AddPieces add, Site site);
SIMT_API void multimem_store(void* multicast, const void* source, Site site);
SIMT_API void multimem_add_release(void* multicast, uint64_t value, Site site);

// --- time (virtual)
// ---------------------------------------------------------------------------------------------------

SIMT_API uint64_t now_ns();
SIMT_API void sleep_ns(uint64_t duration_ns, Site site);
// Parks the thread until poll(argument) is true (true) or virtual time passes deadline_ns (false).
SIMT_API bool wait(bool (*poll)(void*), void* argument, uint64_t deadline_ns, Site site);

// --- host side
// --------------------------------------------------------------------------------------------------------

struct Launch {
  const char* kernel = "";
  Dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  const void* function = nullptr;  // whose symbol names the template's instance
};

// Runs the kernel to its end (inside a group: queues it for the current rank). False: `report` says what went wrong.
SIMT_API bool run(const Launch& launch, std::function<void()> body, char* report, size_t report_bytes);

// Launches queued between begin_group and run_group run interleaved: launches of one rank in order, ranks side by side.
SIMT_API void begin_group();
SIMT_API void set_rank(int rank);
SIMT_API bool run_group(char* report, size_t report_bytes);
SIMT_API void discard_group();  // forgets what was queued

SIMT_API void register_peer_memory(const void* begin, size_t bytes);
SIMT_API void unregister_peer_memory(const void* begin);

// [begin, begin + bytes) stands for the same bytes of every rank's buffer, and is never read or written itself (it may
// be reserved without access). 16-byte aligned, all of it; at most kMostMulticastRanks ranks.
constexpr int kMostMulticastRanks = 64;
SIMT_API void register_multicast(const void* begin, size_t bytes, void* const* rank_begins, int num_ranks);
SIMT_API void unregister_multicast(const void* begin);

struct Options {
  uint64_t seed = 0;
  uint32_t resident_blocks = 4;     // of a normal launch, interleaved; a cooperative launch holds them all
  uint32_t hold_back_percent = 75;  // chance that a peer store is held back, and that a weak load is stale
  uint32_t max_grid = 0x7fffffff;   // blocks of a launch; lower, and kernels must stride over their work
  uint64_t switches_without_progress = 2'000'000;  // then: "spins outside wait_until"
};
SIMT_API void set_options(const Options& options);
SIMT_API Options options();

struct Counters {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t switches = 0;     // times a thread was resumed: the proof that something ran emulated
  uint64_t held_stores = 0;  // peer stores that were held back
  uint64_t stale_loads = 0;  // loads that were served an older value
};
SIMT_API Counters counters();

// What was launched since set_options, oldest first, at most kMostLaunched of it: instances and shapes, for tools.
constexpr size_t kMostLaunched = 1024;
struct Launched {
  std::string library;  // and where in it the kernel begins
  uint64_t offset = 0;
  Launch launch;  // without its name, which may be gone
};
SIMT_API std::vector<Launched> launched();

}  // namespace simt
