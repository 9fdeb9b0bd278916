// What tokenweave_ops.Workspace does here: it opens a workspace under an id, asks how it is, and closes it.
#include "allreduce_rmsnorm/workspace_torch.h"

#include <sched.h>

#include "torch/registry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// `description`: int64 on the CPU, in the order read below, then per rank buffer, pad and liveness. Without an emulated
// link its speed is 0.
void workspace_open(const Tensor& token, const Tensor& description, double link_gigabytes_per_s,
                    double link_latency_us) {
  constexpr const char* kOp = "workspace_open";
  const TensorInfo token_info("token", token), info("description", description);
  constexpr int64_t kFixed = 15;
  if (info.dtype != aoti_torch_dtype_int64() || info.dim != 1 || info.sizes[0] < kFixed ||
      info.device_type != aoti_torch_device_type_cpu()) {
    fail(kOp, info, "be a vector of int64 on the CPU", join(info.sizes, info.dim));
  }
  check_contiguous(kOp, info);
  const int64_t* next = static_cast<const int64_t*>(info.data);
  auto opened = std::make_shared<OpenWorkspace>();
  Workspace& view = opened->view;
  const int64_t id = *next++;
  view.world_size = static_cast<int32_t>(*next++);
  view.rank = static_cast<int32_t>(*next++);
  view.ranks_here = static_cast<int32_t>(*next++);
  view.transport = static_cast<Transport>(*next++);
  opened->buffer_bytes = *next++;
  opened->staging_bytes = *next++;
  opened->num_channels = *next++;
  opened->timeout_ns = static_cast<uint64_t>(*next++);
  opened->first_timeout_ns = static_cast<uint64_t>(*next++);
  const int64_t pad_bytes = *next++;
  view.record = reinterpret_cast<uint64_t*>(*next++);
  view.interrupted = reinterpret_cast<int32_t (*)()>(*next++);
  view.multicast_buffer = reinterpret_cast<char*>(*next++);
  view.multicast_pad = reinterpret_cast<uint64_t*>(*next++);
  if (view.world_size < 1 || view.world_size > kMaxWorldSize || info.sizes[0] != kFixed + 3 * view.world_size) {
    fail(kOp, info, "describe 1 to " + std::to_string(kMaxWorldSize) + " ranks", std::to_string(view.world_size));
  }
  if (opened->num_channels < 1 || opened->num_channels > kMaxChannels ||
      pad_bytes < pad_words(opened->num_channels) * 8) {
    fail(kOp, info, "have pads for 1 to " + std::to_string(kMaxChannels) + " channels",
         std::to_string(opened->num_channels) + " channels and " + std::to_string(pad_bytes) + " bytes");
  }
  for (int rank = 0; rank < view.world_size; ++rank) view.buffer[rank] = reinterpret_cast<char*>(*next++);
  for (int rank = 0; rank < view.world_size; ++rank) view.pad[rank] = reinterpret_cast<uint64_t*>(*next++);
  for (int rank = 0; rank < view.world_size; ++rank) view.liveness[rank] = static_cast<int32_t>(*next++);
  opened->link = {link_gigabytes_per_s, link_latency_us};
  opened->device_type = token_info.device_type;
  opened->device_index = token_info.device_index;
  opened->process = getpid();
  registry::add(id, std::move(opened));
}
TOKENWEAVE_OP(
    "workspace_open(Tensor token, Tensor description, float link_gigabytes_per_s, float link_latency_us) -> ()",
    workspace_open);

// Nonzero once no call of this process is inside any more, so that the memory may go. On a CPU calls that wait for
// peers, and peers that wait for this rank, are told. Zero if one is still inside because this is called from within
// it, by a signal handler. Unknown ids are fine: closing twice is no error.
int64_t workspace_close(const Tensor&, int64_t workspace) {
  const auto open = registry::take(workspace);
  if (open == nullptr || open->process != getpid()) return 1;
  open->closing.store(true);
  const Workspace& w = open->view;
  if (open->device_type == aoti_torch_device_type_cpu() && !w.is_virtual()) {
    __atomic_store_n(w.pad[w.rank] + kClosedWord, uint64_t{1}, __ATOMIC_RELEASE);
    __atomic_store_n(w.pad[w.rank] + kAbortWord, abort_word(Failure::closed, w.rank, w.rank), __ATOMIC_RELEASE);
  }
  int64_t quiet = 1;
  for (const OpenWorkspace::Channel& channel : open->channels) {
    for (pid_t inside; (inside = channel.thread.load()) != 0; sched_yield()) {
      if (inside != this_thread()) continue;
      quiet = 0;
      break;
    }
  }
  return quiet;
}
TOKENWEAVE_OP("workspace_close(Tensor token, int workspace) -> int", workspace_close);

// Raises if a call on this workspace has failed.
void workspace_check(const Tensor& token, int64_t workspace) {
  constexpr const char* kOp = "workspace_check";
  const auto open = registry::find(kOp, workspace, TensorInfo("token", token));
  if (recorded_failure(open->view) != Failure::none) raise_failure(kOp, open->view);
}
TOKENWEAVE_OP("workspace_check(Tensor token, int workspace) -> ()", workspace_check);

// Bytes of a pad with this many channels.
int64_t workspace_pad_bytes(const Tensor&, int64_t num_channels) { return pad_words(num_channels) * 8; }
TOKENWEAVE_OP("workspace_pad_bytes(Tensor token, int num_channels) -> int", workspace_pad_bytes);

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
