"""What test_weave.py runs on spawned ranks. A module of its own, since ranks import it by name."""

from contextlib import contextmanager

import numpy as np
import torch
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor, unobserved
from tokenweave_models.tokenweave.lanes import ThreadLane
from tokenweave_models.tokenweave.model import TorchCompute, random_decoder
from tokenweave_models.tokenweave.reduction import FusedReduction, SeparateReduction
from tokenweave_models.tokenweave.schedule import Schedule, check_schedule, overlaps
from tokenweave_models.tokenweave.tensor_parallel import shard

import tokenweave_ops
from tokenweave_ops import CommunicationError, SplitPlan, Workspace

MAX_TOKENS, NUM_SLOTS, MAX_LEN = 64, 3, 64
# Of each pass: query_lens, kv_lens, slots. Prompts, then a chunk of one beside decoded tokens.
PASSES = (((9, 12, 2), (9, 12, 2), (2, 0, 1)), ((1, 11, 1), (10, 23, 3), (2, 0, 1)), ((1, 1), (11, 4), (2, 1)))
SPLITS = (1, 9, 14, 22)  # of the first pass: at both ends, on an edge, inside a request


class InvariantCompute(TorchCompute):
    """Each row for itself, in memory of its own, so that its bits do not depend on the rows beside it."""

    def linear(self, x, weight, bias=None, out=None):
        y = torch.stack([torch.mv(weight, row.clone()) for row in x])
        y = y if bias is None else y + bias
        return y if out is None else out.copy_(y)

    def grouped_linear(self, x, weights, ends):
        groups = torch.bucketize(torch.arange(x.shape[0]), ends, right=True)
        return torch.stack([torch.mv(weights[group], row.clone()) for row, group in zip(x, groups, strict=True)])

    def attention(self, q, keys, values):
        rows, first = [], keys.shape[1] - q.shape[1]
        for i in range(q.shape[1]):
            end = first + i + 1
            one = super().attention(q[:, i : i + 1].clone(), keys[:, :end].clone(), values[:, :end].clone())
            rows.append(one)
        return torch.cat(rows, dim=1)

    def attention_of_singles(self, q, keys, values, positions):
        ends = (positions + 1).tolist()
        return torch.stack(
            [self.attention(q[i, :, None], keys[i, :, :end], values[i, :, :end])[:, 0] for i, end in enumerate(ends)]
        )


def plan_of(num_tokens: int, split: int) -> SplitPlan:
    return SplitPlan(num_tokens, "split" if split else "fuse", split, 4, 2, 8, launch="eager", predicted_us={})


def tokens_of(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def all_passes(executor: Executor, split_first: int, schedules: list | None = None) -> np.ndarray:
    """The logits of all passes, the first split at split_first and the others in the middle; 0 splits none."""
    logits = []
    for index, (query_lens, kv_lens, slots) in enumerate(PASSES):
        num_tokens = sum(query_lens)
        batch = Batch.of(tokens_of(num_tokens, seed=index), query_lens, kv_lens, slots)
        split = split_first if index == 0 or not split_first else num_tokens // 2
        observer = Schedule() if schedules is not None else unobserved
        rows = executor.forward(batch, plan_of(num_tokens, split), observer)
        if schedules is not None:
            schedules.append(observer)
        logits.append(executor.logits(rows).float())
    return torch.cat(logits).numpy()


class RankDecoder:
    """A rank's share of the same random decoder, and executors of it by mode."""

    def __init__(self, group, config: ModelConfig, dtype: torch.dtype, workspace: Workspace, compute):
        self.group, self.config, self.dtype, self.workspace, self.compute = group, config, dtype, workspace, compute
        self.model = shard(random_decoder(config, seed=7).to(dtype), group.rank(), group.size())

    def executor(self, mode: str) -> Executor:
        fused = FusedReduction(self.workspace)
        reduction, lane = {
            "reference": (self._separate(), None), "fused": (fused, None), "weave": (fused, ThreadLane())
        }[mode]  # fmt: skip
        cache = KVCache(self.config, NUM_SLOTS, MAX_LEN, world_size=self.group.size(), dtype=self.dtype)
        return Executor(self.model, cache, reduction, lane=lane, group=self.group, compute=self.compute)

    def _separate(self) -> SeparateReduction:
        """Its sum is that of the fused op: rounded once. gloo rounds after each addition."""

        def all_reduce(x, group):
            x.copy_(tokenweave_ops.allreduce(x, self.workspace))

        named = {"all_reduce": all_reduce} if isinstance(self.compute, InvariantCompute) else {}
        return SeparateReduction(self.group, MAX_TOKENS, self.config.hidden, self.dtype, **named)


@torch.inference_mode()
def run_all(group, report, configs: dict, invariant: bool):
    """By config and mode the logits of all passes, and what is wrong with the schedules of the split ones."""
    found = {}
    compute = InvariantCompute() if invariant else TorchCompute()
    for name, (config, dtype) in configs.items():
        with Workspace(group, MAX_TOKENS, config.hidden, dtype, device="cpu") as workspace:
            decoder = RankDecoder(group, config, dtype, workspace, compute)
            logits = {mode: all_passes(decoder.executor(mode), 0) for mode in ("reference", "fused")}
            problems, overlapping = [], []
            for split in SPLITS:
                schedules: list = []
                with decoder.executor("weave") as executor:
                    logits[f"weave at {split}"] = all_passes(executor, split, schedules)
                for schedule in schedules:
                    problems += check_schedule(schedule, config.num_layers, 2)
                    overlapping.append(overlaps(schedule))
        found[name] = {"logits": logits, "problems": problems, "overlapping": overlapping}
        report(name)
    return found


@torch.inference_mode()
def disagree(group, report, config: ModelConfig, plans: dict):
    """Each case: a plan per rank. What every rank got, by case; afterwards the ranks agree again."""
    found = {}
    with Workspace(group, MAX_TOKENS, config.hidden, torch.float32, device="cpu", timeout_s=20) as workspace:
        decoder = RankDecoder(group, config, torch.float32, workspace, TorchCompute())
        with decoder.executor("weave") as executor:
            batch = Batch.of(tokens_of(20, seed=1), (20,), (20,), (0,))
            expected = executor.forward(batch, plan_of(20, 10)).clone()
            for name, by_rank in plans.items():
                try:
                    executor.forward(batch, plan_of(20, by_rank[group.rank()]))
                    found[name] = ("no error", "")
                except CommunicationError as error:
                    found[name] = (type(error).__name__, str(error))
                workspace.reset()
                again = executor.forward(batch, plan_of(20, 10))
                found[name + ", again"] = torch.equal(again, expected)
    return found


class Broken(Exception):
    """What goes wrong on one rank alone."""


@torch.inference_mode()
def one_breaks(group, report, config: ModelConfig, places: list):
    """In each place of a split pass rank 1 breaks off, with no word to the others. What every rank got, by place, and
    whether the passes after it are right, without a reset."""
    found = {}
    with Workspace(group, MAX_TOKENS, config.hidden, torch.float32, device="cpu", timeout_s=20) as workspace:
        decoder = RankDecoder(group, config, torch.float32, workspace, TorchCompute())
        with decoder.executor("weave") as executor:
            batch = Batch.of(tokens_of(20, seed=1), (20,), (20,), (0,))
            expected = {split: executor.forward(batch, plan_of(20, split)).clone() for split in (10, 0)}
            for place in places:
                split, event, *where = place

                @contextmanager
                def break_off(event_here, step, event=event, where=where):
                    if group.rank() == 1 and [event_here, *step[:3]] == [event, *where]:
                        raise Broken("rank 1 alone")
                    yield

                # A plan for another batch is refused before anything is computed.
                num_tokens = 21 if group.rank() == 1 and event == "plan" else 20
                try:
                    executor.forward(batch, plan_of(num_tokens, split), break_off)
                    found[place] = ("no error", "")
                except (CommunicationError, Broken, ValueError) as error:
                    found[place] = (type(error).__name__, str(error))
                right = [torch.equal(executor.forward(batch, plan_of(20, s)), expected[s]) for s in (10, 0)]
                found[place] += (all(right),)
    return found


@torch.inference_mode()
def other_batches(group, report, config: ModelConfig):
    """Rank 1 comes with another batch or plan whose first reduction has the same size. What every rank got."""
    twenty = Batch.of(tokens_of(20, seed=1), (20,), (20,), (0,))
    by_rank = {
        "8 of 20, or 8": ((twenty, plan_of(20, 8)), (Batch.of(tokens_of(8, seed=1), (8,), (8,), (0,)), plan_of(8, 0))),
        "two requests, or one": (
            (Batch.of(tokens_of(20, seed=1), (12, 8), (12, 8), (0, 1)), None), (twenty, None)
        ),
        "another slot": ((twenty, None), (Batch.of(tokens_of(20, seed=1), (20,), (20,), (1,)), None)),
    }  # fmt: skip
    found = {}
    with Workspace(group, MAX_TOKENS, config.hidden, torch.float32, device="cpu", timeout_s=20) as workspace:
        decoder = RankDecoder(group, config, torch.float32, workspace, TorchCompute())
        with decoder.executor("weave") as executor:
            for name, cases in by_rank.items():
                try:
                    executor.forward(*cases[group.rank()])
                    found[name] = ("no error", "")
                except CommunicationError as error:
                    found[name] = (type(error).__name__, str(error))
                workspace.reset()
    return found
