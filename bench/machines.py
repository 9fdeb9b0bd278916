"""The two machines a case runs on: where buffers live, how calls are sampled, how the limit is measured beside them."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import environment, limits, timing

COLD_FACTOR = {"cpu": 4, "cuda": 2}  # rotating buffers exceed this many last-level caches
CPU_MEMORY_CAP = 3_000_000_000  # bytes of buffers on a CPU
MAX_COLD_SETS = 2048  # smaller calls would need more sets than this to be cold; they are measured hot only

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Buffer:
    """One tensor of a buffer set. `fill` makes its values; without it it is an output. Scratch does not rotate.
    `place(n)` makes it for n sets where it cannot lie anywhere, as in memory shared between ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[torch.Tensor, torch.Generator], None] | None = None
    rotates: bool = True
    place: Callable[[int], list[torch.Tensor]] | None = None
    row_dim: int = 0  # the dimension that counts rows

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Limit:
    kind: str  # "rmw", "copy", "read" of memory, "matmul" of arithmetic, or "none" where nothing comparable is measured
    buffers: tuple[str, ...]  # what our op touches; copy: sources, then destinations
    parts: Callable[[Tensors], list[torch.Tensor]] | None = None  # contiguous pieces of them, if not the whole buffers
    part_bytes: int | None = None  # of those pieces

    def tensors(self, one: Tensors) -> list[torch.Tensor]:
        return self.parts(one) if self.parts else [one[name] for name in self.buffers]

    def touched_bytes(self, buffers: dict[str, Buffer]) -> int:
        return self.part_bytes or sum(buffers[name].bytes for name in self.buffers)


class Machine:
    """What a process that measures alone does; ranks that measure together override it (bench/ranks.py)."""

    kind: str

    def agree(self, error: float, problem: str | None) -> tuple[float, str | None]:
        """The error and the exception of a contestant, as all who measure see them."""
        return error, problem

    def matmul(self) -> tuple[str, list[timing.Call], int]:
        """The limit of arithmetic and its flops: an fp32 matmul, which is multiply-adds and little else."""
        call, flops = limits.matmul_call(self.kind, torch.float32)
        return "matmul", [call], flops


class CpuMachine(Machine):
    kind = "cpu"

    def __init__(self, cache_bytes: int | None = None, memory_cap: int = CPU_MEMORY_CAP, clock=time.perf_counter):
        self.cache_bytes = cache_bytes or environment.last_level_cache_bytes(environment.cpu_caches())
        self.memory_cap, self.clock = memory_cap, clock
        self._arena = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def empty(self, buffers: list[Buffer]) -> list[torch.Tensor]:
        """Tensors in memory that is kept between cases, so that its pages are faulted in once. Each has a storage of
        its own: tensors that share one make torch.compile add overlap checks. Overwritten after the next call."""
        total = sum(_padded(buffer.bytes) for buffer in buffers)
        if len(self._arena) < total:
            self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensors, offset = [], 0
        for buffer in buffers:
            count = math.prod(buffer.shape)
            flat = torch.frombuffer(self._arena, dtype=buffer.dtype, count=count, offset=offset)
            tensors.append(flat.view(buffer.shape))
            offset += _padded(buffer.bytes)
        return tensors

    def sampler(self, calls: list[timing.Call], rotation: timing.Rotation, undo: list[timing.Call] | None = None):
        return timing.HostSampler(calls, rotation, self.clock, undo)

    def limit_calls(self, limit: Limit, sets: list[Tensors]) -> tuple[str, list[timing.Call], int]:
        """The limit runs as one more contestant, on the very buffers of the case if it is one of memory."""
        if limit.kind == "matmul":
            return self.matmul()
        pairs = [limits.stream_call(limit.kind, limit.tensors(one)) for one in sets]
        return limit.kind, [call for call, _ in pairs], pairs[0][1]

    def synchronize(self) -> None:
        pass


class CudaMachine(Machine):
    kind = "cuda"

    def __init__(self, cache_bytes: int | None = None):
        self.cache_bytes = cache_bytes or torch.cuda.get_device_properties(0).L2_cache_size
        self.clock = time.perf_counter
        self.memory_cap = int(torch.cuda.mem_get_info()[0] * 0.6)
        self.driver = timing.CudaDriver(torch.cuda.current_device())
        self._copy: tuple[timing.Call, int] | None = None

    def empty(self, buffers: list[Buffer]) -> list[torch.Tensor]:
        return [torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda") for buffer in buffers]

    def sampler(self, calls: list[timing.Call], rotation: timing.Rotation, undo: list[timing.Call] | None = None):
        if undo:
            raise ValueError("a CUDA graph holds many calls: nothing can be undone between them")
        return timing.CudaSampler(calls, self.driver)

    def limit_calls(self, limit: Limit, sets: list[Tensors]) -> tuple[str, list[timing.Call], int]:
        """Copy bandwidth on buffers of its own, far larger than L2: a small copy on a GPU measures its launch."""
        if limit.kind == "matmul":
            return self.matmul()
        if self._copy is None:
            size = max(8 * self.cache_bytes, 256 << 20) // 512 * 512
            source, target = self.empty([Buffer((size,), torch.uint8)] * 2)
            self._copy = limits.stream_call("copy", [source.zero_(), target])
        call, size = self._copy
        return "copy", [call], size

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _padded(size: int) -> int:
    return (size + 255) // 256 * 256


def rotation_sets(buffers: dict[str, Buffer], limit: Limit, machine) -> tuple[int, bool]:
    """Buffer sets so that what our op touches exceeds the caches, and whether they do. 1 set: only hot is possible."""
    touched = limit.touched_bytes(buffers)
    full = sum(_padded(buffer.bytes) for buffer in buffers.values() if buffer.rotates)
    wanted = max(2, COLD_FACTOR[machine.kind] * machine.cache_bytes // touched + 1)
    if wanted > MAX_COLD_SETS:
        return 1, False
    affordable = max(1, machine.memory_cap // full)
    return min(wanted, affordable), wanted <= affordable


def allocate(buffers: dict[str, Buffer], sets: int, machine) -> list[Tensors]:
    """`sets` buffer sets; scratch buffers are shared by all of them."""
    rotating = {name: buffer for name, buffer in buffers.items() if buffer.rotates}
    scratch = {name: buffer for name, buffer in buffers.items() if not buffer.rotates}
    placed = {name: buffer.place(sets) for name, buffer in rotating.items() if buffer.place}
    free = [name for name in rotating if name not in placed]
    tensors = iter(machine.empty([*scratch.values(), *([rotating[name] for name in free] * sets)]))
    shared = {name: next(tensors) for name in scratch}
    return [
        shared | {name: next(tensors) for name in free} | {name: tensors_of[i] for name, tensors_of in placed.items()}
        for i in range(sets)
    ]
