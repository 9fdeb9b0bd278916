"""What test_ranks.py runs on spawned ranks. A module of its own, since ranks import it by name."""

import os
import signal
import time

import torch
import torch.distributed as dist

import tokenweave_ops


def add_up(group, report, base):
    report(("rank", group.rank(), "threads", torch.get_num_threads()))
    total = torch.tensor(base + group.rank())
    dist.all_reduce(total, group=group)
    return group.rank(), total.item()


def one_raises(group, report):
    if group.rank() == 1:
        raise LookupError("no such token")
    while True:
        time.sleep(60)


def one_is_killed(group, report):
    """While the others wait for it in the fused op."""
    with tokenweave_ops.Workspace(group, max_tokens=4, hidden=8, dtype=torch.float32, device="cpu") as workspace:
        x = workspace.empty(4).zero_()
        residual, weight = torch.zeros(4, 8), torch.ones(8)
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, workspace)
        if group.rank() == 1:
            report(time.time())
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, workspace)


def wait_for_ever(group, report):
    report(os.getpid())
    while True:
        time.sleep(60)
