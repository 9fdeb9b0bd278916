"""A prefill of several sequences of one length, and the time it takes."""

from contextlib import nullcontext

from torch import Tensor

import tokenweave_ops
from tokenweave_models.common.stopwatch import Stopwatch
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.model import Decoder
from tokenweave_models.tokenweave.reduction import Reduction
from tokenweave_models.tokenweave.schedule import Step


def prefill_executor(model: Decoder, tokens: Tensor, reduction: Reduction, **options) -> Executor:
    """An executor with a cache for tokens [num_sequences, seq_len]; options are the Executor's."""
    weight = model.norm.weight
    cache = KVCache(
        model.config, *tokens.shape, world_size=model.world_size, dtype=weight.dtype, device=weight.device
    )  # fmt: skip
    return Executor(model, cache, reduction, **options)


def prefill_batch(tokens: Tensor) -> Batch:
    num_sequences, seq_len = tokens.shape
    lens = (seq_len,) * num_sequences
    return Batch.of(tokens.flatten(), lens, lens, range(num_sequences))


def prefill_logits(executor: Executor, tokens: Tensor, plan: tokenweave_ops.SplitPlan | None = None) -> Tensor:
    """[num_sequences, seq_len, vocab_size] of tokens [num_sequences, seq_len]."""
    return executor.logits(executor.forward(prefill_batch(tokens), plan)).unflatten(0, tokens.shape)


class ReductionTimes:
    """Observes how long each reduction holds the caller's lane: for all of it if it runs there, else for handing it
    over and for waiting until it is done."""

    def __init__(self, device):
        self._stopwatch = Stopwatch(device)
        self._steps: list[Step] = []

    def __call__(self, event: str, step: Step):
        if event not in ("submit", "wait"):
            return nullcontext()
        self._steps.append(step)
        return self._stopwatch.measure()

    def each_ms(self) -> list[float]:
        """In the order of submission."""
        by_step: dict[Step, float] = {}
        for step, ms in zip(self._steps, self._stopwatch.each_ms(), strict=True):
            by_step[step] = by_step.get(step, 0.0) + ms
        return list(by_step.values())


def timed_prefill(
    executor: Executor, tokens: Tensor, plan: tokenweave_ops.SplitPlan | None = None
) -> tuple[float, list[float]]:
    """(milliseconds of the pass, milliseconds for which each reduction held the caller's lane)"""
    batch = prefill_batch(tokens)
    whole, reductions = Stopwatch(tokens.device), ReductionTimes(tokens.device)
    with whole.measure():
        executor.logits(executor.forward(batch, plan, reductions))
    return whole.total_ms(), reductions.each_ms()
