// Sum over ranks, residual add, RMSNorm and broadcast in one pass ("two-shot": the owner of a row reduces it, then
// hands the result to everybody).
//   s = round(sum over ranks), h = round(s + residual), y = round((h * rstd) * (weight + weight_bias))
// Mapping: every rank owns a contiguous range of rows and launches the same few blocks; block b works on the rows
// begin + b, begin + b + grid, ... of a range, kRows of them at once, so that it meets only block b of the other ranks.
// Thread t holds packs t, t + block, ... of 16 bytes of each of those rows, from the sum to the result: neither partial
// sums nor residual are read twice. Bytes per rank, of N = tokens * hidden * size: it reads N (its rows of every rank)
// and writes N, and adds 2 N / world_size for the residual. Limit: the links (one GPU: its memory), and how many bytes
// few blocks can keep in flight: 8 packs a thread, 64 KiB a block. Not measured on a GPU yet.
#pragma once

#include "allreduce_rmsnorm/signals.cuh"
#include "core/reduce.cuh"
#include "core/vec.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int kAllreduceThreads = 512;  // of a block at most; 128 registers each
constexpr int kPacksInFlight = 8;       // of a thread: kRows * kPacks

template <int kRows>
struct AllreduceShared {
  BlockSumsStorage<kRows> sums;
  uint32_t failed;
};

// The rows that one block works on at once: first_row, first_row + grid, ... of a rank's range. Pack n of a thread is
// pack n % kPacks of its share of row n / kPacks. Kept small: this is alive together with the packs themselves.
struct RowBatch {
  int64_t first_row;
  uint32_t present;  // bit n: this thread has pack n
};

template <class T, int kPacks, Transport kTransport>
struct AllreduceBlock {
  static constexpr int kRows = kPacksInFlight / kPacks;
  static constexpr int kSize = kPackSize<T>;
  using Shared = AllreduceShared<kRows>;
  using Packs = Vec16[kPacksInFlight];

  const AllreduceParams& p;
  const Place place;
  const int num_packs;  // of a row
  Shared& shared;

  TW_MEMBER int pack_of(int n) const { return static_cast<int>(threadIdx.x + n % kPacks * blockDim.x); }
  // Pack n in the contiguous rows of a buffer or an output. Within a batch 32 bits are enough: 8 rows x 128 blocks.
  TW_MEMBER Vec16* in_rows(void* rows, const RowBatch& batch, int n) const {
    Vec16* first = static_cast<Vec16*>(rows) + batch.first_row * num_packs + threadIdx.x;
    return first + (n / kPacks * place.grid * num_packs + n % kPacks * static_cast<int>(blockDim.x));
  }
  TW_MEMBER Vec16* in_buffer(char* buffer, const RowBatch& batch, int n) const {
    return in_rows(buffer + p.offset, batch, n);
  }
  TW_MEMBER Vec16* in_output(const RowBatch& batch, int n) const {
    return in_rows(static_cast<T*>(p.output) + place.local_rank * p.output_rank_stride, batch, n);
  }
  TW_MEMBER Vec16* in_residual(const RowBatch& batch, int n) const {
    const int64_t row = batch.first_row + n / kPacks * place.grid;
    T* rows = static_cast<T*>(p.residual) + place.local_rank * p.residual_rank_stride;
    return reinterpret_cast<Vec16*>(rows + row * p.residual_rows.inner_stride) + pack_of(n);
  }

  // body(n) for the packs [kBegin, kEnd) that this thread has in the batch.
  template <int kBegin = 0, int kEnd = kPacksInFlight, class Body>
  TW_MEMBER void for_each_pack(const RowBatch& batch, Body body) const {
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
      if (batch.present >> n & 1) body(n);
    }
  }
  // body(batch) over this block's share of the rows of `owner`.
  template <class Body>
  TW_MEMBER void for_each_batch(int owner, Body body) const {
    const RowRange range = owned_rows(p.num_tokens, p.workspace.world_size, owner);
#pragma unroll 1
    for (int64_t row = range.begin + place.block; row < range.end; row += int64_t{place.grid} * kRows) {
      uint32_t present = 0;
#pragma unroll
      for (int n = 0; n < kPacksInFlight; ++n) {
        const bool here = row + n / kPacks * place.grid < range.end && pack_of(n) < num_packs;
        present |= static_cast<uint32_t>(here) << n;
      }
      body(RowBatch{row, present});
    }
  }
  template <class Body>
  TW_MEMBER void for_each_batch_of_all(Body body) const {
#pragma unroll 1
    for (int owner = 0; owner < p.workspace.world_size; ++owner) {
      for_each_batch(owner, [&](const RowBatch& batch) { body(batch, owner); });
    }
  }

  // ------------------------------------------------------------------------------------------------- what moves where

  // sum <- round(sum over ranks), added in fp32: in the order of the ranks, or in the switch's.
  TW_MEMBER void reduce(const RowBatch& batch, Packs& sum) const {
    if constexpr (kTransport == Transport::multimem) {
      for_each_pack(batch, [&](int n) {
        sum[n] = arch::multimem_load_add<T>(in_buffer(p.workspace.multicast_buffer, batch, n));
      });
    } else {
      reduce_group<0>(batch, sum);
      reduce_group<kPacksInFlight / 2>(batch, sum);
    }
  }

  // Half the packs at a time from two ranks at once: as many loads in flight, but half the registers for fp32 sums.
  template <int kBegin>
  TW_MEMBER void reduce_group(const RowBatch& batch, Packs& sum) const {
    constexpr int kGroup = kPacksInFlight / 2;
    float total[kGroup][kSize];
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) total[n][e] = -0.0f;  // the zero that leaves every first term as it is, -0 too
    }
#pragma unroll 1
    for (int rank = 0; rank < p.workspace.world_size; rank += 2) {
      char* buffer = p.workspace.buffer[rank];
      const bool pair = rank + 1 < p.workspace.world_size;
      const int64_t to_next = pair ? p.workspace.buffer[rank + 1] - buffer : 0;
      Vec16 next[kGroup];
      for_each_pack<kBegin, kBegin + kGroup>(batch, [&](int n) {
        Vec16* at = in_buffer(buffer, batch, n);
        sum[n] = arch::load_streaming(at);
        if (pair) next[n - kBegin] = arch::load_streaming(at + to_next / 16);
      });
      for_each_pack<kBegin, kBegin + kGroup>(batch, [&](int n) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          total[n - kBegin][e] += pack_get<T>(sum[n], e);
          if (pair) total[n - kBegin][e] += pack_get<T>(next[n - kBegin], e);
        }
      });
    }
    for_each_pack<kBegin, kBegin + kGroup>(batch, [&](int n) { sum[n] = pack<T>(total[n - kBegin]); });
  }

  TW_MEMBER void broadcast(const RowBatch& batch, int n, const Vec16& value) const {
    if constexpr (kTransport == Transport::multimem) {
      arch::multimem_store(in_buffer(p.workspace.multicast_buffer, batch, n), value);
    } else {
      // From the own rank on, so that the ranks do not all write to the same one at once.
#pragma unroll 1
      for (int step = 0; step < p.workspace.world_size; ++step) {
        const int turned = place.rank + step;
        const int rank = turned < p.workspace.world_size ? turned : turned - p.workspace.world_size;
        arch::store_streaming(in_buffer(p.workspace.buffer[rank], batch, n), value);
      }
    }
  }

  // sum <- h, which also goes to the residual, and the squares of its elements.
  template <int kBegin>
  TW_MEMBER void add_residual(const RowBatch& batch, Packs& sum, float (&sum_of_squares)[kRows]) const {
    constexpr int kEnd = kBegin + kPacksInFlight / 2;
    Vec16 residual[kPacksInFlight / 2];
    for_each_pack<kBegin, kEnd>(batch,
                                [&](int n) { residual[n - kBegin] = arch::load_streaming(in_residual(batch, n)); });
    for_each_pack<kBegin, kEnd>(batch, [&](int n) {
      sum[n] = add_packs<T>(sum[n], residual[n - kBegin]);
      arch::store_streaming(in_residual(batch, n), sum[n]);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {  // of the rounded sum, the value the next layer will read
        const float value = pack_get<T>(sum[n], e);
        sum_of_squares[n / kPacks] = arch::fused_multiply_add(value, value, sum_of_squares[n / kPacks]);
      }
    });
  }

  // sum <- h, and y to everybody.
  TW_MEMBER void add_normalize_broadcast(const RowBatch& batch, Packs& sum) const {
    float sum_of_squares[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum_of_squares[i] = 0.0f;
    add_residual<0>(batch, sum, sum_of_squares);
    add_residual<kPacksInFlight / 2>(batch, sum, sum_of_squares);
    block_sums<kRows>(sum_of_squares, shared.sums);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float mean = arch::divide(sum_of_squares[i], static_cast<float>(p.hidden));
      const float rstd = arch::divide(1.0f, arch::square_root(mean + p.eps));
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int n = i * kPacks + k;
        if ((batch.present >> n & 1) == 0) continue;
        const Vec16 weight = static_cast<const Vec16*>(p.weight)[pack_of(n)];  // from L1 after the first row
        float y[kSize];
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          y[e] = pack_get<T>(sum[n], e) * rstd * (pack_get<T>(weight, e) + p.weight_bias);
        }
        broadcast(batch, n, pack<T>(y));
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------------- phases

  // The input goes where the other ranks can read it: the rows that block b of any rank will ask for.
  TW_MEMBER void stage_input() const {
    const T* input = static_cast<const T*>(p.input) + place.local_rank * p.input_rank_stride;
    for_each_batch_of_all([&](const RowBatch& batch, int) {
      Packs packs;
      for_each_pack(batch, [&](int n) {
        const int64_t row = batch.first_row + n / kPacks * place.grid;
        packs[n] = load_pack(input + p.input_rows.offset(row) + pack_of(n) * kSize);
      });
      for_each_pack(
          batch, [&](int n) { arch::store_streaming(in_buffer(p.workspace.buffer[place.rank], batch, n), packs[n]); });
    });
  }

  TW_MEMBER void work() const {
    for_each_batch(place.rank, [&](const RowBatch& batch) {
      Packs packs;
      if (p.collective == Collective::gather) {
        for_each_pack(batch, [&](int n) { packs[n] = arch::load_streaming(in_residual(batch, n)); });
      } else {
        reduce(batch, packs);
      }
      if (p.collective == Collective::allreduce_rmsnorm) {
        add_normalize_broadcast(batch, packs);
      } else {
        for_each_pack(batch, [&](int n) { broadcast(batch, n, packs[n]); });
      }
    });
  }

  // What has arrived in staging goes to the output, or to the residual rows that others own.
  TW_MEMBER void unstage() const {
    for_each_batch_of_all([&](const RowBatch& batch, int owner) {
      if (p.collective == Collective::gather && owner == place.rank) return;
      Packs packs;
      for_each_pack(
          batch, [&](int n) { packs[n] = arch::load_streaming(in_buffer(p.workspace.buffer[place.rank], batch, n)); });
      for_each_pack(batch, [&](int n) {
        Vec16* to = p.collective == Collective::gather ? in_residual(batch, n) : in_output(batch, n);
        arch::store_streaming(to, packs[n]);
      });
    });
  }

  // The call has failed, and its caller has gone on: nobody may take these rows for a result.
  TW_MEMBER void poison() const {
    float nan[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) nan[e] = float_of(0x7fc00000u);
    const Vec16 value = pack<T>(nan);
    for_each_batch_of_all([&](const RowBatch& batch, int owner) {
      if (p.collective == Collective::gather && owner == place.rank) return;
      for_each_pack(batch, [&](int n) {
        Vec16* to = in_buffer(p.workspace.buffer[place.rank], batch, n);
        if (p.output != nullptr) to = in_output(batch, n);
        if (p.collective == Collective::gather) to = in_residual(batch, n);
        arch::store_streaming(to, value);
      });
    });
  }

  TW_MEMBER void run(uint64_t word) const {
    const uint64_t deadline_ns = arch::globaltimer_ns() + p.timeout_ns;
    if (p.input != nullptr) stage_input();
    if (!meet_peers<kTransport>(p, place, Stage::entry, word, deadline_ns, shared.failed)) return poison();
    work();
    if (!meet_peers<kTransport>(p, place, Stage::exit, word, deadline_ns, shared.failed)) return poison();
    if (p.output != nullptr || p.collective == Collective::gather) unstage();
  }
};

// `grid` blocks for each rank that this process plays.
// registers: <= 128
template <class T, int kPacks, Transport kTransport>
TW_KERNEL void __launch_bounds__(kAllreduceThreads, 1)
    allreduce_kernel(const AllreduceParams p, uint64_t word, int32_t grid) {
  using Block = AllreduceBlock<T, kPacks, kTransport>;
  const int local_rank = static_cast<int>(blockIdx.x) / grid;
  const Place place{p.workspace.rank + local_rank, local_rank, static_cast<int>(blockIdx.x) % grid, grid};
  Block{p, place, static_cast<int>(p.hidden) / kPackSize<T>, arch::shared<typename Block::Shared>()}.run(word);
}

using AllreduceKernel = void (*)(AllreduceParams, uint64_t, int32_t);

// Every instantiation there is, one file per element type (allreduce.bf16.cu, ...), because they compile slowly.
template <class T>
AllreduceKernel select_allreduce_kernel(Transport transport, int packs_per_thread);

template <class T, Transport kTransport>
AllreduceKernel select_allreduce_kernel(int packs_per_thread) {
  switch (packs_per_thread) {
    case 1:
      return allreduce_kernel<T, 1, kTransport>;
    case 2:
      return allreduce_kernel<T, 2, kTransport>;
    case 4:
      return allreduce_kernel<T, 4, kTransport>;
    default:  // only fp32 rows are that long: kMaxAllreduceHidden
      return allreduce_kernel < T, sizeof(T) == 4 ? 8 : 4, kTransport > ;
  }
}

#define TW_INSTANTIATE_ALLREDUCE(T)                                                                             \
  template <>                                                                                                   \
  AllreduceKernel select_allreduce_kernel<T>(Transport transport, int packs_per_thread) {                       \
    return transport == Transport::multimem ? select_allreduce_kernel<T, Transport::multimem>(packs_per_thread) \
                                            : select_allreduce_kernel<T, Transport::peer>(packs_per_thread);    \
  }

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
