// Sum over ranks, alone or fused with the residual add and RMSNorm that follow it, and the gather that undoes a sharded
// residual: the contract of allreduce_rmsnorm_, allreduce_rmsnorm, allreduce_, allreduce and gather_residual_. The
// meaning stands in tokenweave_ops/reference/allreduce_rmsnorm.py; the glue has checked everything stated here.
#pragma once

#include "allreduce_rmsnorm/workspace.h"
#include "core/op.h"
#include "core/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int64_t kMaxAllreduceHidden = 16384;

enum class Collective : int32_t {
  allreduce,          // y = round(sum)
  allreduce_rmsnorm,  // h = round(round(sum) + residual), y = rms_norm(h); h stays in the owner's residual
  gather,             // residual rows go from their owners to everybody
};

struct AllreduceParams {
  Workspace workspace;
  Collective collective = Collective::allreduce;
  int64_t num_tokens = 0;
  int64_t hidden = 0;  // a multiple of 8, at most kMaxAllreduceHidden
  DType dtype = DType::bf16;
  float eps = 0.0f;
  float weight_bias = 0.0f;

  // The rows [num_tokens, hidden], contiguous, begin `offset` bytes into every rank's buffer (a multiple of 16): the
  // partial sums before the call and y after it. With `input` and `output` that place is staging: every rank copies its
  // input there first and its output from there last (gather has residual instead of both).
  int64_t offset = 0;
  const void* input = nullptr;
  void* output = nullptr;        // contiguous rows
  void* residual = nullptr;      // allreduce_rmsnorm, gather; on a GPU 16-byte aligned rows
  const void* weight = nullptr;  // [hidden]; on a GPU 16-byte aligned
  RowLayout input_rows, residual_rows;
  // Virtual ranks: elements from one rank's tensor to the next one's.
  int64_t input_rank_stride = 0, output_rank_stride = 0, residual_rank_stride = 0;

  int32_t channel = 0;
  int32_t max_ctas = 0;  // GPU blocks per rank at most
  uint64_t timeout_ns = 0;
  uint64_t sequence = 0;  // CPU processes: number of this call on its channel, 1, 2, ...
  uint64_t tag = 0;       // what else the ranks must agree on
  uint64_t link_ns = 0;   // CPU processes: for how long this call occupies the emulated link; 0: there is none
};

// Returns at once on a GPU. On a CPU it returns when the rank is done; a failure that concerns the ranks is then in
// workspace.record (and the Status is ok).
Status allreduce(const AllreduceParams& params, const ExecutionContext& context);

// Tells every peer that this rank will not make the call that `params` numbers, and why it need not be waited for.
Status refuse_allreduce(const AllreduceParams& params, const ExecutionContext& context);

// ---------------------------------------------------------------------------------------------------------- ownership

// The rows rank `rank` owns: contiguous, and the first num_tokens % world_size ranks have one more than the others.
struct RowRange {
  int64_t begin, end;
};
constexpr RowRange owned_rows(int64_t num_tokens, int32_t world_size, int32_t rank) {
  const int64_t each = num_tokens / world_size, extra = num_tokens % world_size;
  const int64_t begin = rank * each + (rank < extra ? rank : extra);
  return {begin, begin + each + (rank < extra ? 1 : 0)};
}

// ------------------------------------------------------------------------------------------------- the emulated link

// What a rank's link to the others would need for a call, as tokenweave_ops.EmulatedLink has it.
struct EmulatedLink {
  double gigabytes_per_s = 0.0;  // in each direction; 0: no link is emulated
  double latency_us = 0.0;
};

// Sum over ranks: of `op_bytes` a rank hands over all and gets back one world_size-th to reduce, then the reverse, both
// at once. Gather: it gets all. Rounded up, and at most 115 days, so that a few of them never pass the end of a word.
constexpr uint64_t link_ns(const EmulatedLink& link, Collective collective, int64_t op_bytes, int32_t world_size) {
  if (link.gigabytes_per_s == 0.0 || world_size == 1) return 0;
  const double shares = collective == Collective::gather ? 1.0 : 1.0 + 1.0 / world_size;
  const double ns = link.latency_us * 1e3 + static_cast<double>(op_bytes) * shares / link.gigabytes_per_s;
  constexpr double kMost = 1e16;
  return static_cast<uint64_t>(ns < kMost ? ns : kMost) + 1;
}

// ------------------------------------------------------------------------------------------------------- the entry
// word

// What a rank says when it comes. Bit 63 is set; bits 55-62: the call's number on its channel (CPU only, else 0); bits
// 32-54: a hash of everything else the ranks must agree on; bits 0-31: where its rows are, in 16 bytes. Ranks whose
// words differ do not belong together.
constexpr int kSequenceShift = 55, kHashShift = 32;
constexpr uint64_t kSequenceMask = 0xff, kHashMask = 0x7fffff;

[[gnu::always_inline]] inline uint64_t entry_word(const AllreduceParams& params, int64_t grid) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  const auto add = [&hash](uint64_t word) { hash = (hash ^ word) * 0x100000001b3u ^ hash >> 32; };
  uint32_t eps, weight_bias;
  __builtin_memcpy(&eps, &params.eps, 4);
  __builtin_memcpy(&weight_bias, &params.weight_bias, 4);
  add(static_cast<uint64_t>(params.collective));
  add(static_cast<uint64_t>(params.num_tokens));
  add(static_cast<uint64_t>(params.hidden));
  add(static_cast<uint64_t>(params.dtype));
  add(uint64_t{eps} << 32 | weight_bias);
  add(static_cast<uint64_t>(grid));
  add(static_cast<uint64_t>(params.workspace.transport));
  add(params.tag);
  hash ^= hash >> 23;
  return uint64_t{1} << 63 | (params.sequence & kSequenceMask) << kSequenceShift | (hash & kHashMask) << kHashShift |
         (static_cast<uint64_t>(params.offset / 16) & 0xffffffff);
}

// How the CUDA launcher maps rows to blocks. A pure function of what all ranks know, never of the GPU at hand: ranks
// that launch different grids wait for each other forever.
struct AllreducePlan {
  int32_t packs_per_thread = 0;  // 16-byte packs of a row that each thread holds
  int32_t rows_in_flight = 0;    // rows that a block works on at once
  int32_t block_x = 0;
  int64_t grid = 0;  // blocks per rank
};
AllreducePlan plan_allreduce(int64_t num_tokens, int64_t hidden, DType dtype, int32_t world_size, int32_t max_ctas);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
