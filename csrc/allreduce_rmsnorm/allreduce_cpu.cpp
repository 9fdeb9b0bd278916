// The collectives on a CPU: ranks are processes that share memory (host_protocol.h has their meetings), or virtual
// ranks of one process. A rank sums the rows that it owns over all ranks' buffers in rank order, works on the sum while
// it is in cache, and writes the result into all buffers: each byte is read once and written once, by one processor.
// Limit: memory. While a row is worked on, the next one is on its way, as in rms_norm_cpu.cpp: 94 % of an in-place
// read-modify-write of the same bytes by the same processes in bf16, 97 % in fp32 (fused, 1024x4096, cold; 2 processes
// of one thread each on a Xeon model 207, 2026-11-23, bench/run.py).
#include "allreduce_rmsnorm/allreduce.h"
#include "allreduce_rmsnorm/host_protocol.h"
#include "allreduce_rmsnorm/rms_norm_rows.h"
#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

namespace {

// Where the rows of each rank are. What belongs to a rank of this process is read and written in place; the buffers
// carry only what goes from process to process.
template <class T>
struct Rows {
  const AllreduceParams& p;

  bool is_here(int rank) const { return rank >= p.workspace.rank && rank < p.workspace.rank + p.workspace.ranks_here; }
  RowRange owned_by(int rank) const { return owned_rows(p.num_tokens, p.workspace.world_size, rank); }

  T* buffer(int rank, int64_t row) const {
    return reinterpret_cast<T*>(p.workspace.buffer[rank] + p.offset) + row * p.hidden;
  }
  const T* input(int rank, int64_t row) const {
    if (p.input == nullptr || !is_here(rank)) return buffer(rank, row);
    return static_cast<const T*>(p.input) + place(rank) * p.input_rank_stride + p.input_rows.offset(row);
  }
  T* output(int rank, int64_t row) const {
    if (p.output == nullptr || !is_here(rank)) return buffer(rank, row);
    return static_cast<T*>(p.output) + place(rank) * p.output_rank_stride + row * p.hidden;
  }
  // Of ranks of this process only.
  T* residual(int rank, int64_t row) const {
    return static_cast<T*>(p.residual) + place(rank) * p.residual_rank_stride + p.residual_rows.offset(row);
  }
  // Where a rank of this process wants the rows of others in the end.
  T* result(int rank, int64_t row) const {
    return p.collective == Collective::gather ? residual(rank, row) : output(rank, row);
  }

 private:
  int64_t place(int rank) const { return rank - p.workspace.rank; }
};

constexpr int64_t kElementsPerTask = 32 * 1024;  // about 10 us: less is not worth waking a thread for

// body(begin, end) over pieces of [begin, end).
template <class Body>
TW_CPU void share_rows(const AllreduceParams& p, const ExecutionContext& context, RowRange rows, Body body) {
  parallel_for(context, rows.begin, rows.end, kElementsPerTask / p.hidden + 1, body);
}

template <class T>
TW_CPU void copy_row(T* destination, const T* source, int64_t hidden) {
  if (destination != source) std::memcpy(destination, source, static_cast<size_t>(hidden) * sizeof(T));
}

// ------------------------------------------------------------------------------------------------------ an owner's
// rows

// Asks for the 32 elements at `next`: every cache line of them.
template <class T>
TW_CPU void prefetch_vector(const T* next) {
  constexpr int kLineBytes = 64;
  for (int i = 0; i < kLanes * static_cast<int>(sizeof(T)); i += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const char*>(next) + i, 0, 2);
  }
}

// As if stored and loaded again.
template <class T>
TW_CPU Lanes rounded(const Lanes& lanes) {
  T stored[kLanes];
  store_lanes(stored, lanes);
  Lanes result;
  load_lanes(result, stored);
  return result;
}

// kWorldSize is 0 for any number of ranks. Two have code of their own: 41 us and not 47 in cache (32x4096 bf16); four
// and eight gained nothing by it.
template <class T, int kWorldSize, bool kHasNorm>
TW_CPU void reduce_rows(const Rows<T>& rows, int owner, int64_t begin, int64_t end) {
  const AllreduceParams& p = rows.p;
  const int world_size = kWorldSize > 0 ? kWorldSize : p.workspace.world_size;
  const T* const weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* inputs[kMaxWorldSize];
    const T* next_inputs[kMaxWorldSize];
    T* outputs[kMaxWorldSize];
    for (int rank = 0; rank < world_size; ++rank) {
      inputs[rank] = rows.input(rank, row);
      next_inputs[rank] = rows.input(rank, next);
      outputs[rank] = rows.output(rank, row);
    }
    const auto sum_over_ranks = [&](auto load) __attribute__((always_inline)) {
      Lanes sum = load(inputs[0]);
      for (int rank = 1; rank < world_size; ++rank) sum = sum + load(inputs[rank]);
      return sum;
    };
    const auto store_everywhere = [&](auto store, const Lanes& value) __attribute__((always_inline)) {
      for (int rank = 0; rank < world_size; ++rank) store(outputs[rank], value);
    };
    const auto prefetch_inputs = [&](int64_t i) __attribute__((always_inline)) {
      for (int rank = 0; rank < world_size; ++rank) prefetch_vector(next_inputs[rank] + i);
    };
    if constexpr (!kHasNorm) {
      for_each_vector(p.hidden, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        prefetch_inputs(i);
        store_everywhere(store, sum_over_ranks(load));
      });
    } else {
      T* const h = rows.residual(owner, row);
      const T* const next_residual = rows.residual(owner, next);
      const float sum = sum_of_squares(p.hidden, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        prefetch_inputs(i);
        store(h, rounded<T>(sum_over_ranks(load)) + load(static_cast<const T*>(h)));
        return load(static_cast<const T*>(h));  // the norm is of the rounded sum
      });
      scale(static_cast<const T*>(h), weight, p.hidden, rstd_of(sum, p.hidden, p.eps), p.weight_bias,
            [&](int64_t i, auto store, const Lanes& value) __attribute__((always_inline)) {
              prefetch_vector(next_residual + i);
              store_everywhere(store, value);
            });
    }
  }
}

template <class T>
TW_CPU void gather_rows(const Rows<T>& rows, int owner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* const source = rows.residual(owner, row);
    for (int rank = 0; rank < rows.p.workspace.world_size; ++rank) {
      copy_row(rows.is_here(rank) ? rows.residual(rank, row) : rows.buffer(rank, row), source, rows.p.hidden);
    }
  }
}

template <class T>
TW_CPU void work_on_rows(const Rows<T>& rows, int owner, int64_t begin, int64_t end) {
  const auto reduce = [&]<int kWorldSize>() __attribute__((always_inline)) {
    if (rows.p.collective == Collective::allreduce_rmsnorm) {
      reduce_rows<T, kWorldSize, true>(rows, owner, begin, end);
    } else {
      reduce_rows<T, kWorldSize, false>(rows, owner, begin, end);
    }
  };
  if (rows.p.collective == Collective::gather) {
    gather_rows(rows, owner, begin, end);
  } else if (rows.p.workspace.world_size == 2) {
    reduce.template operator()<2>();
  } else {
    reduce.template operator()<0>();
  }
}

template <class T>
void work(const Rows<T>& rows, const ExecutionContext& context) {
  const Workspace& workspace = rows.p.workspace;
  const int first = workspace.rank, last = workspace.rank + workspace.ranks_here - 1;
  const RowRange all{rows.owned_by(first).begin, rows.owned_by(last).end};
  share_rows(rows.p, context, all, [&](int64_t begin, int64_t end) {
    for (int owner = first; owner <= last; ++owner) {
      const RowRange owned = rows.owned_by(owner);
      work_on_rows(rows, owner, begin > owned.begin ? begin : owned.begin, end < owned.end ? end : owned.end);
    }
  });
}

// ------------------------------------------------------------------------------------------------------- others' rows

// Others will read their rows of this rank's input in its buffer.
template <class T>
void copy_in(const Rows<T>& rows, const ExecutionContext& context) {
  const AllreduceParams& p = rows.p;
  if (p.input == nullptr) return;
  const int self = p.workspace.rank;
  for (int owner = 0; owner < p.workspace.world_size; ++owner) {
    if (rows.is_here(owner)) continue;
    share_rows(p, context, rows.owned_by(owner), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) copy_row(rows.buffer(self, row), rows.input(self, row), p.hidden);
    });
  }
}

// Others have written their rows into this rank's buffer. Rows whose owner may still be at them become NaN.
template <class T, class IsDone>
void copy_out(const Rows<T>& rows, const ExecutionContext& context, const IsDone& is_done) {
  const AllreduceParams& p = rows.p;
  const int self = p.workspace.rank;
  for (int owner = 0; owner < p.workspace.world_size; ++owner) {
    if (rows.is_here(owner)) continue;
    const bool done = is_done(owner);
    if (done && rows.result(self, 0) == rows.buffer(self, 0)) continue;
    share_rows(p, context, rows.owned_by(owner), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* const arrived = rows.buffer(self, row);
        if (!done) {
          for (int64_t i = 0; i < p.hidden; ++i) arrived[i] = from_float<T>(__builtin_nanf(""));
        }
        copy_row(rows.result(self, row), static_cast<const T*>(arrived), p.hidden);
      }
    });
  }
}

}  // namespace

Status allreduce_kernel(const AllreduceParams& p, const ExecutionContext& context) {
  const bool has_peers = p.workspace.ranks_here < p.workspace.world_size;
  if (!has_peers) {
    with_dtype(p.dtype, [&]<class T>() { work(Rows<T>{p}, context); });
    return Status::ok();
  }
  HostCall call(p);
  if (call.is_aborted()) return Status::ok();
  with_dtype(p.dtype, [&]<class T>() {
    const Rows<T> rows{p};
    copy_in(rows, context);
    if (!call.enter()) return;
    work(rows, context);
    const bool all_left = call.leave();
    copy_out(rows, context, [&](int peer) { return all_left || call.has_left(peer); });
  });
  return Status::ok();
}

Status refuse_allreduce_kernel(const AllreduceParams& p, const ExecutionContext&) {
  if (p.workspace.ranks_here < p.workspace.world_size) HostCall(p).refuse();
  return Status::ok();
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA

TOKENWEAVE_CPU_DISPATCH(allreduce, AllreduceParams)
TOKENWEAVE_CPU_DISPATCH(refuse_allreduce, AllreduceParams)
