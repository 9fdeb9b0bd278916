"""What the ranks of a group share: :class:`Workspace`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
import uuid
from collections.abc import Callable

import torch
from torch import Tensor

from tokenweave_ops import _library
from tokenweave_ops._emulated_link import EmulatedLink
from tokenweave_ops._errors import CommunicationError, named_error
from tokenweave_ops._library import define_op
from tokenweave_ops._shared_memory import Agreement, DeviceMemory, HostMemory, LocalMemory, host_identity
from tokenweave_ops._watcher import Watcher

logger = logging.getLogger("tokenweave_ops")

MAX_WORLD_SIZE = 16
MAX_CHANNELS = 16
DEFAULT_TIMEOUT_S = 60.0
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 1e-3, 1e6
FIRST_CALL_FACTOR = 10.0  # kernels load, compilers run, and not at the same time on all ranks

# Words of a pad and of a record, as in csrc/allreduce_rmsnorm/workspace.h.
_FIRST_PROBE_WORD = 32
_RECORD_WORDS = 16

define_op(
    "workspace_open(Tensor token, Tensor description, float link_gigabytes_per_s, float link_latency_us) -> ()",
    fake=lambda token, description, link_gigabytes_per_s, link_latency_us: None,
)
define_op("workspace_close(Tensor token, int workspace) -> int", fake=lambda token, workspace: 1)
define_op(
    "workspace_refuse(Tensor token, int workspace, int channel) -> ()", fake=lambda token, workspace, channel: None
)
define_op("workspace_check(Tensor token, int workspace) -> ()", fake=lambda token, workspace: None)
define_op("workspace_pad_bytes(Tensor token, int num_channels) -> int", fake=lambda token, num_channels: 0)


# -------------------------------------------------------------------------------------------------------- the workspace


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise ValueError(f"Workspace: {variable} must be a number, got {text!r}") from None


class Workspace:
    """Memory that the ranks of one process group share, and the place where they signal each other.

    One per process group and model, made by all ranks of the group together, used by
    :func:`~tokenweave_ops.allreduce_rmsnorm_` and its relatives, closed by :meth:`close` or a ``with`` block::

        workspace = Workspace(group, max_tokens=8192, hidden=4096, dtype=torch.bfloat16, device="cuda")
        x = workspace.empty(num_tokens)                  # the row-parallel GEMM writes its partial sums here (out=)
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, workspace)

    Three kinds, one behaviour:

    - CUDA process group: torch's symmetric memory. Where the fabric has multicast (NVLink switches), sums and
      broadcasts run in the switch ("multimem"), else through the peers' addresses ("peer").
    - CPU process group: memory shared between processes of one host, native kernels.
    - :meth:`virtual`: all ranks in this process, for tests and for measuring on one device. Tensors then have a leading
      rank dimension: ``[world_size, num_tokens, hidden]``.

    Threads and streams: calls on one channel must follow each other, in the same order on all ranks: one thread at a
    time on a CPU, one stream (or streams joined by events) on a GPU. Two calls at once on one channel raise. Calls on
    different channels may run at the same time if every rank can run both: a GPU needs room for the blocks of both.
    A CUDA graph that holds such calls may be replayed as often as one likes, on all ranks alike, until
    :meth:`reset` or :meth:`close`; then capture it again. A forked child cannot use its parent's workspace.

    Deadlines: no call waits longer than ``timeout_s`` (60 s; TOKENWEAVE_TIMEOUT_S overrides; 10 times that for the
    first two calls on a channel; TOKENWEAVE_TIMEOUT_SCALE multiplies all of them, for debuggers and sanitizers). On a
    CPU a process that ends is noticed in tens of milliseconds. After a failed call on a CPU the op raises; on a GPU the
    rows of the call that were not finished are NaN, and the next call, :meth:`check` or the watcher of :meth:`watch`
    raises. Then the workspace refuses calls until :meth:`reset` on all ranks, except after a disagreement on a CPU,
    where all ranks have raised and are still in step.

    Args:
        group: a torch.distributed process group; never the default one silently. All of its ranks call at once.
        max_tokens, hidden, dtype: size of the largest tensor. The smallest of all ranks' sizes is what all get.
        device: "cpu" or "cuda" (the current device) or "cuda:N".
        staging: also allocate, per channel, what :func:`allreduce_rmsnorm` and :func:`gather_residual_` copy through.
        num_channels: how many calls may be in flight at once, 1 to 16.
        transport: "auto", "peer" (deterministic bits) or "multimem" (an error where the fabric has none).
        timeout_s: the deadline of a call.
        link: CPU process groups only: every call takes as long as on such a link, see :class:`EmulatedLink`.

    Raises:
        ValueError: an argument does not fit; on every rank if on one.
        CommunicationError: the ranks cannot reach each other's memory; on every rank.
    """

    _ids = itertools.count(1)
    link: EmulatedLink | None = None

    def __init__(
        self,
        group,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        device: str | torch.device,
        staging: bool = True,
        num_channels: int = 2,
        transport: str = "auto",
        timeout_s: float | None = None,
        link: EmulatedLink | None = None,
    ):
        if not hasattr(group, "rank") or not hasattr(group, "size"):
            raise ValueError(f"Workspace: group must be a torch.distributed process group, got {group!r}")
        agreement = Agreement(group)
        problem = None
        try:
            self._set_link(link, device)
            self._set_sizes(max_tokens, hidden, dtype, device, staging, num_channels, timeout_s)
            if agreement.world_size > MAX_WORLD_SIZE:
                raise ValueError(
                    f"Workspace: group must have at most {MAX_WORLD_SIZE} ranks, got {agreement.world_size}"
                )
            if transport not in ("auto", "peer", "multimem"):
                raise ValueError(f"Workspace: transport must be auto, peer or multimem, got {transport!r}")
            if transport == "multimem" and self.device.type == "cpu":
                raise ValueError("Workspace: transport must be peer or auto on a CPU, got 'multimem'")
        except Exception as error:
            problem = str(error)
        facts = {"problem": problem, "transport": transport}
        if problem is None:
            facts |= {
                "host": host_identity() if self.device.type == "cpu" else None,
                "link": link,
                "host_name": socket.gethostname(),
                "device_type": self.device.type,
                "buffer_bytes": self._buffer_bytes,
                "staging_bytes": self._staging_bytes,
                "num_channels": self.num_channels,
            }
        everyone = agreement.gather(facts)
        if problem is not None:
            raise ValueError(problem)
        for rank, other in enumerate(everyone):
            if other["problem"] is not None:
                raise ValueError(f"Workspace: rank {rank} refused: {other['problem']}")
            if other["device_type"] != self.device.type:
                raise ValueError(
                    f"Workspace: device must be of one type on all ranks, got {self.device.type} here and "
                    f"{other['device_type']} on rank {rank}"
                )
            for name in ("transport", "link"):
                if other[name] != facts[name]:
                    raise ValueError(
                        f"Workspace: {name} must be the same on all ranks, got {facts[name]!r} here and "
                        f"{other[name]!r} on rank {rank}"
                    )
            if other["host"] != facts["host"]:
                raise CommunicationError(
                    f"Workspace: CPU ranks must be processes of one host and one process namespace, but rank "
                    f"{agreement.rank} runs on {facts['host_name']} and rank {rank} on {other['host_name']}"
                )
        self._buffer_bytes = min(other["buffer_bytes"] for other in everyone)
        self._staging_bytes = min(other["staging_bytes"] for other in everyone)
        self.num_channels = min(other["num_channels"] for other in everyone)
        self._agreement = agreement
        agreement.attempt(
            "preparing the workspace",
            lambda: self._prepare(agreement.rank, agreement.world_size, False, torch.ops.tokenweave),
        )
        if self.device.type == "cpu":
            self._interrupt = _library.InterruptPoll()
            agreement.attempt("watching the other ranks' processes", self._open_liveness())
        self._memory = self._shared_memory("buffers", self._buffer_bytes + self.num_channels * self._staging_bytes)
        self._pads = self._shared_memory("pads", self._pad_bytes)
        has_multicast = all(agreement.gather(bool(self._memory.multicast_address and self._pads.multicast_address)))
        if transport == "multimem" and not has_multicast:
            raise CommunicationError(
                "Workspace: transport 'multimem' needs multicast memory (NVLink switches), which is not offered here"
            )
        self.transport = "multimem" if has_multicast and transport != "peer" else "peer"
        self._probe()
        agreement.attempt("opening the workspace", self._open)
        self._trial()
        if self.rank == 0:
            logger.info("%s", self)

    @classmethod
    def virtual(
        cls,
        world_size: int,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        device: str | torch.device = "cpu",
        staging: bool = True,
        num_channels: int = 2,
        timeout_s: float | None = None,
        link: None = None,
    ) -> Workspace:
        """All ranks in this process, on one device: "cpu", "cuda" or "simt" (the emulator, test builds only).

        On a GPU one launch runs all ranks with the kernel that real ranks run; on a CPU nobody has to wait, so the
        steps of the ranks are done one after the other. Other arguments are those of the constructor; there is no link.
        """
        if link is not None:
            raise ValueError(
                f"Workspace: link must be None for virtual ranks, which send each other nothing, got {link}"
            )
        self = cls.__new__(cls)
        is_simt = device == "simt"
        self._set_sizes(max_tokens, hidden, dtype, "cpu" if is_simt else device, staging, num_channels, timeout_s)
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"Workspace: world_size must be 1 to {MAX_WORLD_SIZE}, got {world_size}")
        self._agreement = None
        self._prepare(0, world_size, True, torch.ops.tokenweave_simt if is_simt else torch.ops.tokenweave)
        num_bytes = self._buffer_bytes + self.num_channels * self._staging_bytes
        self._memory = LocalMemory(world_size, num_bytes, self.device)
        self._pads = LocalMemory(world_size, self._pad_bytes, self.device)
        self.transport = "peer"
        self._open()
        return self

    # ------------------------------------------------------------------------------------------------------ making it

    def _set_sizes(self, max_tokens, hidden, dtype, device, staging, num_channels, timeout_s) -> None:
        if max_tokens < 1:
            raise ValueError(f"Workspace: max_tokens must be at least 1, got {max_tokens}")
        if hidden < 8 or hidden % 8 != 0 or hidden > 16384:
            raise ValueError(f"Workspace: hidden must be a multiple of 8 from 8 to 16384, got {hidden}")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"Workspace: dtype must be bf16, fp16 or fp32, got {dtype}")
        if not 1 <= num_channels <= MAX_CHANNELS:
            raise ValueError(f"Workspace: num_channels must be 1 to {MAX_CHANNELS}, got {num_channels}")
        timeout_s = _number("TOKENWEAVE_TIMEOUT_S", DEFAULT_TIMEOUT_S) if timeout_s is None else float(timeout_s)
        scale = _number("TOKENWEAVE_TIMEOUT_SCALE", 1.0)
        self.timeout_s = timeout_s * scale
        if not MIN_TIMEOUT_S <= self.timeout_s <= MAX_TIMEOUT_S:
            scaled = f" times TOKENWEAVE_TIMEOUT_SCALE={scale:g}" if scale != 1 else ""
            raise ValueError(
                f"Workspace: timeout_s must be {MIN_TIMEOUT_S:g} to {MAX_TIMEOUT_S:g}, got {timeout_s:g}{scaled}"
            )
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("Workspace: device must be one that torch sees, got cuda, and torch sees no GPU")
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"Workspace: device must be cpu or cuda, got {device}")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.hidden, self.dtype, self.num_channels = hidden, dtype, num_channels
        self._buffer_bytes = _round_up(max_tokens * hidden * dtype.itemsize, 4096)
        self._staging_bytes = self._buffer_bytes if staging else 0

    def _set_link(self, link: EmulatedLink | None, device: str | torch.device) -> None:
        if link is not None and not isinstance(link, EmulatedLink):
            raise ValueError(f"Workspace: link must be an EmulatedLink or None, got {link!r}")
        if link is not None and torch.device(device).type != "cpu":
            raise ValueError(f"Workspace: link must be None on {device}, whose links are real, got an {link}")
        self.link = link

    def _prepare(self, rank: int, world_size: int, is_virtual: bool, ops) -> None:
        self.rank, self.world_size, self.is_virtual, self._ops = rank, world_size, is_virtual, ops
        self._ranks_here = world_size if is_virtual else 1
        self.id = next(Workspace._ids)
        self.generation = 0
        self._liveness = [-1] * world_size
        self._interrupt = None
        self.token = torch.zeros(1, device=self.device)
        self._pad_bytes = _round_up(ops.workspace_pad_bytes(self.token, self.num_channels), 4096)
        self._watcher = None
        self._closed = False

    def _shared_memory(self, what: str, num_bytes: int):
        if self.device.type == "cuda":
            return DeviceMemory(self._agreement, num_bytes, what, self.device)
        return HostMemory(self._agreement, num_bytes, what)

    def _open_liveness(self) -> Callable[[], None]:
        """A pidfd per peer: it tells of the process's end even if nobody has reaped it, or a fork holds its files."""
        processes = self._agreement.gather(os.getpid())

        def open_all() -> None:
            for rank, process in enumerate(processes):
                try:
                    if rank != self.rank:
                        self._liveness[rank] = os.pidfd_open(process)
                except OSError as error:
                    if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):  # a sandbox may not have it
                        raise
                    logger.warning(
                        "the end of rank %d will be noticed at the deadline only: pidfd_open: %s", rank, error
                    )

        return open_all

    def _probe(self) -> None:
        """Writes a word to every peer's pad and reads it back, then looks for the peers' words in the own pad: a driver
        that claims access to a peer without giving it shows here and not as a hang."""
        pads = [pad.view(torch.int64) for pad in self._pads.tensors]
        seed = self._agreement.gather(uuid.uuid4().int >> 80)[0] << 8  # 48 bits that this memory cannot hold by chance

        def write():
            for peer, pad in enumerate(pads):
                expected = seed + 16 * self.rank + peer
                pad[_FIRST_PROBE_WORD + self.rank] = expected
                found = pad[_FIRST_PROBE_WORD + self.rank].item()
                if found != expected:
                    raise RuntimeError(f"wrote {expected} to rank {peer}'s memory and read back {found}")

        def look():
            for peer in range(self.world_size):
                expected, found = seed + 16 * peer + self.rank, pads[self.rank][_FIRST_PROBE_WORD + peer].item()
                if found != expected:
                    raise RuntimeError(f"what rank {peer} wrote has not arrived: {found} instead of {expected}")
                pads[self.rank][_FIRST_PROBE_WORD + peer] = 0

        self._agreement.attempt("the write and read-back probe of the peers' memory", write)
        self._agreement.attempt("the probe of the own memory", look)

    def _trial(self) -> None:
        """One small sum by the real kernel and transport, in which every rank's share shows."""

        def run():
            x = self.empty(self.world_size, 8, torch.float32)
            x.fill_(2.0**self.rank)
            self._ops.allreduce_(x, self.token, self.id, 0, 0)
            sums = x.cpu()
            self.check()
            if not torch.equal(sums, torch.full_like(sums, 2.0**self.world_size - 1)):
                raise RuntimeError(f"ranks contributing 1, 2, 4, ... summed up to {sums.unique().tolist()}")

        self._agreement.attempt("the trial sum", run)

    def _open(self) -> None:
        pinned = self.device.type == "cuda"
        # On the CPU whatever the default device is.
        self._record = torch.zeros(_RECORD_WORDS, dtype=torch.int64, device="cpu", pin_memory=pinned)
        timeout_ns = int(self.timeout_s * 1e9)
        description = [
            self.id, self.world_size, self.rank, self._ranks_here, int(self.transport == "multimem"),
            self._buffer_bytes, self._staging_bytes, self.num_channels,
            timeout_ns, int(timeout_ns * FIRST_CALL_FACTOR), self._pad_bytes, self._record.data_ptr(),
            self._interrupt.address if self._interrupt else 0,
            self._memory.multicast_address, self._pads.multicast_address,
            *self._memory.addresses, *self._pads.addresses, *self._liveness,
        ]  # fmt: skip
        self._ops.workspace_open(
            self.token,
            torch.tensor(description, dtype=torch.int64, device="cpu"),
            self.link.gigabytes_per_s if self.link else 0.0,
            self.link.latency_us if self.link else 0.0,
        )
        self.generation += 1

    # --------------------------------------------------------------------------------------------------------- using it

    @property
    def max_tokens(self) -> int:
        """Rows of ``hidden`` elements of ``dtype`` that fit the buffer: those asked for, or a few more."""
        return self._buffer_bytes // (self.hidden * self.dtype.itemsize)

    def empty(
        self, num_tokens: int, hidden: int | None = None, dtype: torch.dtype | None = None, *, offset_bytes: int = 0
    ) -> Tensor:
        """A tensor ``[num_tokens, hidden]`` inside the buffer (virtual ranks: ``[world_size, num_tokens, hidden]``).

        It is a view: tensors at overlapping offsets share memory, and the contents are whatever was there. Rows of it
        (``x[:n]``, ``x[n:]``) may be used as well, at the same place on all ranks. The buffer lives as long as the
        workspace or a view of it.
        """
        hidden, dtype = self.hidden if hidden is None else hidden, dtype or self.dtype
        num_bytes = num_tokens * hidden * dtype.itemsize
        if num_tokens < 0 or offset_bytes < 0 or offset_bytes % 16 or offset_bytes + num_bytes > self._buffer_bytes:
            raise ValueError(
                f"Workspace.empty: num_tokens must fit the buffer of {self._buffer_bytes} bytes per rank, from a "
                f"multiple of 16 on, got {num_bytes} bytes at offset {offset_bytes}"
            )
        if self._closed:
            raise CommunicationError(f"Workspace.empty: workspace {self.id} is closed")
        views = [
            memory[offset_bytes : offset_bytes + num_bytes].view(dtype).view(num_tokens, hidden)
            for memory in self._memory.tensors[self.rank : self.rank + self._ranks_here]
        ]
        if not self.is_virtual:
            return views[0]
        stride = self._memory.tensors[0].numel() // dtype.itemsize
        return views[0].as_strided((self.world_size, num_tokens, hidden), (stride, hidden, 1))

    def call(self, op: Callable, *arguments, channel: int | None = None):
        """op(*arguments), with failures raised as the classes of this module. Part of the public functions.

        ``channel``: the op is a collective on it. What is raised before it began is told to the peers.
        """
        if torch.compiler.is_compiling():
            return op(*arguments)
        try:
            return op(*arguments)
        except BaseException as error:
            if channel is not None:
                self.refuse(channel)
            if not isinstance(error, RuntimeError):
                raise
            raised = self._interrupt.take() if self._interrupt is not None and "was interrupted" in str(error) else None
            if raised is not None:
                raise raised from error  # what a signal handler raised while the op waited: KeyboardInterrupt
            raise named_error(error) from None

    def refuse(self, channel: int) -> None:
        """Tells the peers that this rank will not make the call that they make now, if the op has not told them. Part
        of the public functions."""
        with contextlib.suppress(Exception):  # closed, failed or no such channel: there is nobody to tell
            if not self.is_virtual:
                self._ops.workspace_refuse(self.token, self.id, channel)

    def check(self) -> None:
        """Raises if a call on this workspace has failed, CommunicationError or a subclass. Does not synchronise: on a
        GPU it knows of failures that have happened by now."""
        self.call(self._ops.workspace_check, self.token, self.id)

    def watch(self, on_error: Callable[[RuntimeError], None], interval_s: float = 0.05) -> None:
        """Starts a daemon thread that calls ``on_error(error)`` once if a call fails: for GPU programs that would
        otherwise learn of it at their next call. It ends then, or at :meth:`close`."""
        if self._closed:
            raise CommunicationError(f"Workspace.watch: workspace {self.id} is closed")
        if self._watcher is not None and self._watcher.is_alive():
            raise ValueError("Workspace.watch: a watcher is already running")
        self._watcher = Watcher(self, on_error, interval_s)

    def reset(self) -> None:
        """Makes the workspace usable again after a failure. Collective: all ranks call it, with no call in flight.

        Pads and record are new, never cleaned old ones, since a late write of the failed call may still arrive. Tensors
        of the buffer stay valid; CUDA graphs captured before must be captured again.
        """
        if self._closed:
            raise CommunicationError(f"Workspace.reset: workspace {self.id} is closed")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # The failed call's kernels may still hold the old ones.
        self._retired = [*getattr(self, "_retired", []), self._pads, self._record]
        if self._agreement is None:
            self._pads = LocalMemory(self.world_size, self._pad_bytes, self.device)
            self._open()
            return
        self._pads = self._shared_memory("pads", self._pad_bytes)
        self._probe()
        self._agreement.attempt("opening the workspace", self._open)  # nobody calls before all have opened

    def close(self) -> None:
        """Gives everything back. Not collective: a peer that still waits for this rank gets PeerLost (on a CPU at once,
        on a GPU at its deadline). Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._watcher is not None:
            self._watcher.stop()
        is_quiet = self._ops.workspace_close(self.token, self.id)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for descriptor in self._liveness:
            if descriptor >= 0:
                os.close(descriptor)
        self._liveness = []
        self._agreement = None
        # Not the record, which is small: another thread may be in check(). And nothing of it under a call that is still
        # inside, as when its signal handler closes: then it goes with this object.
        if is_quiet:
            self._memory = self._pads = None
            self._retired = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def __reduce_ex__(self, _protocol):
        raise TypeError("a Workspace cannot be copied or pickled: its memory belongs to one process")

    def __del__(self):
        if getattr(self, "_closed", True):
            return
        try:
            self.close()
        except Exception:  # the interpreter may be half gone; the operating system takes the memory back
            logger.debug("a workspace could not be closed", exc_info=True)

    def __repr__(self) -> str:
        kind = "virtual ranks" if self.is_virtual else f"rank {self.rank}"
        return (
            f"Workspace {self.id}: {kind} of {self.world_size} on {self.device}, transport {self.transport}, "
            f"{self._buffer_bytes >> 10} KiB of buffer and {self.num_channels} x {self._staging_bytes >> 10} KiB of "
            f"staging per rank, deadline {self.timeout_s:g} s" + (f", {self.link}" if self.link else "")
        )
