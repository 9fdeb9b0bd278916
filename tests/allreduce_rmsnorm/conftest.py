"""The `ranks` fixture: a collective is called the same way whether its ranks are virtual, emulated or on a GPU. And the
`start` fixture: ranks as real processes of this host."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenweave_ops import Workspace, _library, testing
from tokenweave_ops.testing_ranks import LocalRanks

family = testing.family("allreduce_rmsnorm")

# Virtual ranks on three backends, and ranks with a launch each: in the emulator (one per transport) and on one GPU.
KINDS = ("cpu", "simt", "simt-peer", "simt-multimem", "cuda", "cuda-peer")


@dataclass
class Ranks:
    """Calls a collective on all ranks. Tensors of all ranks have a leading rank dimension."""

    kind: str

    @property
    def device(self) -> str:
        return "cuda" if self.kind.startswith("cuda") else "cpu"

    @property
    def is_emulated(self) -> bool:
        return self.kind.startswith("simt")

    @property
    def sums_exactly(self) -> bool:
        """Whether the order of additions is that of the ranks, as with every transport but multimem."""
        return self.kind != "simt-multimem"

    def affordable(self, num_elements: int) -> bool:
        return not self.is_emulated or num_elements <= 400_000

    @contextlib.contextmanager
    def workspaces(self, world_size: int, max_tokens: int, hidden: int, dtype: torch.dtype, **options):
        """One that plays all ranks, or one per rank."""
        if "-" in self.kind:
            device, transport = self.kind.split("-")
            with LocalRanks(
                world_size, max(1, max_tokens), hidden, dtype, device=device, transport=transport, **options
            ) as local:
                yield Group(self, local.workspaces, local)
            return
        with Workspace.virtual(world_size, max(1, max_tokens), hidden, dtype, device=self.kind, **options) as workspace:
            yield Group(self, [workspace], None)


@dataclass
class Group:
    ranks: Ranks
    all: list[Workspace]
    local: LocalRanks | None

    @property
    def world_size(self) -> int:
        return self.all[0].world_size

    def _run(self, call, *tensors: Tensor) -> list:
        """call(workspace, *tensors of it): once with all ranks' tensors, or once a rank with its own."""
        with testing.emulated(family) if self.ranks.is_emulated else contextlib.nullcontext():
            if self.local is None:
                results = [call(self.all[0], *tensors)]
            else:
                results = self.local.run(lambda rank, workspace: call(workspace, *(t[rank] for t in tensors)))
        self.check()
        if self.local is not None and isinstance(results[0], Tensor):
            return torch.stack(results)
        return results[0]

    def check(self) -> None:
        if self.ranks.device == "cuda":
            torch.cuda.synchronize()
        for workspace in self.all:
            workspace.check()

    def inside(self, values: Tensor, **options) -> Tensor:
        """A copy of values [world_size, num_tokens, hidden] inside the workspace, again as one tensor or a list."""
        _, num_tokens, hidden = values.shape
        parts = [workspace.empty(num_tokens, hidden, values.dtype, **options) for workspace in self.all]
        if self.local is None:
            parts[0].copy_(values)
            return parts[0]
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)
        return parts

    def allreduce_rmsnorm_(self, x: Tensor, residual: Tensor, weight: Tensor, **options) -> Tensor:
        """The result of all ranks; residual is updated."""
        placed = self.inside(x, **({"offset_bytes": options.pop("offset_bytes")} if "offset_bytes" in options else {}))
        self._run(lambda w, a, r: family.allreduce_rmsnorm_(a, r, weight, w, **options), placed, residual)
        return placed.clone() if isinstance(placed, Tensor) else torch.stack(placed)

    def allreduce_rmsnorm(self, x: Tensor, residual: Tensor, weight: Tensor, **options) -> Tensor:
        return self._run(lambda w, a, r: family.allreduce_rmsnorm(a, r, weight, w, **options), x, residual)

    def allreduce_(self, x: Tensor, **options) -> Tensor:
        placed = self.inside(x)
        self._run(lambda w, a: family.allreduce_(a, w, **options), placed)
        return placed.clone() if isinstance(placed, Tensor) else torch.stack(placed)

    def allreduce(self, x: Tensor, **options) -> Tensor:
        return self._run(lambda w, a: family.allreduce(a, w, **options), x)

    def gather_residual_(self, residual: Tensor, **options) -> None:
        self._run(lambda w, r: family.gather_residual_(r, w, **options), residual)

    def pads_are_zero(self) -> bool:
        return all(not pad.any().item() for workspace in self.all for pad in workspace._pads.tensors)


@pytest.fixture(params=KINDS)
def ranks(request) -> Ranks:
    backend = request.param.split("-")[0]
    chosen = request.config.getoption("--backend")
    if chosen and backend not in chosen:
        pytest.skip("not among the backends asked for with --backend")
    reason = testing.cuda_unavailable_reason() if backend == "cuda" else _library.load_library(backend)
    if reason not in (None, "loaded"):
        if chosen:
            pytest.fail(f"backend {backend} was asked for: {reason}")
        pytest.skip(reason)
    if backend != "simt":
        yield Ranks(request.param)
        return
    simt = testing.host().simt
    before = simt.counters()["switches"]
    yield Ranks(request.param)
    if request.node.get_closest_marker("no_launch") is None:
        assert simt.counters()["switches"] > before, "this simt test never entered the emulator"


# ------------------------------------------------------------------------------------------------------------ processes

ANSWER_S = 60.0  # of a scenario; generous, so that only a hang exceeds it


class Processes:
    """A group of processes that run scenarios of rank_process.py together."""

    def __init__(self, world_size: int, store: Path):
        self.world_size = world_size
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        program = str(Path(__file__).with_name("rank_process.py"))
        self.processes = [
            subprocess.Popen(
                [sys.executable, program, str(rank), str(world_size), str(store)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        self.answers = [queue.Queue() for _ in self.processes]
        for process, answers in zip(self.processes, self.answers, strict=True):
            threading.Thread(target=self._read, args=(process, answers), daemon=True).start()
        self.pids = [self._answer(rank, ANSWER_S)["ready"] for rank in range(world_size)]

    @staticmethod
    def _read(process, answers) -> None:
        for line in process.stdout:
            if line.startswith("{"):
                answers.put(json.loads(line))
        answers.put({"ended": process.wait()})

    def _answer(self, rank: int, timeout_s: float) -> dict:
        try:
            return self.answers[rank].get(timeout=timeout_s)
        except queue.Empty:
            self.end()
            pytest.fail(f"rank {rank} gave no answer in {timeout_s} s: it hangs")

    def start(self, rank: int, scenario: str, **arguments) -> None:
        self.processes[rank].stdin.write(json.dumps([scenario, arguments]) + "\n")
        self.processes[rank].stdin.flush()

    def answer(self, rank: int, timeout_s: float = ANSWER_S) -> dict:
        return self._answer(rank, timeout_s)

    def run(self, scenario: str, ranks=None, **arguments) -> list[dict]:
        """The same on all ranks (or some), at once; their answers in order."""
        ranks = range(self.world_size) if ranks is None else ranks
        for rank in ranks:
            self.start(rank, scenario, **arguments)
        return [self.answer(rank) for rank in ranks]

    def succeed(self, scenario: str, ranks=None, **arguments) -> list:
        answers = self.run(scenario, ranks, **arguments)
        for answer in answers:
            assert "result" in answer, answer.get("traceback", answer)
        return [answer["result"] for answer in answers]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdin.close()


def _processes_in(folder: Path) -> Iterator[Callable[[int], Processes]]:
    started = []

    def start_processes(world_size: int) -> Processes:
        started.append(Processes(world_size, folder / f"store-{len(started)}"))
        return started[-1]

    yield start_processes
    for processes in started:
        processes.end()


@pytest.fixture
def start(tmp_path):
    """start(world_size): processes of the test's own, which it may kill."""
    yield from _processes_in(tmp_path)


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory):
    """start_shared(world_size): processes that the tests of a module share."""
    yield from _processes_in(tmp_path_factory.mktemp("ranks"))
