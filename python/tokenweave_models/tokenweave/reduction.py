"""What ends every sublayer: sum over the ranks, residual addition, norm. Each class is one way to do it.

    EagerAddition       one process; torch's own addition and rms_norm
    FusedAddition       one process; tokenweave_ops.add_rms_norm_
    SeparateReduction   all_reduce of the process group, then tokenweave_ops.add_rms_norm_ on all rows
    FusedReduction      tokenweave_ops.allreduce_rmsnorm_: one pass, each rank adds and norms only the rows it owns

The last sublayer's GEMM writes its partial sums straight into the rows that are communicated.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import tokenweave_ops


class Reduction(Protocol):
    rank: int
    world_size: int
    max_tokens: int  # of a batch
    num_channels: int  # reductions that may run at once
    generation: int  # another one once CUDA graphs that hold reductions must be captured again

    def rows(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden]: where sublayers leave their partial sums and find normed rows. The same memory at every
        call."""

    def reduce(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int, tag: int
    ) -> None:
        """residual <- sum of x over ranks + residual; x <- rms_norm(residual), for rows x of ``rows()``.

        Of the residual a rank may keep only the rows it owns. Collective; calls on different channels may overlap.
        Ranks whose tags differ do not belong together.
        """

    def refuse(self, channel: int) -> None:
        """Tells the other ranks that this one will not make its next reduction on a channel, if they can be told."""


class _Local:
    """Rows of one process."""

    rank, world_size, num_channels, generation = 0, 1, 2, 0

    def __init__(self, max_tokens: int, hidden: int, dtype: torch.dtype, device: str | torch.device = "cpu"):
        self.max_tokens = max_tokens
        with torch.inference_mode(False):  # so that passes may run in inference mode and out of it
            self._buffer = torch.empty(max_tokens, hidden, dtype=dtype, device=device)

    def rows(self, num_tokens: int) -> Tensor:
        if num_tokens > self._buffer.shape[0]:
            raise ValueError(f"rows: num_tokens must be at most {self._buffer.shape[0]}, got {num_tokens}")
        return self._buffer[:num_tokens]

    def refuse(self, channel: int) -> None:
        pass


class EagerAddition(_Local):
    def reduce(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int, tag: int
    ) -> None:
        residual.add_(x)
        x.copy_(F.rms_norm(residual, weight.shape, weight, eps))


class FusedAddition(_Local):
    def reduce(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int, tag: int
    ) -> None:
        tokenweave_ops.add_rms_norm_(x, residual, weight, eps)


class SeparateReduction(_Local):
    """Two steps, in their strong form: in place, in memory allocated once, the addition and norm by our own op."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        all_reduce: Callable[..., object] = dist.all_reduce,
    ):
        super().__init__(max_tokens, hidden, dtype, device)
        self.group, self.all_reduce = group, all_reduce
        self.rank, self.world_size = group.rank(), group.size()

    def reduce(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int, tag: int
    ) -> None:
        self.all_reduce(x, group=self.group)
        tokenweave_ops.add_rms_norm_(x, residual, weight, eps)


class FusedReduction:
    """One step. The residual is sharded: each rank keeps only the rows it owns up to date, nobody reads the others."""

    def __init__(self, workspace: tokenweave_ops.Workspace):
        self.workspace = workspace
        self.rank, self.world_size, self.num_channels = workspace.rank, workspace.world_size, workspace.num_channels

    @property
    def max_tokens(self) -> int:
        return self.workspace.max_tokens

    @property
    def generation(self) -> int:
        return self.workspace.generation

    def refuse(self, channel: int) -> None:
        self.workspace.refuse(channel)

    def rows(self, num_tokens: int) -> Tensor:
        return self.workspace.empty(num_tokens)

    def reduce(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int, tag: int
    ) -> None:
        tokenweave_ops.allreduce_rmsnorm_(
            x, residual, weight, self.workspace, eps, channel=channel, max_ctas=max_ctas, tag=tag
        )  # fmt: skip
