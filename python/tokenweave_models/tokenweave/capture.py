"""A pass captured into one CUDA graph, both lanes in it: the host launches hundreds of kernels with one call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenweave_models.tokenweave.batch import Batch
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_ops import SplitPlan

WARM_UP_PASSES = 2  # libraries load and allocate at their first calls, which a capture does not allow


class CapturedPass:
    """Replays one batch's pass for other tokens: the same requests' lengths, places in the cache, and plan.

    Collective, like the passes it stands for: all ranks capture the same, and replay it equally often. It keeps the
    executor, whose memory the graph uses.

    Raises:
        ValueError: the batch is not on a GPU.
        RuntimeError: a replay after the workspace's reset(), which makes a new capture necessary.
    """

    def __init__(self, executor: Executor, batch: Batch, plan: SplitPlan | None = None):
        if not batch.tokens.is_cuda:
            raise ValueError(f"CapturedPass: batch must be on a GPU, got {batch.tokens.device}")
        # Tensors of the batch are read by every replay: its own, and kept.
        self.batch = replace(
            batch,
            tokens=batch.tokens.clone(),
            positions=batch.positions.clone(),
            token_slots=batch.token_slots.clone(),
        )
        self._executor, self._generation = executor, executor.reduction.generation
        with torch.cuda.device(batch.tokens.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_PASSES):
                    executor.forward(self.batch, plan)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._rows = executor.forward(self.batch, plan)

    def replay(self, tokens: Tensor | None = None) -> Tensor:
        """The normed rows [num_tokens, hidden] of tokens [num_tokens], or of those before."""
        if self._executor.reduction.generation != self._generation:
            raise RuntimeError("CapturedPass: the workspace was reset since; capture the pass again")
        if tokens is not None:
            if tokens.shape != self.batch.tokens.shape:
                raise ValueError(f"CapturedPass: tokens must be [{self.batch.num_tokens}], got {list(tokens.shape)}")
            self.batch.tokens.copy_(tokens)
        self._graph.replay()
        return self._rows
