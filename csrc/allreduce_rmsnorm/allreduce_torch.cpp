// allreduce_rmsnorm_, allreduce_rmsnorm, allreduce_, allreduce and gather_residual_: argument checks, staging, one call
// of the contract. A rank that refuses its arguments tells the others, who would wait for it.
#include "allreduce_rmsnorm/allreduce.h"
#include "allreduce_rmsnorm/norm_torch.h"
#include "allreduce_rmsnorm/rms_norm.h"
#include "allreduce_rmsnorm/workspace_torch.h"
#include "torch/registry.h"
#include "torch/rows.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

namespace {

constexpr int64_t kDefaultMaxCtas = 16;
constexpr int64_t kVirtualCtas = 112;  // of all ranks together; the smallest H100 has 114 multiprocessors
constexpr uint64_t kFirstCalls = 2;    // of a channel, with a longer deadline; making the workspace may have used one
constexpr int64_t kReplicated = 1;     // residual_mode; 0: sharded

// [..., hidden] as one rank's rows; virtual ranks come as [world_size, num_tokens, hidden].
struct RankRows {
  int64_t num_tokens = 0;
  RowLayout of_rank;        // of one rank's rows
  RowLayout of_all;         // of all rows here
  int64_t rank_stride = 0;  // elements between virtual ranks
};

RankRows check_rank_rows(const char* op, const TensorInfo& t, const Workspace& w) {
  RankRows rows;
  rows.of_all = check_rows(op, t);
  rows.of_rank = rows.of_all;
  rows.num_tokens = count_rows(t);
  if (w.is_virtual()) {
    if (t.dim != 3 || t.sizes[0] != w.world_size) {
      fail(op, t,
           "have shape [world_size, num_tokens, hidden] with world_size=" + std::to_string(w.world_size) +
               ", as the ranks are virtual",
           join(t.sizes, t.dim));
    }
    rows.num_tokens = t.sizes[1];
    rows.of_rank = RowLayout{t.sizes[1], t.strides[1], 0, t.strides[0] | t.strides[1]};
    rows.rank_stride = t.strides[0];
  }
  return rows;
}

void check_aligned(const char* op, const TensorInfo& t, const RowLayout& rows, int64_t element_bytes) {
  if (t.numel() > 0 && !is_aligned_16(t.data, rows, element_bytes)) {
    fail(op, t, "have rows that begin on 16-byte boundaries",
         "strides " + join(t.strides, t.dim) + " and a first element " +
             std::to_string(reinterpret_cast<uintptr_t>(t.data) % 16) + " bytes off");
  }
}

// Whether this thread's last call had begun, and failed: then it has told its peers. See workspace_refuse.
thread_local bool has_begun_and_failed = false;

// One call on one channel, from the check that the channel is free to the report of what went wrong.
class Call {
 public:
  Call(const char* op, Collective collective, const Tensor& token, int64_t workspace, int64_t channel, int64_t max_ctas)
      : op_(op), token_(token), open_(registry::find(op, workspace, TensorInfo("token", token))) {
    if (channel < 0 || channel >= open_->num_channels) {
      raise(std::string(op) + ": channel must be 0 to " + std::to_string(open_->num_channels - 1) + ", got " +
            std::to_string(channel));
    }
    if (recorded_failure(open_->view) != Failure::none) {
      raise(std::string(op) + ": " + describe_failure(open_->view) +
            "; since that call the workspace does not work, reset() it on every rank");
    }
    OpenWorkspace::Channel& slot = open_->channels[channel];
    pid_t nobody = 0;
    if (!slot.thread.compare_exchange_strong(nobody, this_thread())) {
      raise(std::string(op) + ": channel must be free, got channel " + std::to_string(channel) +
            " with another call inside");
    }
    channel_ = &slot;
    if (open_->closing.load()) {
      slot.thread.store(0);
      raise(std::string(op) + ": workspace must be open, got workspace " + std::to_string(workspace) +
            ", which another thread is closing");
    }
    params.workspace = open_->view;
    // Signal handlers of the host language run in its main thread only.
    if (this_thread() != open_->process) params.workspace.interrupted = nullptr;
    params.collective = collective;
    params.channel = static_cast<int32_t>(channel);
    params.sequence = ++slot.calls;
    params.timeout_ns = params.sequence <= kFirstCalls ? open_->first_timeout_ns : open_->timeout_ns;
    // The blocks of all virtual ranks must be resident on one GPU at once.
    const int64_t most = params.workspace.is_virtual() ? kVirtualCtas / params.workspace.world_size : kDefaultMaxCtas;
    params.max_ctas = static_cast<int32_t>(max_ctas != 0 ? max_ctas : most < kDefaultMaxCtas ? most : kDefaultMaxCtas);
    max_ctas_ = max_ctas;
  }
  Call(const Call&) = delete;
  ~Call() {
    channel_->thread.store(0);
    has_begun_and_failed = !is_done_;
  }

  // Runs the checks; if one raises, so will the other ranks.
  template <class Checks>
  auto check(const Checks& checks) {
    try {
      if (max_ctas_ < 0 || max_ctas_ > kMaxBlocks) {
        raise(std::string(op_) + ": max_ctas must be 1 to " + std::to_string(kMaxBlocks) +
              ", or 0 for the default, got " + std::to_string(max_ctas_));
      }
      return checks();
    } catch (...) {
      refuse();
      throw;
    }
  }

  // The peers need not wait for this rank in this call.
  void refuse() {
    const Workspace& w = params.workspace;
    if (w.world_size == w.ranks_here) return;
    const ExecutionScope scope(token_);
    (void)refuse_allreduce(params, scope.context());
  }

  RankRows check_x(const TensorInfo& x) {
    params.dtype = check_dtype(op_, x);
    check_same_device(op_, x, TensorInfo("token", token_));
    const RankRows rows = check_rank_rows(op_, x, params.workspace);
    params.num_tokens = rows.num_tokens;
    params.hidden = x.size(-1);
    if (params.hidden % 8 != 0 || params.hidden < 8 || params.hidden > kMaxAllreduceHidden) {
      fail(op_, x, "have a last dimension that is a multiple of 8 from 8 to " + std::to_string(kMaxAllreduceHidden),
           std::to_string(params.hidden));
    }
    return rows;
  }

  int64_t bytes_per_rank() const { return params.num_tokens * params.hidden * size_of(params.dtype); }

  // x itself holds the partial sums, at the same place of every rank's buffer.
  void use_in_place(const TensorInfo& x, const RankRows& rows) {
    const Workspace& w = params.workspace;
    const int64_t bytes = size_of(params.dtype);
    check_contiguous_rows(x, rows);
    if (params.num_tokens == 0) return;
    params.offset = static_cast<const char*>(x.data) - w.buffer[w.rank];
    const bool inside = params.offset >= 0 && params.offset + bytes_per_rank() <= open_->buffer_bytes;
    const bool in_step = !w.is_virtual() || rows.rank_stride * bytes == w.buffer[1] - w.buffer[0];
    if (!inside || !in_step) {
      fail(op_, x,
           "lie in the workspace's buffer of " + std::to_string(open_->buffer_bytes) +
               " bytes per rank (make it with workspace.empty)",
           std::to_string(bytes_per_rank()) + " bytes per rank that are not all in it");
    }
    if (params.offset % 16 != 0) {
      fail(op_, x, "begin on a 16-byte boundary of the workspace", "byte " + std::to_string(params.offset));
    }
  }

  // The rows go through the channel's staging.
  void use_staging(const TensorInfo& t) {
    params.offset = open_->staging_offset(params.channel);
    if (bytes_per_rank() > open_->staging_bytes) {
      fail(op_, t,
           "fit the workspace's staging of " + std::to_string(open_->staging_bytes) + " bytes per rank and channel",
           std::to_string(bytes_per_rank()) + " bytes");
    }
  }
  void stage_input(const TensorInfo& x, const RankRows& rows) {
    use_staging(x);
    params.input = x.data;
    params.input_rows = rows.of_rank;
    params.input_rank_stride = rows.rank_stride;
  }

  RankRows check_residual(const TensorInfo& residual) {
    const RankRows rows = check_rank_rows(op_, residual, params.workspace);
    check_rows_disjoint(op_, residual, rows.of_all);
    if (rows.num_tokens > rows.of_rank.inner_rows) {
      fail(op_, residual, "have rows at one stride (call .contiguous())",
           "strides " + join(residual.strides, residual.dim));
    }
    check_aligned(op_, residual, rows.of_rank, size_of(params.dtype));
    params.residual = residual.data;
    params.residual_rows = rows.of_rank;
    params.residual_rank_stride = rows.rank_stride;
    return rows;
  }

  void check_norm(const TensorInfo& x, const RankRows& x_rows, const TensorInfo& residual, const TensorInfo& weight,
                  double eps, double weight_bias, int64_t residual_mode) {
    check_same_device(op_, weight, x);
    check_same_dtype(op_, weight, x);
    check_vector(op_, weight, "hidden", params.hidden);
    check_aligned(op_, weight, RowLayout{}, size_of(params.dtype));
    check_same_device(op_, residual, x);
    check_same_dtype(op_, residual, x);
    check_same_shape(op_, residual, x);
    const RankRows residual_rows = check_residual(residual);
    check_no_overlap(op_, residual, residual_rows.of_all, x, x_rows.of_all, size_of(params.dtype));
    check_weight_apart(residual, residual_rows, weight);
    check_scalars(op_, eps, weight_bias);
    if (residual_mode != 0 && residual_mode != kReplicated) {
      raise(std::string(op_) + ": residual_mode must be 0 (sharded) or 1 (replicated), got " +
            std::to_string(residual_mode));
    }
    params.weight = weight.data;
    params.eps = static_cast<float>(eps);
    params.weight_bias = static_cast<float>(weight_bias);
  }

  // A written tensor must not share memory with the weight, which is read after rows have been written. Rank by rank:
  // virtual ranks lie far apart, and the weight may lie between them.
  void check_weight_apart(const TensorInfo& written, const RankRows& rows, const TensorInfo& weight) const {
    if (params.num_tokens == 0) return;
    const int64_t bytes = size_of(params.dtype);
    for (int rank = 0; rank < params.workspace.ranks_here; ++rank) {
      const char* begin = static_cast<const char*>(written.data) + rank * rows.rank_stride * bytes;
      const char* end = begin + (rows.of_rank.offset(params.num_tokens - 1) + params.hidden) * bytes;
      check_apart_from_weight(op_, written, begin, end, weight, params.hidden * bytes);
    }
  }

  void run() {
    // A call that is done when it returns has a record of its own: what it reports is not another channel's business.
    // Only what ends the workspace goes into the workspace's.
    uint64_t own_record[kRecordWords] = {};
    if (kReturnsWhenDone) params.workspace.record = own_record;
    params.link_ns = link_ns(open_->link, params.collective, bytes_per_rank(), params.workspace.world_size);
    const ExecutionScope scope(token_);
    raise_unless(allreduce(params, context_of(scope)), op_);
    const Workspace& w = params.workspace;
    is_done_ = recorded_failure(w) == Failure::none;
    if (is_done_) return;
    if (kReturnsWhenDone && own_record[kRecordRecoverable] == 0) open_->keep_record(own_record);
    raise_failure(op_, w);
  }

  // The replicated residual: every rank adds and norms all rows itself, as it would after any other all-reduce.
  void add_and_norm(void* x, const RowLayout& x_rows, const RowLayout& residual_rows) const {
    RmsNormParams norm;
    norm.num_rows = params.num_tokens * params.workspace.ranks_here;
    norm.hidden = params.hidden;
    norm.dtype = params.dtype;
    norm.eps = params.eps;
    norm.weight_bias = params.weight_bias;
    norm.x = norm.y = x;
    norm.residual = norm.h = params.residual;
    norm.weight = params.weight;
    norm.x_rows = norm.y_rows = x_rows;
    norm.residual_rows = norm.h_rows = residual_rows;
    if (norm.num_rows == 0) return;
    const ExecutionScope scope(token_);
    raise_unless(rms_norm(norm, context_of(scope)), op_);
  }

  AllreduceParams params;

 private:
  // On a CPU the calling thread alone may be asked for: a second thread of a program, which drives collectives while
  // the first one computes, would bring a whole team of its own.
  ExecutionContext context_of(const ExecutionScope& scope) const {
    ExecutionContext context = scope.context();
    if (max_ctas_ == 1) context.parallel_for = nullptr;
    return context;
  }

  void check_contiguous_rows(const TensorInfo& x, const RankRows& rows) const {
    const bool one_stride = rows.of_rank.inner_rows >= rows.num_tokens;
    if (rows.num_tokens > 1 && !(one_stride && rows.of_rank.inner_stride == params.hidden)) {
      fail(op_, x, "be contiguous", "strides " + join(x.strides, x.dim));
    }
  }

  const char* op_;
  const Tensor& token_;
  std::shared_ptr<OpenWorkspace> open_;
  OpenWorkspace::Channel* channel_ = nullptr;
  int64_t max_ctas_ = 0;
  bool is_done_ = false;
};

// A new contiguous tensor like x that takes the result out of staging.
Tensor stage_output(Call& call, const TensorInfo& x, const Tensor& tensor) {
  Tensor y = torch::stable::new_empty(tensor, torch::headeronly::IntHeaderOnlyArrayRef(x.sizes, x.dim));
  call.params.output = y.data_ptr();
  call.params.output_rank_stride = call.params.num_tokens * call.params.hidden;
  return y;
}

}  // namespace

void allreduce_rmsnorm_(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& token,
                        int64_t workspace, double eps, double weight_bias, int64_t residual_mode, int64_t channel,
                        int64_t max_ctas, int64_t tag) {
  constexpr const char* kOp = "allreduce_rmsnorm_";
  const bool replicated = residual_mode == kReplicated;
  const TensorInfo x_info("x", x), residual_info("residual", residual), weight_info("weight", weight);
  Call call(kOp, replicated ? Collective::allreduce : Collective::allreduce_rmsnorm, token, workspace, channel,
            max_ctas);
  call.params.tag = static_cast<uint64_t>(tag);
  RankRows rows;
  call.check([&] {
    rows = call.check_x(x_info);
    call.use_in_place(x_info, rows);
    call.check_norm(x_info, rows, residual_info, weight_info, eps, weight_bias, residual_mode);
    call.check_weight_apart(x_info, rows, weight_info);
  });
  call.run();
  if (replicated) call.add_and_norm(x_info.data, rows.of_all, check_rows(kOp, residual_info));
}
TOKENWEAVE_OP(
    "allreduce_rmsnorm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, Tensor(c!) token, int workspace, float eps,"
    " float weight_bias, int residual_mode, int channel, int max_ctas, int tag=0) -> ()",
    allreduce_rmsnorm_);

Tensor allreduce_rmsnorm_op(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& token,
                            int64_t workspace, double eps, double weight_bias, int64_t residual_mode, int64_t channel,
                            int64_t max_ctas) {
  constexpr const char* kOp = "allreduce_rmsnorm";
  const bool replicated = residual_mode == kReplicated;
  const TensorInfo x_info("x", x), residual_info("residual", residual), weight_info("weight", weight);
  Call call(kOp, replicated ? Collective::allreduce : Collective::allreduce_rmsnorm, token, workspace, channel,
            max_ctas);
  Tensor y = call.check([&] {
    const RankRows rows = call.check_x(x_info);
    call.stage_input(x_info, rows);
    call.check_norm(x_info, rows, residual_info, weight_info, eps, weight_bias, residual_mode);
    return stage_output(call, x_info, x);
  });
  call.run();
  if (replicated) {
    const int64_t all_rows = call.params.num_tokens * call.params.workspace.ranks_here;
    call.add_and_norm(y.data_ptr(), RowLayout{all_rows, call.params.hidden, 0, call.params.hidden},
                      check_rows(kOp, residual_info));
  }
  return y;
}
TOKENWEAVE_OP(
    "allreduce_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, Tensor(b!) token, int workspace, float eps,"
    " float weight_bias, int residual_mode, int channel, int max_ctas) -> Tensor",
    allreduce_rmsnorm_op);

void allreduce_(const Tensor& x, const Tensor& token, int64_t workspace, int64_t channel, int64_t max_ctas) {
  constexpr const char* kOp = "allreduce_";
  const TensorInfo x_info("x", x);
  Call call(kOp, Collective::allreduce, token, workspace, channel, max_ctas);
  call.check([&] { call.use_in_place(x_info, call.check_x(x_info)); });
  call.run();
}
TOKENWEAVE_OP("allreduce_(Tensor(a!) x, Tensor(b!) token, int workspace, int channel, int max_ctas) -> ()", allreduce_);

Tensor allreduce_op(const Tensor& x, const Tensor& token, int64_t workspace, int64_t channel, int64_t max_ctas) {
  constexpr const char* kOp = "allreduce";
  const TensorInfo x_info("x", x);
  Call call(kOp, Collective::allreduce, token, workspace, channel, max_ctas);
  Tensor y = call.check([&] {
    call.stage_input(x_info, call.check_x(x_info));
    return stage_output(call, x_info, x);
  });
  call.run();
  return y;
}
TOKENWEAVE_OP("allreduce(Tensor x, Tensor(a!) token, int workspace, int channel, int max_ctas) -> Tensor",
              allreduce_op);

void gather_residual_(const Tensor& residual, const Tensor& token, int64_t workspace, int64_t channel,
                      int64_t max_ctas) {
  constexpr const char* kOp = "gather_residual_";
  const TensorInfo info("residual", residual);
  Call call(kOp, Collective::gather, token, workspace, channel, max_ctas);
  call.check([&] {
    call.check_x(info);
    call.check_residual(info);
    call.use_staging(info);
  });
  call.run();
}
TOKENWEAVE_OP("gather_residual_(Tensor(a!) residual, Tensor(b!) token, int workspace, int channel, int max_ctas) -> ()",
              gather_residual_);

// For what is raised before a call begins: by Python's checks, or by the dispatcher. The peers make that call, and
// would wait. Does nothing if the failed call had begun, as it has told them itself.
void workspace_refuse(const Tensor& token, int64_t workspace, int64_t channel) {
  if (has_begun_and_failed) {
    has_begun_and_failed = false;
    return;
  }
  Call("workspace_refuse", Collective::allreduce, token, workspace, channel, 0).refuse();
  has_begun_and_failed = false;
}
TOKENWEAVE_OP("workspace_refuse(Tensor token, int workspace, int channel) -> ()", workspace_refuse);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
