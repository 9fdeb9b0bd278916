"""Memory that several ranks map: processes of one host, GPUs of one fabric, or virtual ranks of this process; and the
agreement by which the ranks of a group take a step together or fail together."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import torch
from torch import Tensor

from tokenweave_ops._errors import CommunicationError


class Agreement:
    """Steps that every rank of a group takes together, or that fail on all of them with the same words."""

    def __init__(self, group):
        self.group, self.rank, self.world_size = group, group.rank(), group.size()

    def gather(self, value) -> list:
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, what: str, step: Callable):
        """step() on every rank; if it raises on one, CommunicationError on all."""
        result, problem = None, None
        try:
            result = step()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(problem)) if text is not None]
        if problems:
            raise CommunicationError(f"Workspace: {what} failed on {'; '.join(problems)}")
        return result


def host_identity() -> tuple:
    """Equal for processes that can see each other in /proc: same boot, same process namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return boot, os.stat("/proc/self/ns/pid").st_ino


def create_memory(num_bytes: int) -> int:
    """A file descriptor of new zeroed memory that has no name: nothing is left when its processes end."""
    descriptor = os.memfd_create("tokenweave", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def map_memory(descriptor: int, num_bytes: int) -> Tensor:
    # Populated now: the first call should not pay for page faults.
    memory = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class HostMemory:
    """The same number of bytes on every rank of a group of processes on one host, mapped by all of them."""

    def __init__(self, agreement: Agreement, num_bytes: int, what: str):
        descriptor = -1

        def create():
            nonlocal descriptor
            descriptor = create_memory(num_bytes)
            return map_memory(descriptor, num_bytes)

        def attach():
            tensors = []
            for rank, (process, peer_descriptor) in enumerate(handles):
                if rank == agreement.rank:
                    tensors.append(own)
                    continue
                peer = os.open(f"/proc/{process}/fd/{peer_descriptor}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    tensors.append(map_memory(peer, num_bytes))
                finally:
                    os.close(peer)
            return tensors

        try:
            own = agreement.attempt(f"allocating {num_bytes} bytes of {what}", create)
            handles = agreement.gather((os.getpid(), descriptor))
            self.tensors: list[Tensor] = agreement.attempt(f"mapping the {what} of the other ranks", attach)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.multicast_address = 0


class DeviceMemory:
    """The same number of bytes on every GPU of a group, through torch's symmetric memory."""

    def __init__(self, agreement: Agreement, num_bytes: int, what: str, device: torch.device):
        from torch._C._distributed_c10d import _SymmetricMemory

        def allocate():
            # Not symmetric_memory.empty(): its pool hands memory out again, and ranks whose pools differ would meet in
            # different memory.
            own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
            own.zero_()
            torch.cuda.synchronize(device)
            return own

        own = agreement.attempt(f"allocating {num_bytes} bytes of symmetric memory for the {what}", allocate)

        def rendezvous():
            self._handle = _SymmetricMemory.rendezvous(own, agreement.group.group_name)
            return [
                own if rank == agreement.rank else self._handle.get_remote_tensor(rank, (num_bytes,), torch.uint8)
                for rank in range(agreement.world_size)
            ]

        self.tensors: list[Tensor] = agreement.attempt(f"mapping the {what} of the other ranks", rendezvous)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.multicast_address = int(self._handle.multicast_ptr or 0)


class LocalMemory:
    """Virtual ranks: all of them in one tensor of this process."""

    def __init__(self, world_size: int, num_bytes: int, device: torch.device):
        self._whole = torch.zeros(world_size, num_bytes, dtype=torch.uint8, device=device)
        self.tensors = list(self._whole)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.multicast_address = 0
