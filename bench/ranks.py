"""Benchmarks between processes: ranks that run the same case in lockstep, and the parent that starts and stops them.

Every rank runs `harness.run_case` on its part of a case. What a decision depends on is the same number everywhere: a
sample lasts from an instant that all ranks wait for until the last of them is done, and errors are the worst of any
rank. So all ranks take the same steps, and any rank's row is the row.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

from bench import harness, machines, timing

LEAD_S = 50e-6  # from the last rank's arrival to the common start: by then every rank knows of it
MEETING_S = 120.0  # a rank that waits longer for the others gives up
ANSWER_S = 600.0  # the parent waits no longer for a case
KILL_S = 5.0


@dataclass(frozen=True)
class RankCase:
    """What the parent must know of a case, and how a rank makes its part of it. Its rows divide evenly over the ranks,
    so that the parts are of one size."""

    op: str
    case: str
    dtype: torch.dtype
    world_size: int
    make: Callable[[HostRank | DeviceRank], harness.Case]


class RanksFailed(RuntimeError):
    """A rank died, raised or did not answer."""


# --- in a rank --------------------------------------------------------------------------------------------------------


class Lockstep:
    """The ranks of one host start together and learn when the last was done: shared memory and spinning, because a
    barrier of messages lets ranks go one after the other. One word per rank and purpose, so no order of stores matters.
    """

    def __init__(self, words, rank: int, world_size: int, clock=time.monotonic):
        self.words, self.rank, self.clock = words, rank, clock  # monotonic is one clock for all processes of a host
        self.arrivals = range(world_size)
        self.finishes = range(world_size, 2 * world_size)
        self.start_word = 2 * world_size
        self.steps, self.started = 0, 0.0

    @staticmethod
    def num_words(world_size: int) -> int:
        return 2 * world_size + 1

    def agreed_time(self) -> float:
        return self.started

    def start(self) -> float:
        """Returns at one instant on all ranks, and says which."""
        self.steps += 1
        self.words[self.arrivals[self.rank]] = self.steps
        if self.rank == 0:
            self._wait(lambda: all(self.words[word] >= self.steps for word in self.arrivals))
            self.words[self.start_word] = self.clock() + LEAD_S
        self._wait(lambda: self.words[self.start_word] > self.started)
        self.started = self.words[self.start_word]
        while self.clock() < self.started:
            pass
        return self.started

    def finish(self) -> float:
        """The instant at which the last rank came here."""
        self.words[self.finishes[self.rank]] = self.clock()
        self._wait(lambda: all(self.words[word] > self.started for word in self.finishes))
        return max(self.words[word] for word in self.finishes)

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = self.clock() + MEETING_S
        while not done():
            if self.clock() > deadline:
                raise TimeoutError(f"rank {self.rank} waited {MEETING_S:g} s for the other ranks")
            os.sched_yield()  # ranks may be more than cores


class LockstepSampler(timing.HostSampler):
    MOST_INNER = 64  # a sum in place doubles with each call between two ranks

    def __init__(self, lockstep: Lockstep, calls, rotation, undo=None):
        super().__init__(calls, rotation, undo=undo)
        self.lockstep = lockstep

    def _time(self, calls: Sequence[timing.Call]) -> float:
        start = self.lockstep.start()
        for call in calls:
            call()
        return self.lockstep.finish() - start


class DeviceSampler(timing.CudaSampler):
    """Graph replays started together; the time of the slowest GPU."""

    def __init__(self, ranks: _Ranks, calls, driver):
        super().__init__(calls, driver)
        self.ranks = ranks

    def _time(self, work: timing.Call) -> float:
        self.ranks.lockstep.start()
        return self.ranks.worst(super()._time(work))


class _Ranks:
    """What a rank's machine has beyond a machine of its own: the other ranks."""

    def join(self, lockstep: Lockstep, rank: int, world_size: int, control, group) -> None:
        self.lockstep, self.rank, self.world_size = lockstep, rank, world_size
        self.control, self.group = control, group  # of the harness, on CPUs; of the contestants
        self.clock = lockstep.agreed_time

    def agree(self, error: float, problem: str | None) -> tuple[float, str | None]:
        answers = [None] * self.world_size
        dist.all_gather_object(answers, (error, problem), group=self.control)
        problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text is not None]
        return max(value for value, _ in answers), problems[0] if problems else None

    def worst(self, value: float) -> float:
        return self.agree(value, None)[0]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, stacked."""
        own = tensor.cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self.control)
        return torch.stack(parts).to(tensor.device)

    def fill_apart(self, tensor: torch.Tensor, generator: torch.Generator) -> None:
        """Values that no other rank has; the harness's own generator gives all ranks the same."""
        harness.fill_values(tensor, torch.Generator(tensor.device).manual_seed(1000 + self.rank))


class HostRank(_Ranks, machines.CpuMachine):
    """A process of a CPU, with its share of the caches and of the memory for buffers."""

    def __init__(self, world_size: int, cache_bytes: int):
        super().__init__(cache_bytes // world_size, machines.CPU_MEMORY_CAP // world_size)

    def sampler(self, calls, rotation, undo=None):
        return LockstepSampler(self.lockstep, calls, rotation, undo)

    def limit_calls(self, limit, sets):
        kind, calls, moved = super().limit_calls(limit, sets)
        return kind, calls, moved * self.world_size  # all ranks stream their part at once


class DeviceRank(_Ranks, machines.CudaMachine):
    """A process with a GPU of its own."""

    def join(self, *arguments) -> None:
        super().join(*arguments)
        self.memory_cap = -int(self.worst(-self.memory_cap))  # the smallest, so that all take as many buffer sets

    def sampler(self, calls, rotation, undo=None):
        if undo:
            raise ValueError("a CUDA graph holds many calls: nothing can be undone between them")
        return DeviceSampler(self, calls, self.driver)


def _join_ranks(rank: int, world_size: int, device: str, cache_bytes: int | None, words, meeting: str):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one host, whatever its name resolves to
    torch.set_num_threads(1)
    timeout, everyone = datetime.timedelta(seconds=60), list(range(world_size))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timeout)
    control = group = dist.new_group(everyone, timeout=timeout)
    if device == "cuda":
        group = dist.new_group(everyone, timeout=timeout, backend="nccl")
    machine = DeviceRank(cache_bytes) if device == "cuda" else HostRank(world_size, cache_bytes)
    machine.join(Lockstep(words, rank, world_size), rank, world_size, control, group)
    return machine


def _serve(pipe, rank: int, world_size: int, device: str, *arguments) -> None:
    """The life of a rank: rows of one case per request, until the parent sends None or has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its ranks
    try:
        machine = _join_ranks(rank, world_size, device, *arguments)
        while (request := pipe.recv()) is not None:
            family, quick, index, budget_s = request
            chosen = harness.load_family(family).rank_cases(device, quick)[index]
            with torch.no_grad():
                pipe.send((harness.run_case(chosen.make(machine), machine, budget_s), None))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, timing.first_line(error)))


# --- in the parent ----------------------------------------------------------------------------------------------------


class Processes:
    """The ranks, started once for many cases. Whatever happens to one of them, none is left behind."""

    def __init__(self, world_size: int, device: str, cache_bytes: int | None = None):
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="tokenweave-bench-")
        words = context.RawArray("d", Lockstep.num_words(world_size))
        shared = (world_size, device, cache_bytes, words, str(Path(self._directory.name) / "meeting"))
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, *shared), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(own)
            self.processes.append(process)

    def run_case(self, family: Path, quick: bool, index: int, budget_s: float, timeout_s: float = ANSWER_S) -> list:
        """The rows of a family's rank case. Raises RanksFailed, with all ranks ended, if one cannot."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # if it has ended, the answers tell
                pipe.send((family, quick, index, budget_s))
        rows, *others = self._answers(timeout_s)
        for row, *same in zip(rows, *others, strict=True):
            row["flags"] = list(dict.fromkeys(flag for one in (row, *same) for flag in one["flags"]))
        return rows

    def _answers(self, timeout_s: float) -> list[list[dict]]:
        deadline, answers = time.monotonic() + timeout_s, {}
        while waiting := [rank for rank in range(len(self.pipes)) if rank not in answers]:
            sources = [self.pipes[rank] for rank in waiting] + [self.processes[rank].sentinel for rank in waiting]
            if not connection.wait(sources, max(0.0, deadline - time.monotonic())):
                self._fail(f"ranks {', '.join(map(str, waiting))} did not answer within {timeout_s:g} s")
            failed = {}
            for rank in waiting:
                self._receive(rank, answers, failed)
            if failed:
                for rank in waiting:  # one that was killed says more than those that missed it, but is heard of later
                    if rank not in answers and rank not in failed:
                        self.processes[rank].join(0.5)
                        self._receive(rank, answers, failed)
                self._fail("; ".join(failed[rank] for rank in sorted(failed, key=lambda r: "ended" not in failed[r])))
        return [answers[rank] for rank in sorted(answers)]

    def _receive(self, rank: int, answers: dict, failed: dict) -> None:
        if rank in answers or rank in failed:
            return
        process = self.processes[rank]
        ended = not process.is_alive()  # asked first: its last words may be in the pipe
        try:
            if self.pipes[rank].poll():
                rows, problem = self.pipes[rank].recv()
                if problem is None:
                    answers[rank] = rows
                else:
                    failed[rank] = f"rank {rank}: {problem}"
                return
        except (EOFError, OSError):
            process.join(KILL_S)
            ended = True
        if ended:
            failed[rank] = f"rank {rank} ended with exit code {process.exitcode}"

    def _fail(self, problem: str) -> None:
        self._kill()
        raise RanksFailed(problem)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(KILL_S)

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + KILL_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._directory.cleanup()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind, *_exception) -> None:
        if kind is not None:
            self._kill()
        self.close()
