"""The processes that torchrun started, or this one alone: who they are, and how they agree, begin together and end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tokenweave_models.common.errors import UserError
from tokenweave_models.common.ranks import usable_cores
from tokenweave_models.tokenweave.runner.peer_watch import PeerWatch, host_identity

Result = TypeVar("Result")
LOADING_TIMEOUT_S = 1800.0  # for the slowest rank's disk


def outcome_of(step: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(what step() gave, what it refused)"""
    try:
        return step(), None
    except (UserError, ValueError, OSError) as error:
        return None, str(error)


def rank_of_environment() -> int:
    """This process's rank, before any group is made; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


class Ranks:
    """All ranks of a run; in one process without torchrun there is only rank 0.

    ``group`` is what a decoder's collectives go through: NCCL on GPUs, gloo on CPUs; None in one process. Decisions and
    measurements travel by gloo, so that they never wait for a GPU. No wait is longer than the timeout, or than
    LOADING_TIMEOUT_S where ranks read weights. (A rank that ends is noticed at once.)

    Raises UserError: the ranks cannot be.
    """

    def __init__(self, device_type: str, timeout_s: float):
        environment = os.environ
        self.rank, self.world_size = rank_of_environment(), int(environment.get("WORLD_SIZE", "1"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if device_type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"--device cuda: torch sees {torch.cuda.device_count()} GPUs here, {local_world_size} ranks need "
                    "one each"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        # torchrun sets OMP_NUM_THREADS to 1 for everyone.
        torch.set_num_threads(max(1, usable_cores() // local_world_size))
        self.group: dist.ProcessGroup | None = None
        self.watch: PeerWatch | None = None
        if self.world_size == 1:
            return
        if local_world_size == self.world_size:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: whatever its name resolves to
        timeout = timedelta(seconds=timeout_s)
        if device_type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=self.device)
            self._control = dist.new_group(backend="gloo", timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
            self._control = dist.group.WORLD
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout_s, LOADING_TIMEOUT_S)))
        self.group = dist.group.WORLD
        places = self.gather((host_identity(), os.getpid()))
        host = places[self.rank][0]
        self.watch = PeerWatch(
            self.rank, {peer: pid for peer, (where, pid) in enumerate(places) if where == host and peer != self.rank}
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, is_loading: bool = False) -> list:
        """What every rank gave, by rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient if is_loading else self._control)
        return values

    def broadcast(self, value: int) -> int:
        """What rank 0 gave."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64)
        dist.broadcast(shared, src=0, group=self._control)
        return int(shared)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def attempt(self, step: Callable[[], Result], is_loading: bool = False) -> Result:
        """step() on every rank; if it refuses on one, UserError on all, with the words of the first that did."""
        result, problem = outcome_of(step)
        problems = self.gather(problem, is_loading)
        for rank, text in enumerate(problems):
            if text is not None:
                raise UserError(text if problems.count(text) == self.world_size else f"rank {rank}: {text}")
        return result

    def on_first(self, step: Callable[[], Result]) -> Result:
        """step() on rank 0 alone; on all ranks its result, which is sent to them, or its refusal."""
        result, problem = self.gather(outcome_of(step) if self.is_first else None)[0]
        if problem is not None:
            raise UserError(problem)
        return result

    def slowest(self, seconds: list[float]) -> list[float]:
        """For each measurement the longest of all ranks."""
        return [max(times) for times in zip(*self.gather(seconds), strict=True)]

    def close(self) -> None:
        """Together: no rank leaves while another may still wait for it."""
        if self.watch is None:
            return
        self.barrier()
        self.watch.stop()
        dist.destroy_process_group()
