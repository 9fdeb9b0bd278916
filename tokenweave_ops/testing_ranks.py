"""Ranks of a group inside one process, for tests of what happens between ranks: see :class:`LocalRanks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tokenweave_ops import testing
from tokenweave_ops._shared_memory import LocalMemory
from tokenweave_ops._workspace import Workspace


class LocalRanks:
    """Ranks of a group that all live in this process, with a :class:`Workspace` and a launch each, as between GPUs.

    ``device="simt"``: in the emulator, over memory whose stores may be late and whose loads may be stale;
    ``transport="multimem"`` adds a multicast address that only multimem instructions may touch. ``device="cuda"``: on
    one GPU, each rank on a stream of its own. Use as a context manager.
    """

    def __init__(
        self, world_size: int, max_tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, *,
        device: str = "simt", transport: str = "peer", num_channels: int = 2, timeout_s: float = 1.0,
    ):  # fmt: skip
        self._is_simt = device == "simt"
        self._simt = testing.host().simt if self._is_simt else None
        self._registered: list[int] = []
        self._registered_multicast: list[int] = []
        self._transport = transport
        ops = torch.ops.tokenweave_simt if self._is_simt else torch.ops.tokenweave
        if self._is_simt:
            testing.load_simt()
        self.workspaces: list[Workspace] = []
        for rank in range(world_size):
            workspace = Workspace.__new__(Workspace)
            workspace._set_sizes(
                max_tokens, hidden, dtype, "cpu" if self._is_simt else device, True, num_channels, timeout_s
            )
            workspace._prepare(rank, world_size, False, ops)
            workspace._agreement = workspace._interrupt = None
            workspace._liveness = [-1] * world_size
            workspace.transport = transport
            self.workspaces.append(workspace)
        first = self.workspaces[0]
        buffers = self._share(first._buffer_bytes + num_channels * first._staging_bytes)
        for workspace in self.workspaces:
            workspace._memory = buffers
        self.reset()
        self._streams = [] if self._is_simt else [torch.cuda.Stream() for _ in self.workspaces]

    def _share(self, num_bytes: int) -> LocalMemory:
        world_size = len(self.workspaces)
        memory = LocalMemory(world_size, num_bytes, self.workspaces[0].device)
        if self._is_simt:
            self._simt.register_peer_memory(memory.addresses[0], world_size * num_bytes)
            self._registered.append(memory.addresses[0])
        if self._transport == "multimem":
            # Nothing is mapped there: an access that is not a multimem instruction must not get through.
            memory.multicast_address = (1 << 46) + (len(self._registered) << 36)
            self._simt.register_multicast(memory.multicast_address, num_bytes, memory.addresses)
            self._registered_multicast.append(memory.multicast_address)
        return memory

    def reset(self) -> None:
        """New pads and records for all ranks: what Workspace.reset() does, without a process group to agree through."""
        pads = self._share(self.workspaces[0]._pad_bytes)
        for workspace in self.workspaces:
            workspace._pads = pads
            workspace._open()

    def run(self, call: Callable[[int, Workspace], object], ranks: Iterable[int] | None = None) -> list:
        """call(rank, workspace) for each rank; the launches it makes run side by side. Returns when they have ended."""
        ranks = range(len(self.workspaces)) if ranks is None else ranks
        if not self._is_simt:
            return self._run_on_streams(call, ranks)
        self._simt.begin_group()
        try:
            results = []
            for rank in ranks:
                self._simt.set_rank(rank)
                results.append(call(rank, self.workspaces[rank]))
        except BaseException:
            self._simt.discard_group()
            raise
        self._simt.run_group()
        return results

    def _run_on_streams(self, call, ranks) -> list:
        torch.cuda.synchronize()
        results = []
        for rank in ranks:
            with torch.cuda.stream(self._streams[rank]):
                results.append(call(rank, self.workspaces[rank]))
        torch.cuda.synchronize()
        return results

    def close(self) -> None:
        for workspace in self.workspaces:
            workspace.close()
        for address in self._registered:
            self._simt.unregister_peer_memory(address)
        for address in self._registered_multicast:
            self._simt.unregister_multicast(address)
        self._registered, self._registered_multicast = [], []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
