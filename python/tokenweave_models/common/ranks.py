"""Runs a function on several CPU processes of this host that form a process group, and always ends.

Nothing outlives the call: ranks are killed when one of them fails, at the deadline, or when the parent leaves; if the
parent is killed they end themselves. For a program that starts its own ranks (torchrun does this for all others).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from tokenweave_models.common.errors import UserError

# After the first failure: how long the other ranks may take to say what they saw of it.
LAST_WORDS_S = 1.0


class RankFailed(UserError):
    """A rank raised, died or missed the deadline. The message says which, and what the others saw."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float,
    on_report: Callable[[Any], None] = lambda report: None,
) -> list[Any]:
    """``work(group, report, *arguments)`` on every rank, each with its share of the cores; the results by rank.

    Processes are spawned: work is a function of a module, and arguments, reports and results are pickled (numpy arrays,
    not tensors, which torch would send through /dev/shm). A rank's ``report(value)`` becomes ``on_report(value)`` here.
    """
    deadline = monotonic() + timeout_s
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                pipe, far_end = context.Pipe(duplex=False)
                arguments_of_rank = (rank, world_size, os.path.join(folder, "store"), timeout_s, far_end)
                process = context.Process(target=_rank, args=(*arguments_of_rank, work, arguments), name=f"rank {rank}")
                process.start()
                far_end.close()  # now a rank that dies closes its pipe
                processes.append(process)
                pipes.append(pipe)
            return _listen(processes, pipes, deadline, timeout_s, on_report)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def _listen(processes, pipes, deadline, timeout_s, on_report) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        waited_for = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        ready = wait(list(waited_for), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            if not failures:  # else only the last words of the others are missing
                failures = {rank: f"rank {rank}: not done after {timeout_s:g} s" for rank in waited_for.values()}
            break
        for pipe in ready:
            rank = waited_for[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failure", _how_it_ended(processes[rank])
            if kind == "result":
                results[rank] = value
            elif kind == "failure":
                failures[rank] = f"rank {rank}: {value}"
                deadline = min(deadline, monotonic() + LAST_WORDS_S)
            else:
                on_report(value)
    if failures:
        raise RankFailed("; ".join(failures[rank] for rank in sorted(failures)))
    return [results[rank] for rank in range(len(pipes))]


def _how_it_ended(process: BaseProcess) -> str:
    process.join(LAST_WORDS_S)
    status = process.exitcode
    if status is None:
        return "closed its pipe"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rank(rank, world_size, store, timeout_s, pipe, work, arguments) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends us
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: whatever its name resolves to
    try:
        torch.set_num_threads(max(1, usable_cores() // world_size))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = work(dist.group.WORLD, lambda value: pipe.send(("report", value)), *arguments)
        dist.barrier(group=dist.group.WORLD)  # no rank leaves while another may still wait for it
        pipe.send(("result", result))
        dist.destroy_process_group()
    except Exception as error:
        pipe.send(("failure", f"{type(error).__name__}: {error}"))
        os._exit(1)
