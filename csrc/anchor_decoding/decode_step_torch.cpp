// decode_step_, confidence_scan, select_and_commit_: argument checks, allocation, one call of the contract. What a
// request asks for is data on the device and is checked there.
#include <tuple>

#include "anchor_decoding/row_part.cuh"
#include "torch/check.h"
#include "torch/registry.h"
#include "torch/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

using OptionalTensor = std::optional<Tensor>;

void check_shape(const char* op, const TensorInfo& t, const char* meaning, const int64_t* sizes, int64_t dim) {
  bool same = t.dim == dim;
  for (int64_t axis = 0; same && axis < dim; ++axis) same = t.sizes[axis] == sizes[axis];
  if (!same) fail(op, t, std::string("have shape ") + meaning + "=" + join(sizes, dim), join(t.sizes, t.dim));
}

// The data of a contiguous tensor of one element type, of the batch's size and on the device of `first`.
class Checker {
 public:
  Checker(const char* op, const TensorInfo& first, int64_t batch, int64_t block_length)
      : op_(op), first_(first), sizes_{batch, block_length, 4}, batch_plus_{batch, block_length + 1} {}

  int64_t* per_request_int64(const char* name, const Tensor& tensor) const {
    return static_cast<int64_t*>(check(TensorInfo(name, tensor), int64_type(), "int64", "[batch]", sizes_, 1));
  }
  float* per_request_fp32(const char* name, const Tensor& tensor) const {
    return static_cast<float*>(check(TensorInfo(name, tensor), fp32_type(), "fp32", "[batch]", sizes_, 1));
  }
  int64_t* per_position_int64(const char* name, const Tensor& tensor) const {
    return static_cast<int64_t*>(
        check(TensorInfo(name, tensor), int64_type(), "int64", "[batch, block_length]", sizes_, 2));
  }
  float* statistics(const char* name, const Tensor& tensor) const {
    return static_cast<float*>(
        check(TensorInfo(name, tensor), fp32_type(), "fp32", "[batch, block_length, 4]", sizes_, 3));
  }
  uint32_t* tickets(const char* name, const Tensor& tensor) const {
    const TensorInfo info(name, tensor);
    return static_cast<uint32_t*>(
        check(info, aoti_torch_dtype_int32(), "int32", "[batch, block_length + 1]", batch_plus_, 2));
  }
  // A list of ids; its length goes to `count`.
  const int64_t* ids(const char* name, const OptionalTensor& tensor, int64_t& count) const {
    count = 0;
    if (!tensor.has_value()) return nullptr;
    const TensorInfo info(name, *tensor);
    if (info.dim != 1 || info.sizes[0] > kMaxListedIds) {
      fail(op_, info, "have shape [n] with n up to " + std::to_string(kMaxListedIds), join(info.sizes, info.dim));
    }
    const int64_t* data = static_cast<const int64_t*>(check(info, int64_type(), "int64", "[n]", info.sizes, 1));
    count = info.sizes[0];
    return data;
  }

 private:
  static int32_t int64_type() { return aoti_torch_dtype_int64(); }
  static int32_t fp32_type() { return aoti_torch_dtype_float32(); }

  void* check(const TensorInfo& t, int32_t dtype, const char* dtype_name, const char* meaning, const int64_t* sizes,
              int64_t dim) const {
    if (t.dtype != dtype) fail(op_, t, std::string("be ") + dtype_name, name_of_torch_dtype(t.dtype));
    check_same_device(op_, t, first_);
    check_shape(op_, t, meaning, sizes, dim);
    check_contiguous(op_, t);
    return t.data;
  }

  const char* op_;
  const TensorInfo& first_;
  int64_t sizes_[3];
  int64_t batch_plus_[2];
};

// The batch and its block length are those of `per_position`, [batch, block_length, ...].
void check_block(const char* op, const TensorInfo& per_position, DecodeStepParams& p) {
  if (per_position.dim < 2) {
    fail(op, per_position, "have shape [batch, block_length]", join(per_position.sizes, per_position.dim));
  }
  p.batch = per_position.sizes[0];
  p.block_length = per_position.sizes[1];
  if (p.block_length < 1 || p.block_length > kMaxBlockLength) {
    fail(op, per_position, "have a block_length of 1 to " + std::to_string(kMaxBlockLength),
         std::to_string(p.block_length));
  }
}

void check_tokens(const char* op, const TensorInfo& tokens, const TensorInfo& first, DecodeStepParams& p) {
  if (tokens.dtype != aoti_torch_dtype_int64()) fail(op, tokens, "be int64", name_of_torch_dtype(tokens.dtype));
  check_same_device(op, tokens, first);
  if (tokens.dim != 2 || tokens.sizes[0] != p.batch) {
    fail(op, tokens, "have shape [batch, length] with batch=" + std::to_string(p.batch),
         join(tokens.sizes, tokens.dim));
  }
  p.length = tokens.sizes[1];
  if (p.length > 1 && tokens.strides[1] != 1) {
    fail(op, tokens, "have a contiguous last dimension", "strides " + join(tokens.strides, 2));
  }
  if (p.batch > 1 && tokens.strides[0] < p.length) {
    fail(op, tokens, "have rows that do not overlap", "strides " + join(tokens.strides, 2));
  }
  p.tokens = static_cast<int64_t*>(tokens.data);
  p.token_stride = tokens.strides[0];
}

void check_features(const char* op, int64_t features) {
  if (features < 0 || features > 15) {
    raise(std::string(op) + ": features must be a sum of 1, 2, 4 and 8, got " + std::to_string(features));
  }
}

void check_mask_id(const char* op, int64_t mask_id, int64_t vocab) {
  if (mask_id < 0 || mask_id >= vocab) {
    raise(std::string(op) + ": mask_id must be an id of the vocabulary, 0 to " + std::to_string(vocab - 1) + ", got " +
          std::to_string(mask_id));
  }
}

struct RowArguments {
  const OptionalTensor &rows, &forbidden, &deferred, &previous_logits;
  int64_t mask_id, vocab_limit, features;
  bool exact;
};

// Logits and everything that says how to read them.
void check_logits(const char* op, const TensorInfo& logits, const RowArguments& a, const Checker& checker,
                  DecodeStepParams& p) {
  p.dtype = check_dtype(op, logits);
  if (logits.dim < 1 || logits.size(-1) < 2 || logits.size(-1) > kMaxVocab) {
    fail(op, logits, "have a last dimension, the vocabulary, of 2 to 1073741824", join(logits.sizes, logits.dim));
  }
  const int64_t vocab = logits.size(-1);
  p.num_rows = count_rows(logits);
  if (!a.rows.has_value() && p.num_rows != p.batch * p.block_length) {
    fail(op, logits,
         "have a row for each of " + std::to_string(p.batch) + " x " + std::to_string(p.block_length) +
             " positions (or pass rows)",
         std::to_string(p.num_rows) + " rows");
  }
  p.logits_rows = check_rows(op, logits);
  p.logits = logits.data;
  check_mask_id(op, a.mask_id, vocab);
  if (a.vocab_limit < 1 || a.vocab_limit > vocab) {
    raise(std::string(op) + ": vocab_limit must be 1 to the vocabulary's size " + std::to_string(vocab) + ", got " +
          std::to_string(a.vocab_limit));
  }
  check_features(op, a.features);
  p.vocab = a.vocab_limit;
  p.mask_id = a.mask_id;
  p.features = static_cast<int32_t>(a.features);
  p.exact = a.exact;
  if (a.rows.has_value()) p.rows = checker.per_position_int64("rows", *a.rows);
  p.forbidden = checker.ids("forbidden", a.forbidden, p.num_forbidden);
  p.deferred = checker.ids("deferred", a.deferred, p.num_deferred);
  if (a.previous_logits.has_value()) {
    const TensorInfo previous("previous_logits", *a.previous_logits);
    check_same_device(op, previous, logits);
    check_same_dtype(op, previous, logits);
    check_same_shape(op, previous, logits);
    p.previous_rows = check_rows(op, previous);
    p.previous_logits = previous.data;
  } else if ((p.features & kDivergence) != 0) {
    raise(std::string(op) + ": previous_logits must be given where features has divergence, got None");
  }
}

// The words of anchor_decoding.PROBLEMS.
const char* words_of(int64_t problems) {
  if (problems & kProblemBlock) return "block_start must leave the whole block within the sequence";
  if (problems & kProblemPolicy) return "policy must be a number of tokenweave_ops.POLICIES";
  if (problems & kProblemFeature) {
    return "the policy, or a temperature above 0, needs a feature that `features` lacks";
  }
  if (problems & kProblemThreshold) return "threshold and relaxed_threshold must not be NaN";
  if (problems & kProblemRadius) return "radius must be at least 0";
  if (problems & kProblemTemperature) return "temperature must be 0 to 1e30";
  if (problems & kProblemSteps) return "steps_left must be at least 1";
  return "rows must name rows of logits";
}

// Where the memory is at hand, what requests ask for is checked before anything is written; on a GPU the kernel skips
// such a request and counts it.
void check_requests(const char* op, const DecodeStepParams& p) {
  if constexpr (kReturnsWhenDone) {
    for (int64_t sequence = 0; sequence < p.batch; ++sequence) {
      int64_t problems = problems_of(p, sequence);
      for (int64_t j = 0; problems == 0 && j < p.block_length; ++j) {
        const bool is_lost =
            p.scan ? row_of(p, sequence, j) >= p.num_rows : p.candidates[sequence * p.block_length + j] == kNoSuchRow;
        if (is_lost && is_masked(p, sequence, j)) problems |= kProblemRows;
      }
      if (problems != 0) raise(std::string(op) + ": request " + std::to_string(sequence) + ": " + words_of(problems));
    }
  }
}

// What each half of a step reads of the requests.
struct SharedRequests {
  const Tensor &block_start, &threshold, &relaxed_threshold, &temperature, &step, &stable_steps;
};

void check_shared(const Checker& checker, const SharedRequests& r, DecodeStepParams& p) {
  p.block_start = checker.per_request_int64("block_start", r.block_start);
  p.threshold = checker.per_request_fp32("threshold", r.threshold);
  p.relaxed_threshold = checker.per_request_fp32("relaxed_threshold", r.relaxed_threshold);
  p.temperature = checker.per_request_fp32("temperature", r.temperature);
  p.step = checker.per_request_int64("step", r.step);
  p.stable_steps = checker.per_position_int64("stable_steps", r.stable_steps);
}

void check_policies(const Checker& checker, const Tensor& policy, const Tensor& radius, const Tensor& steps_left,
                    DecodeStepParams& p) {
  p.policy = checker.per_request_int64("policy", policy);
  p.radius = checker.per_request_int64("radius", radius);
  p.steps_left = checker.per_request_int64("steps_left", steps_left);
}

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

struct ScanOutputs {
  Tensor candidates, statistics, scratch;

  ScanOutputs(const Tensor& like, DecodeStepParams& p)
      : candidates(allocate(like, {p.batch, p.block_length}, torch::headeronly::ScalarType::Long)),
        statistics(allocate(like, {p.batch, p.block_length, 4}, torch::headeronly::ScalarType::Float)),
        scratch(allocate(like, {p.batch * p.block_length * (num_segments(p.vocab) * kRowPartBytes + 8)},
                         torch::headeronly::ScalarType::Byte)) {
    const int64_t num_parts = p.batch * p.block_length * num_segments(p.vocab);
    p.candidates = static_cast<int64_t*>(candidates.data_ptr());
    p.statistics = static_cast<float*>(statistics.data_ptr());
    p.parts = static_cast<RowPart*>(scratch.data_ptr());
    p.row_list = reinterpret_cast<int64_t*>(static_cast<char*>(scratch.data_ptr()) + num_parts * kRowPartBytes);
  }
};

struct CommitOutputs {
  Tensor counts, committed;

  CommitOutputs(const Tensor& like, DecodeStepParams& p)
      : counts(allocate(like, {p.batch, 4}, torch::headeronly::ScalarType::Long)),
        committed(allocate(like, {p.batch, p.block_length}, torch::headeronly::ScalarType::Bool)) {
    p.counts = static_cast<int64_t*>(counts.data_ptr());
    p.committed = static_cast<bool*>(committed.data_ptr());
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step_(
    const Tensor& logits, const Tensor& tokens, const Tensor& block_start, const Tensor& policy,
    const Tensor& threshold, const Tensor& relaxed_threshold, const Tensor& radius, const Tensor& temperature,
    const Tensor& seed, const Tensor& step, const Tensor& steps_left, const Tensor& stable_steps, const Tensor& tickets,
    const OptionalTensor& rows, const OptionalTensor& forbidden, const OptionalTensor& deferred,
    const OptionalTensor& previous_logits, int64_t mask_id, int64_t vocab_limit, int64_t features, bool exact) {
  constexpr const char* kOp = "decode_step_";
  const TensorInfo logits_info("logits", logits), tokens_info("tokens", tokens);
  DecodeStepParams p;
  check_block(kOp, TensorInfo("stable_steps", stable_steps), p);
  const Checker checker(kOp, logits_info, p.batch, p.block_length);
  check_logits(kOp, logits_info, {rows, forbidden, deferred, previous_logits, mask_id, vocab_limit, features, exact},
               checker, p);
  check_tokens(kOp, tokens_info, logits_info, p);
  check_shared(checker, {block_start, threshold, relaxed_threshold, temperature, step, stable_steps}, p);
  check_policies(checker, policy, radius, steps_left, p);
  p.seed = checker.per_request_int64("seed", seed);
  p.tickets = checker.tickets("tickets", tickets);

  check_requests(kOp, p);
  const ExecutionScope scope(logits);
  const ScanOutputs scan(logits, p);
  const CommitOutputs commit(logits, p);
  if (p.batch > 0) raise_unless(decode_step(p, scope.context()), kOp);
  return {commit.counts, commit.committed, scan.candidates, scan.statistics};
}
TOKENWEAVE_OP(
    "decode_step_(Tensor logits, Tensor(a!) tokens, Tensor block_start, Tensor policy, Tensor threshold,"
    " Tensor relaxed_threshold, Tensor radius, Tensor temperature, Tensor seed, Tensor(b!) step, Tensor(c!) steps_left,"
    " Tensor(d!) stable_steps, Tensor(e!) tickets, Tensor? rows, Tensor? forbidden, Tensor? deferred,"
    " Tensor? previous_logits, int mask_id, int vocab_limit, int features, bool exact)"
    " -> (Tensor counts, Tensor committed, Tensor candidates, Tensor statistics)",
    decode_step_);

std::tuple<Tensor, Tensor> confidence_scan(const Tensor& logits, const Tensor& tokens, const Tensor& block_start,
                                           const Tensor& threshold, const Tensor& relaxed_threshold,
                                           const Tensor& temperature, const Tensor& seed, const Tensor& step,
                                           const Tensor& stable_steps, const Tensor& tickets,
                                           const OptionalTensor& rows, const OptionalTensor& forbidden,
                                           const OptionalTensor& deferred, const OptionalTensor& previous_logits,
                                           int64_t mask_id, int64_t vocab_limit, int64_t features, bool exact) {
  constexpr const char* kOp = "confidence_scan";
  const TensorInfo logits_info("logits", logits), tokens_info("tokens", tokens);
  DecodeStepParams p;
  p.commit = false;
  check_block(kOp, TensorInfo("stable_steps", stable_steps), p);
  const Checker checker(kOp, logits_info, p.batch, p.block_length);
  check_logits(kOp, logits_info, {rows, forbidden, deferred, previous_logits, mask_id, vocab_limit, features, exact},
               checker, p);
  check_tokens(kOp, tokens_info, logits_info, p);
  check_shared(checker, {block_start, threshold, relaxed_threshold, temperature, step, stable_steps}, p);
  p.seed = checker.per_request_int64("seed", seed);
  p.tickets = checker.tickets("tickets", tickets);

  check_requests(kOp, p);
  const ExecutionScope scope(logits);
  const ScanOutputs scan(logits, p);
  if (p.batch > 0) raise_unless(decode_step(p, scope.context()), kOp);
  return {scan.candidates, scan.statistics};
}
TOKENWEAVE_OP(
    "confidence_scan(Tensor logits, Tensor tokens, Tensor block_start, Tensor threshold, Tensor relaxed_threshold,"
    " Tensor temperature, Tensor seed, Tensor step, Tensor stable_steps, Tensor(a!) tickets, Tensor? rows,"
    " Tensor? forbidden, Tensor? deferred, Tensor? previous_logits, int mask_id, int vocab_limit, int features,"
    " bool exact) -> (Tensor candidates, Tensor statistics)",
    confidence_scan);

std::tuple<Tensor, Tensor> select_and_commit_(const Tensor& candidates, const Tensor& statistics, const Tensor& tokens,
                                              const Tensor& block_start, const Tensor& policy, const Tensor& threshold,
                                              const Tensor& relaxed_threshold, const Tensor& radius,
                                              const Tensor& temperature, const Tensor& step, const Tensor& steps_left,
                                              const Tensor& stable_steps, int64_t mask_id, int64_t features) {
  constexpr const char* kOp = "select_and_commit_";
  const TensorInfo candidates_info("candidates", candidates), tokens_info("tokens", tokens);
  DecodeStepParams p;
  p.scan = false;
  check_block(kOp, candidates_info, p);
  const Checker checker(kOp, candidates_info, p.batch, p.block_length);
  p.candidates = checker.per_position_int64("candidates", candidates);
  p.statistics = checker.statistics("statistics", statistics);
  check_tokens(kOp, tokens_info, candidates_info, p);
  check_mask_id(kOp, mask_id, INT64_MAX);
  check_features(kOp, features);
  p.mask_id = mask_id;
  p.features = static_cast<int32_t>(features);
  check_shared(checker, {block_start, threshold, relaxed_threshold, temperature, step, stable_steps}, p);
  check_policies(checker, policy, radius, steps_left, p);

  check_requests(kOp, p);
  const ExecutionScope scope(candidates);
  const CommitOutputs commit(candidates, p);
  if (p.batch > 0) raise_unless(decode_step(p, scope.context()), kOp);
  return {commit.counts, commit.committed};
}
TOKENWEAVE_OP(
    "select_and_commit_(Tensor candidates, Tensor statistics, Tensor(a!) tokens, Tensor block_start, Tensor policy,"
    " Tensor threshold, Tensor relaxed_threshold, Tensor radius, Tensor temperature, Tensor(b!) step,"
    " Tensor(c!) steps_left, Tensor(d!) stable_steps, int mask_id, int features) -> (Tensor counts, Tensor committed)",
    select_and_commit_);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
