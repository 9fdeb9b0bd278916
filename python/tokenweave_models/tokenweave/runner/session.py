"""A decoder on the ranks of a run, ready in several modes: one set of weights, one cache, one workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter, sleep

import torch
import torch.distributed as dist
from torch import Tensor

from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.capture import CapturedPass
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.lanes import Lane, StreamLane, ThreadLane
from tokenweave_models.tokenweave.model import Decoder
from tokenweave_models.tokenweave.reduction import (
    EagerAddition,
    FusedAddition,
    FusedReduction,
    Reduction,
    SeparateReduction,
)
from tokenweave_models.tokenweave.runner.planning import Planner
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_ops import EmulatedLink, SplitPlan, Workspace

MODES = ("reference", "fused", "weave")
# `fused` without the emulated link that the other modes have: what is left if communication costs nothing.
NO_LINK = "no link"


def all_reduce_over(link: EmulatedLink | None) -> Callable[..., object]:
    """The group's all_reduce, no faster than the link: it returns once the link would have carried the rows, counted
    from when this rank came. (The workspace counts from when all have come, which gloo does not tell; so a rank that
    had to wait gets that time off, in favour of the reference.)"""
    if link is None:
        return dist.all_reduce

    def all_reduce(x: Tensor, group: dist.ProcessGroup) -> None:
        begin_s = perf_counter()
        dist.all_reduce(x, group=group)
        left_s = link.occupied_us(x.numel() * x.element_size(), group.size()) * 1e-6 - (perf_counter() - begin_s)
        if left_s > 0:
            sleep(left_s)

    return all_reduce


class Session:
    """Executors of one decoder by mode. They take turns: cache and buffers are the same.

    reference: all_reduce, then addition and norm. fused: allreduce_rmsnorm_. weave: fused, batches split as planned.
    "no link" is fused beside an emulated link, without it. In one process nothing is summed, and reference is torch's
    own addition and norm.

    Args:
        model: this rank's share.
        max_tokens: of a batch.
        num_slots, max_len: of the cache.
        timeout_s: of a call of the workspace; None leaves it its default.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: Decoder,
        planner: Planner,
        modes: Sequence[str],
        *,
        max_tokens: int,
        num_slots: int,
        max_len: int,
        link: EmulatedLink | None = None,
        timeout_s: float | None = None,
    ):
        self.ranks, self.model, self.planner, self.link = ranks, model, planner, link
        self.dtype, self.device = model.norm.weight.dtype, model.norm.weight.device
        self.max_tokens = max_tokens
        self.executors: dict[str, Executor] = {}
        self.cache = KVCache(
            model.config, num_slots, max_len, world_size=ranks.world_size, dtype=self.dtype, device=self.device
        )
        with ExitStack() as stack:
            self._workspace = self._make_workspace(stack, link, timeout_s)
            for mode in modes:
                lane = self._second_lane() if mode == "weave" else None
                without_link = self._make_workspace(stack, None, timeout_s) if mode == NO_LINK else None
                reduction = self._reduction(mode, without_link)
                executor = Executor(model, self.cache, reduction, lane=lane, group=ranks.group)
                self.executors[mode] = stack.enter_context(executor)
            self._stack = stack.pop_all()

    def plan(self, mode: str, batch: Batch) -> SplitPlan | None:
        return self.planner.plan(batch) if mode == "weave" else None

    def forward(self, mode: str, batch: Batch) -> Tensor:
        """The normed rows [num_tokens, hidden], until the next pass."""
        return self.executors[mode].forward(batch, self.plan(mode, batch))

    def prefill(self, mode: str, batch: Batch) -> Tensor:
        """[num_requests, vocab_size]: the logits of each request's last token."""
        return self.executors[mode].logits(self.forward(mode, batch)[batch.last_rows])

    def prefill_call(self, mode: str, batch: Batch, launch: str) -> Callable[[], Tensor]:
        """prefill(mode, batch), launched kernel by kernel ("eager") or as one CUDA graph ("graph"). Collective."""
        if launch == "eager":
            return lambda: self.prefill(mode, batch)
        captured = CapturedPass(self.executors[mode], batch, self.plan(mode, batch))
        return lambda: self.executors[mode].logits(captured.replay()[batch.last_rows])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _make_workspace(self, stack: ExitStack, link: EmulatedLink | None, timeout_s: float | None) -> Workspace | None:
        if self.ranks.group is None:
            return None
        return stack.enter_context(
            Workspace(
                self.ranks.group, self.max_tokens, self.model.config.hidden, self.dtype,
                device=self.device, staging=False, timeout_s=timeout_s, link=link,
            )
        )  # fmt: skip

    def _second_lane(self) -> Lane:
        return StreamLane(self.device) if self.device.type == "cuda" else ThreadLane()

    def _reduction(self, mode: str, without_link: Workspace | None) -> Reduction:
        sizes = (self.max_tokens, self.model.config.hidden, self.dtype, self.device)
        if self.ranks.group is None:
            return (EagerAddition if mode == "reference" else FusedAddition)(*sizes)
        if mode == "reference":
            return SeparateReduction(self.ranks.group, *sizes, all_reduce_over(self.link))
        return FusedReduction(without_link or self._workspace)
