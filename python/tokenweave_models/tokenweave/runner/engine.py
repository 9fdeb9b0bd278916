"""Continuous batching over a decoder: what the scheduler picks runs, and each request that can goes on by one token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenweave_models.tokenweave.batch import Batch
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.runner.sampling import SamplingParams, next_tokens
from tokenweave_models.tokenweave.runner.serving import Chunk, Request, Scheduler
from tokenweave_ops import SplitPlan


class Engine:
    """Every rank runs one and gives it the same requests between the same steps; then all get the same tokens.

    Args:
        plan: how to split a batch.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        sampling: SamplingParams,
        plan: Callable[[Batch], SplitPlan | None] = lambda batch: None,
    ):
        self.executor, self.scheduler, self.sampling, self.plan = executor, scheduler, sampling, plan
        self._device = executor.model.norm.weight.device

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One pass. The requests that went on, each with its new token. Collective."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        batch = self._batch(chunks)
        rows = self.executor.forward(batch, self.plan(batch))
        going_on = [
            (chunk.request, row) for chunk, row in zip(chunks, batch.last_rows, strict=True) if chunk.is_last_known
        ]
        new_tokens = self._next_tokens(rows, going_on) if going_on else []
        self.scheduler.advance(chunks, new_tokens)
        return [(request, token) for (request, _), token in zip(going_on, new_tokens, strict=True)]

    def _batch(self, chunks: list[Chunk]) -> Batch:
        tokens = [token for chunk in chunks for token in chunk.request.tokens(chunk.begin, chunk.end)]
        tokens = torch.tensor(tokens)
        self.executor.model.check_tokens(tokens)
        return Batch.of(
            tokens.to(self._device),
            [chunk.num_tokens for chunk in chunks],
            [chunk.end for chunk in chunks],
            [chunk.request.slot for chunk in chunks],
        )

    def _next_tokens(self, rows: Tensor, going_on: list[tuple[Request, int]]) -> list[int]:
        logits = self.executor.logits(rows[[row for _, row in going_on]])
        numbers = [request.number for request, _ in going_on]
        positions = [request.num_tokens for request, _ in going_on]
        return next_tokens(logits, self.sampling, numbers, positions)
