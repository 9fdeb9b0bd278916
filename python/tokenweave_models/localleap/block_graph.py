"""A pass over the current blocks as one CUDA graph: the host launches hundreds of kernels with one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 2  # libraries load and allocate at their first calls, which a capture does not allow


class BlockGraph:
    """Replays ``compute``, a function of tensors on one GPU that stay where they are.

    decode_step_ is not in it, though it could be: it is one launch, hidden behind the pass, and outside it its time can
    be told from the model's.
    """

    def __init__(self, compute: Callable[[], Tensor], device: torch.device):
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    compute()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = compute()

    def replay(self) -> Tensor:
        """The result, until the next replay."""
        self._graph.replay()
        return self._result
