// decode_step_, confidence_scan and select_and_commit_: one step of masked diffusion decoding. A row of logits is
// scanned in segments of ids; each segment becomes a RowPart (row_part.cuh), the parts of a row are folded into its
// statistics, and the statistics of a sequence's block into a choice of positions.
#pragma once

#include "core/op.h"
#include "core/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr int64_t kMaxBlockLength = 1024;
constexpr int64_t kMaxListedIds = 16;
constexpr int64_t kMaxVocab = int64_t{1} << 30;
constexpr int32_t kSegment = 2048;  // ids between two reductions; the order of additions hangs on it

// In the order of tokenweave_ops.POLICIES.
enum class Policy : int64_t {
  topk,
  threshold,
  factor,
  local_leap,
  eb,
  entropy_threshold,
  margin,
  klass,
  topk_margin,
  topk_entropy,
};
constexpr int64_t kNumPolicies = 10;

// Bits of `features`, in the order of tokenweave_ops.FEATURES.
constexpr int32_t kEntropy = 1, kMargin = 2, kSampling = 4, kDivergence = 8;

// Bits of counts[:, 3], in the order of anchor_decoding.PROBLEMS.
enum Problem : int64_t {
  kProblemBlock = 1,
  kProblemPolicy = 2,
  kProblemFeature = 4,
  kProblemThreshold = 8,
  kProblemRadius = 16,
  kProblemTemperature = 32,
  kProblemSteps = 64,
  kProblemRows = 128,
};

// Instead of a candidate.
constexpr int64_t kNoCandidate = -1;  // not masked, or no row
constexpr int64_t kNoSuchRow = -2;

// The places in a position's four statistics.
enum Statistic { kConfidence, kEntropyNats, kMarginStatistic, kDivergenceNats, kNumStatistics };

struct RowPart;  // row_part.cuh

struct DecodeStepParams {
  int64_t batch = 0;
  int64_t block_length = 0;
  int64_t length = 0;    // of a sequence
  int64_t num_rows = 0;  // of logits
  int64_t vocab = 0;     // columns that count: vocab_limit
  int64_t mask_id = 0;
  int32_t features = 0;
  DType dtype = DType::bf16;
  bool exact = false;
  bool scan = true;    // rows to statistics
  bool commit = true;  // statistics to tokens

  const void* logits = nullptr;
  RowLayout logits_rows;
  const void* previous_logits = nullptr;  // null: none
  RowLayout previous_rows;
  // [batch, block_length], or null: position j of sequence b has row b * block_length + j
  const int64_t* rows = nullptr;
  const int64_t* forbidden = nullptr;
  const int64_t* deferred = nullptr;
  int64_t num_forbidden = 0;
  int64_t num_deferred = 0;

  int64_t* tokens = nullptr;  // [batch, length]
  int64_t token_stride = 0;

  // [batch] each; null where a half of the step does not read it
  const int64_t* block_start = nullptr;
  const int64_t* policy = nullptr;
  const float* threshold = nullptr;
  const float* relaxed_threshold = nullptr;
  const int64_t* radius = nullptr;
  const float* temperature = nullptr;
  const int64_t* seed = nullptr;
  int64_t* step = nullptr;
  int64_t* steps_left = nullptr;
  int64_t* stable_steps = nullptr;  // [batch, block_length]
  uint32_t* tickets = nullptr;      // [batch, block_length + 1], zeros between calls

  int64_t* candidates = nullptr;  // [batch, block_length]
  float* statistics = nullptr;    // [batch, block_length, kNumStatistics]
  bool* committed = nullptr;      // [batch, block_length]
  int64_t* counts = nullptr;      // [batch, 4]: committed, remaining, bad rows, problems
  RowPart* parts = nullptr;       // scratch: [batch, block_length, num_segments(vocab)]
  int64_t* row_list = nullptr;    // scratch of a CPU: [batch, block_length]
};

constexpr int64_t num_segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }
constexpr int64_t kRowPartBytes = 48;

// Defined once per backend: decode_step.cu (CUDA and emulated) and decode_step_cpu.cpp.
Status decode_step(const DecodeStepParams& params, const ExecutionContext& context);

struct DecodeStepPlan {
  int32_t block_x = 0;             // threads
  int64_t segments_per_block = 0;  // of one row
  int64_t blocks_per_row = 0;
  int64_t grid = 0;      // blocks; each strides over the (row, share) pairs if there are more
  int32_t features = 0;  // the smallest compiled set that covers those asked for
};
DecodeStepPlan plan_decode_step(int64_t batch, int64_t block_length, int64_t vocab, int32_t features, int64_t max_grid);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
