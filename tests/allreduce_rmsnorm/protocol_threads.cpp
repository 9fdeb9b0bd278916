// The ranks of a group as threads over ordinary memory, calling the CPU kernel that processes call, so that the thread
// sanitizer sees every access. x86 alone would hide a missing release. Usage: protocol_threads MODE WORLD_SIZE SEED.
// Prints what was wrong and returns nonzero; test_protocol.py compiles and runs it.
#include <sys/eventfd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

// Included, and in a namespace of its own (TOKENWEAVE_ISA), so that no dispatcher and no other instruction set is
// needed.
#include "allreduce_rmsnorm/allreduce_cpu.cpp"

namespace {

using namespace tokenweave;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kChannels = 2;
constexpr int64_t kMaxTokens = 9, kMaxColumns = 136;
constexpr int64_t kChannelBytes = kMaxTokens * kMaxColumns * 4;
constexpr uint64_t kNoHurry = 60'000'000'000;

std::atomic<int> problems{0};

#define EXPECT(condition, format, ...)                                                           \
  do {                                                                                           \
    if (!(condition) && problems.fetch_add(1) < 20) {                                            \
      std::printf("line %d: %s: " format "\n", __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__); \
    }                                                                                            \
  } while (false)

// A value that all ranks know without talking to each other.
uint64_t draw(std::initializer_list<uint64_t> key) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (uint64_t part : key) {
    state = (state ^ part) * 0xbf58476d1ce4e5b9u;
    state ^= state >> 29;
    state *= 0x94d049bb133111ebu;
    state ^= state >> 32;
  }
  return state;
}

struct Group {
  explicit Group(int world_size) : world_size(world_size), buffers(world_size), pads(world_size) {
    for (auto& buffer : buffers) buffer.resize(kChannels * kChannelBytes);
    for (auto& pad : pads) pad.resize(pad_words(kChannels));
  }

  // What rank `rank` passes for an empty call; a record of its own for every caller.
  AllreduceParams params(int rank, uint64_t* record) {
    AllreduceParams p;
    p.workspace.world_size = world_size;
    p.workspace.rank = rank;
    for (int peer = 0; peer < world_size; ++peer) {
      p.workspace.buffer[peer] = buffers[peer].data();
      p.workspace.pad[peer] = pads[peer].data();
    }
    p.workspace.record = record;
    p.hidden = 8;
    p.timeout_ns = kNoHurry;
    return p;
  }

  void run(const std::function<void(int rank)>& body, int first = 0) {
    std::vector<std::thread> threads;
    for (int rank = first; rank < world_size; ++rank) threads.emplace_back(body, rank);
    for (auto& thread : threads) thread.join();
  }

  int world_size;
  std::vector<std::vector<char>> buffers;
  std::vector<std::vector<uint64_t>> pads;
};

struct Outcome {
  Failure failure;
  Stage stage;
  int peer;
  uint64_t got;
  bool is_recoverable;
  double milliseconds;
};

Outcome call(const AllreduceParams& p) {
  for (int word = 0; word < kRecordWords; ++word) p.workspace.record[word] = 0;
  const auto begin = Clock::now();
  const Status status = allreduce_kernel(p, ExecutionContext{});
  const std::chrono::duration<double, std::milli> time = Clock::now() - begin;
  EXPECT(status.is_ok(), "%s", status.message());
  const uint64_t* record = p.workspace.record;
  return {static_cast<Failure>(record[kRecordFailure]),
          static_cast<Stage>(record[kRecordStage]),
          static_cast<int>(record[kRecordPeer]),
          record[kRecordGot],
          record[kRecordRecoverable] != 0,
          time.count()};
}

void refuse(const AllreduceParams& p) {
  EXPECT(refuse_allreduce_kernel(p, ExecutionContext{}).is_ok(), "a refusal cannot fail");
}

// ----------------------------------------------------------------------------------------- random calls, exact results

enum class Plan { succeed, refuse, disagree };  // the last two: what one rank does

struct Call {
  Call(uint64_t seed, int channel, uint64_t sequence, int world_size)
      : key(draw({seed, static_cast<uint64_t>(channel), sequence})),
        collective(static_cast<Collective>(draw({key, 1}) % 3)),
        dtype(static_cast<DType>(draw({key, 2}) % 3)),
        num_tokens(static_cast<int64_t>(draw({key, 3}) % kMaxTokens)),
        hidden(static_cast<int64_t>(8 + draw({key, 4}) % (kMaxColumns / 8) * 8)),
        is_staged(draw({key, 5}) % 2 != 0),
        culprit(static_cast<int>(draw({key, 6}) % static_cast<uint64_t>(world_size))) {
    const uint64_t chance = draw({key, 7}) % 16;
    plan = chance == 0 ? Plan::refuse : chance == 1 ? Plan::disagree : Plan::succeed;
  }

  // Small integers: sums are exact in every dtype, so that a wrong rank or row shows in the bits.
  float partial(int rank, int64_t row, int64_t column) const {
    return static_cast<float>(draw({key, 8, uint64_t(rank), uint64_t(row), uint64_t(column)}) % 16);
  }
  float sum(int world_size, int64_t row, int64_t column) const {
    float result = 0;
    for (int rank = 0; rank < world_size; ++rank) result += partial(rank, row, column);
    return result;
  }
  // A row of plus and minus the same power of two: its norm is exact.
  float h(int64_t row, int64_t column) const {
    const float magnitude = static_cast<float>(1u << draw({key, 9, uint64_t(row)}) % 4);
    return draw({key, 10, uint64_t(row), uint64_t(column)}) % 2 != 0 ? magnitude : -magnitude;
  }
  float weight(int64_t column) const { return static_cast<float>(1 + draw({key, 11, uint64_t(column)}) % 8); }
  float y(int world_size, int64_t row, int64_t column) const {
    if (collective == Collective::allreduce) return sum(world_size, row, column);
    return (h(row, column) > 0 ? 1.0f : -1.0f) * weight(column);
  }

  uint64_t key;
  Collective collective;
  DType dtype;
  int64_t num_tokens, hidden;
  bool is_staged;
  int culprit;
  Plan plan;
};

// One rank's part of one call: its tensors, and what they must hold afterwards.
template <class T>
void make_call(Group& group, int rank, int channel, uint64_t sequence, const Call& c) {
  const float nan = __builtin_nanf("");
  uint64_t record[kRecordWords] = {};
  AllreduceParams p = group.params(rank, record);
  p.collective = c.collective;
  p.num_tokens = c.num_tokens;
  p.hidden = c.hidden;
  p.dtype = c.dtype;
  p.offset = channel * kChannelBytes;
  p.channel = channel;
  p.sequence = sequence;

  // Rows two elements wider than they need be: strides are honoured, and no row but the first is aligned.
  const int64_t pitch = c.hidden + 2;
  const RowLayout layout{kMaxTokens, pitch, 0, pitch};
  std::vector<T> input(kMaxTokens * pitch), output(kMaxTokens * c.hidden), residual(kMaxTokens * pitch),
      weight(c.hidden);
  T* const zero_copy = reinterpret_cast<T*>(group.buffers[rank].data() + p.offset);
  const RowRange owned = owned_rows(c.num_tokens, group.world_size, rank);
  const bool is_gather = c.collective == Collective::gather, has_norm = c.collective == Collective::allreduce_rmsnorm;
  for (int64_t column = 0; column < c.hidden; ++column) {
    weight[column] = from_float<T>(c.weight(column));
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      const bool is_own = owned.begin <= row && row < owned.end;
      const float h = c.h(row, column);
      residual[row * pitch + column] = from_float<T>(!is_own     ? nan
                                                     : is_gather ? h
                                                                 : h - c.sum(group.world_size, row, column));
      output[row * c.hidden + column] = from_float<T>(nan);
      const T partial = from_float<T>(c.partial(rank, row, column));
      if (c.is_staged) input[row * pitch + column] = partial;
      if (!c.is_staged && !is_gather) zero_copy[row * c.hidden + column] = partial;
    }
  }
  p.input_rows = p.residual_rows = layout;
  if (c.is_staged && !is_gather) {
    p.input = input.data();
    p.output = output.data();
  }
  if (is_gather || has_norm) p.residual = residual.data();
  p.weight = weight.data();
  // Now and then a link, of another length on each rank: some are at the exit while others still sleep.
  const uint64_t link = draw({c.key, 21, uint64_t(rank)});
  if (c.key % 8 == 0) p.link_ns = 1 + link % 400'000;

  if (c.plan == Plan::refuse && rank == c.culprit) {
    refuse(p);
    return;
  }
  if (c.plan == Plan::disagree && rank == c.culprit) p.num_tokens += 1;
  const Outcome outcome = call(p);
  if (c.plan != Plan::succeed) {
    // A rank that comes late may find that a peer has long gone on to other calls: a disagreement as well.
    EXPECT(outcome.failure == Failure::disagreement || outcome.failure == Failure::refused,
           "rank %d call %lu: failure %d", rank, sequence, int(outcome.failure));
    EXPECT(outcome.stage == Stage::entry && outcome.is_recoverable, "rank %d call %lu", rank, sequence);
  } else {
    EXPECT(outcome.failure == Failure::none, "rank %d call %lu: failure %d at stage %d, peer %d", rank, sequence,
           int(outcome.failure), int(outcome.stage), outcome.peer);
  }

  // After a call that failed at its entry nothing has been written.
  const bool done = c.plan == Plan::succeed;
  int64_t wrong = 0;
  for (int64_t row = 0; row < c.num_tokens; ++row) {
    const bool is_own = owned.begin <= row && row < owned.end;
    for (int64_t column = 0; column < c.hidden; ++column) {
      const auto is = [&](T actual, float expected) {
        const float value = to_float(actual);
        return value == expected || (value != value && expected != expected);
      };
      const float h = c.h(row, column), y = c.y(group.world_size, row, column);
      if (is_gather) {
        wrong += !is(residual[row * pitch + column], is_own || done ? h : nan);
        continue;
      }
      const float before = h - c.sum(group.world_size, row, column);
      wrong += !is(residual[row * pitch + column], !is_own ? nan : has_norm && done ? h : before);
      if (c.is_staged) {
        wrong += !is(output[row * c.hidden + column], done ? y : nan);
      } else {
        wrong += !is(zero_copy[row * c.hidden + column], done ? y : c.partial(rank, row, column));
      }
    }
  }
  EXPECT(wrong == 0, "rank %d channel %d call %lu collective %d dtype %d [%ld, %ld] staged %d plan %d: %ld wrong", rank,
         channel, sequence, int(c.collective), int(c.dtype), c.num_tokens, c.hidden, int(c.is_staged), int(c.plan),
         wrong);
}

void expect_pads_at_rest(Group& group) {
  for (int rank = 0; rank < group.world_size; ++rank) {
    const auto& pad = group.pads[rank];
    EXPECT(pad[kAbortWord] == 0 && pad[kSleepersWord] == 0, "rank %d", rank);
    for (size_t word = kFirstChannelWord; word < pad.size(); ++word) {
      if (word % kHostSlotWords == 1) continue;  // the number of a slot's last call
      EXPECT(pad[word] == 0, "rank %d word %zu is left as %lx", rank, word, pad[word]);
    }
  }
}

// Each channel has a thread per rank, so that a rank has two calls under way.
void mixed(Group& group, uint64_t seed) {
  constexpr uint64_t kCalls = 1000;  // more than a word's sequence number can count
  group.run([&](int rank) {
    const auto run_channel = [&group, rank, seed](int channel) {
      for (uint64_t sequence = 1; sequence <= kCalls; ++sequence) {
        Call c(seed, channel, sequence, group.world_size);
        if (sequence == kCalls) c.plan = Plan::succeed;  // and leaves the pads at rest
        const uint64_t straggle = draw({c.key, 20, uint64_t(rank)});
        if (straggle % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(straggle / 16 % 3000));
        with_dtype(c.dtype, [&]<class T>() { make_call<T>(group, rank, channel, sequence, c); });
      }
    };
    std::thread other(run_channel, 1);
    run_channel(0);
    other.join();
  });
  expect_pads_at_rest(group);
}

// ------------------------------------------------------------------------------------------------- what may go wrong

// `seen` is what a rank was told of a failure of kind `expected` that concerns rank 0: itself, or by who gave up first.
void expect_failure_of_rank_0(const Outcome& seen, Failure expected, int rank) {
  const bool is_aborted = seen.failure == Failure::aborted;
  const Failure failure = is_aborted ? failure_of_abort(seen.got) : seen.failure;
  const int peer = is_aborted ? peer_of_abort(seen.got) : seen.peer;
  EXPECT(failure == expected && peer == 0 && !seen.is_recoverable, "rank %d: failure %d, peer %d", rank, int(failure),
         peer);
}

// Rank 0 never comes.
void missing(Group& group, uint64_t) {
  group.run(
      [&](int rank) {
        uint64_t record[kRecordWords];
        AllreduceParams p = group.params(rank, record);
        p.sequence = 1;
        p.timeout_ns = 60'000'000;
        const Outcome first = call(p);
        expect_failure_of_rank_0(first, Failure::timeout, rank);
        EXPECT(first.failure == Failure::aborted || first.milliseconds >= 60, "%f ms", first.milliseconds);
        EXPECT(first.milliseconds < 2000, "%f ms", first.milliseconds);
        p.sequence = 2;
        p.timeout_ns = kNoHurry;
        const Outcome second = call(p);
        EXPECT(second.failure == Failure::aborted && second.stage == Stage::entry, "failure %d", int(second.failure));
      },
      1);
}

// Rank 0 comes and never leaves: its rows are NaN with everybody else, all others' are right.
void half(Group& group, uint64_t) {
  constexpr int64_t kTokens = 7;
  uint64_t unused[kRecordWords];
  const auto params = [&](int rank, uint64_t* record) {
    AllreduceParams p = group.params(rank, record);
    p.sequence = 1;
    p.dtype = DType::fp32;
    p.num_tokens = kTokens;
    return p;
  };
  for (int peer = 1; peer < group.world_size; ++peer) {
    uint64_t* const slot = group.pads[peer].data() + kFirstChannelWord;  // channel 0, entry, rank 0
    slot[1] = 1;
    slot[0] = entry_word(params(0, unused), 1);
  }
  group.run(
      [&](int rank) {
        uint64_t record[kRecordWords];
        AllreduceParams p = params(rank, record);
        p.timeout_ns = 60'000'000;
        std::vector<float> output(kTokens * p.hidden);
        float* const rows = reinterpret_cast<float*>(group.buffers[rank].data());
        for (int64_t i = 0; i < kTokens * p.hidden; ++i) rows[i] = 1.0f;
        const bool is_staged = rank % 2 == 0;
        p.output = is_staged ? output.data() : nullptr;
        const Outcome outcome = call(p);
        expect_failure_of_rank_0(outcome, Failure::timeout, rank);
        EXPECT(outcome.stage == Stage::exit, "rank %d", rank);
        const RowRange lost = owned_rows(kTokens, group.world_size, 0);
        for (int64_t i = 0; i < kTokens * p.hidden; ++i) {
          const float value = is_staged ? output[i] : rows[i];
          const float expected = static_cast<float>(group.world_size - 1);  // rank 0's buffer holds zeros
          const bool is_lost = i / p.hidden < lost.end;
          EXPECT(is_lost ? value != value : value == expected, "rank %d element %ld: %f", rank, i, value);
        }
      },
      1);
}

// The process of rank 0 ends while the others wait for it.
void lost(Group& group, uint64_t) {
  const int process = eventfd(0, 0);
  std::thread reaper([process] {
    std::this_thread::sleep_for(milliseconds(5));
    eventfd_write(process, 1);
  });
  group.run(
      [&](int rank) {
        uint64_t record[kRecordWords];
        AllreduceParams p = group.params(rank, record);
        p.sequence = 1;
        p.workspace.liveness[0] = process;
        const Outcome outcome = call(p);
        expect_failure_of_rank_0(outcome, Failure::lost, rank);
        EXPECT(outcome.milliseconds < 2000, "%f ms", outcome.milliseconds);
      },
      1);
  reaper.join();
}

// Rank 0 refuses a call and is not heard of again for long: nobody waits for it, and the next call works.
void refused(Group& group, uint64_t) {
  std::atomic<int> told{0};
  group.run([&](int rank) {
    uint64_t record[kRecordWords];
    AllreduceParams p = group.params(rank, record);
    p.sequence = 1;
    if (rank == 0) {
      std::this_thread::sleep_for(milliseconds(3));
      refuse(p);
      while (told < group.world_size - 1) std::this_thread::sleep_for(milliseconds(1));
    } else {
      const Outcome outcome = call(p);
      EXPECT(outcome.failure == Failure::refused && outcome.peer == 0 && outcome.is_recoverable, "rank %d: failure %d",
             rank, int(outcome.failure));
      ++told;
    }
    p.sequence = 2;
    EXPECT(call(p).failure == Failure::none, "rank %d", rank);
  });
  expect_pads_at_rest(group);
}

// Rank 0 closes its workspace; nobody else's is harmed.
void closed(Group& group, uint64_t) {
  group.run([&](int rank) {
    uint64_t record[kRecordWords];
    AllreduceParams p = group.params(rank, record);
    p.sequence = 1;
    EXPECT(call(p).failure == Failure::none, "rank %d", rank);
    p.sequence = 2;
    if (rank == 0) {
      std::this_thread::sleep_for(milliseconds(3));
      write_word(group.pads[0].data() + kClosedWord, 1);
      return;
    }
    const Outcome outcome = call(p);
    EXPECT(outcome.failure == Failure::closed && outcome.peer == 0, "rank %d: failure %d", rank, int(outcome.failure));
    EXPECT(outcome.milliseconds < 2000, "%f ms", outcome.milliseconds);
    EXPECT(group.pads[rank][kAbortWord] == 0, "rank %d", rank);
  });
}

// A signal handler of rank 1 raises while rank 0 does not come: all learn of it.
void interrupted(Group& group, uint64_t) {
  group.run(
      [&](int rank) {
        uint64_t record[kRecordWords];
        AllreduceParams p = group.params(rank, record);
        p.sequence = 1;
        if (rank == 1) p.workspace.interrupted = [] { return 1; };
        const Outcome outcome = call(p);
        const Failure failure = rank == 1 ? outcome.failure : failure_of_abort(outcome.got);
        EXPECT(failure == Failure::interrupted, "rank %d: failure %d", rank, int(outcome.failure));
        EXPECT(rank == 1 || rank_of_abort(outcome.got) == 1, "rank %d", rank);
        EXPECT(outcome.milliseconds < 2000, "%f ms", outcome.milliseconds);
      },
      1);
}

// A failed call's words stay in the slots, and then all ranks refuse more calls than a word's sequence number can
// count: the old words must not look like new ones.
void window(Group& group, uint64_t) {
  for (const uint64_t refusals : {1, 127, 128, 129, 200, 255, 256}) {
    Group fresh(group.world_size);
    fresh.run([&](int rank) {
      uint64_t record[kRecordWords];
      AllreduceParams p = fresh.params(rank, record);
      p.sequence = 1;
      if (rank == 0) {
        refuse(p);
      } else {
        const Failure failure = call(p).failure;  // a disagreement if rank 0 is at its last call by now
        EXPECT(failure == Failure::refused || failure == Failure::disagreement, "rank %d: %d", rank, int(failure));
      }
      for (uint64_t i = 0; i < refusals; ++i) {
        ++p.sequence;
        refuse(p);
      }
      ++p.sequence;
      const Outcome outcome = call(p);
      EXPECT(outcome.failure == Failure::none, "rank %d after %lu refusals: failure %d", rank, refusals,
             int(outcome.failure));
    });
  }
}

// Rank 0 has its link late: nobody leaves before it, and that is no timeout, though it takes longer than one.
void link(Group& group, uint64_t) {
  constexpr uint64_t kLinkNs = 600'000'000, kTimeoutNs = 450'000'000;
  group.run([&](int rank) {
    uint64_t record[kRecordWords];
    AllreduceParams p = group.params(rank, record);
    p.sequence = 1;
    if (rank == 0) write_word(group.pads[0].data() + kLinkWord, now_ns() + kLinkNs);
    EXPECT(call(p).failure == Failure::none, "rank %d", rank);  // they meet: now nobody is late
    p.sequence = 2;
    p.timeout_ns = kTimeoutNs;
    p.link_ns = kLinkNs;
    const Outcome outcome = call(p);
    EXPECT(outcome.failure == Failure::none, "rank %d: failure %d, peer %d", rank, int(outcome.failure), outcome.peer);
    EXPECT(now_ns() >= read_word(group.pads[0].data() + kLinkWord), "rank %d left early", rank);
    EXPECT(outcome.milliseconds >= 600, "rank %d: %f ms", rank, outcome.milliseconds);
  });
  expect_pads_at_rest(group);
}

// The process of rank 0 ends while the link carries its row: it is NaN with everybody, nobody waits for the link.
void link_lost(Group& group, uint64_t) {
  const int process = eventfd(0, 0);
  std::thread reaper([process] {
    std::this_thread::sleep_for(milliseconds(50));
    eventfd_write(process, 1);
  });
  uint64_t unused[kRecordWords];
  const auto params = [&](int rank, uint64_t* record) {
    AllreduceParams p = group.params(rank, record);
    p.sequence = 1;
    p.num_tokens = 1;  // rank 0's
    p.dtype = DType::fp32;
    p.link_ns = kNoHurry;
    return p;
  };
  for (int peer = 1; peer < group.world_size; ++peer) {
    uint64_t* const slot = group.pads[peer].data() + kFirstChannelWord;  // channel 0, entry, rank 0
    slot[1] = 1;
    slot[0] = entry_word(params(0, unused), 1);
  }
  group.run(
      [&](int rank) {
        uint64_t record[kRecordWords];
        AllreduceParams p = params(rank, record);
        p.workspace.liveness[0] = process;
        const Outcome outcome = call(p);
        expect_failure_of_rank_0(outcome, Failure::lost, rank);
        EXPECT(outcome.stage == Stage::exit && outcome.milliseconds < 2000, "rank %d: %f ms", rank,
               outcome.milliseconds);
        const float lost = reinterpret_cast<float*>(group.buffers[rank].data())[0];
        EXPECT(lost != lost, "rank %d: %f", rank, lost);
      },
      1);
  reaper.join();
}

// Who sleeps is woken by the bell, long before it would look by itself.
void bell(Group& group, uint64_t) {
  constexpr int kCalls = 21;
  std::atomic<int> slow{0};
  group.run([&](int rank) {
    uint64_t record[kRecordWords];
    AllreduceParams p = group.params(rank, record);
    for (int i = 0; i < kCalls; ++i) {
      ++p.sequence;
      if (rank == 0) std::this_thread::sleep_for(milliseconds(3));
      const Outcome outcome = call(p);
      EXPECT(outcome.failure == Failure::none, "rank %d: failure %d", rank, int(outcome.failure));
      if (outcome.milliseconds > 15) ++slow;
    }
  });
  EXPECT(slow < kCalls / 2, "%d waits took as long as without a bell", slow.load());
}

}  // namespace

int main(int argc, char** argv) {
  struct Mode {
    const char* name;
    void (*run)(Group& group, uint64_t seed);
  };
  constexpr Mode kModes[] = {
      {"mixed", mixed},        {"missing", missing},         {"half", half},     {"refused", refused}, {"lost", lost},
      {"closed", closed},      {"interrupted", interrupted}, {"window", window}, {"bell", bell},       {"link", link},
      {"link_lost", link_lost}};
  if (argc != 4) return 2;
  for (const Mode& mode : kModes) {
    if (std::string(argv[1]) != mode.name) continue;
    Group group(std::atoi(argv[2]));
    mode.run(group, std::strtoull(argv[3], nullptr, 10));
    if (problems == 0) std::printf("ok\n");
    return problems == 0 ? 0 : 1;
  }
  return 2;
}
