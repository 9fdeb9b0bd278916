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
    def rows(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden]: where sublayers leave their partial sums and find normed rows. The same memory at every
        call."""

    def reduce(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int) -> None:
        """residual <- sum of x over ranks + residual; x <- rms_norm(residual), for rows x of ``rows()``.

        Of the residual a rank may keep only the rows it owns. Collective; calls on different channels may overlap.
        """


class _Local:
    """Rows of one process."""

    def __init__(self, max_tokens: int, hidden: int, dtype: torch.dtype, device: str | torch.device = "cpu"):
        self._buffer = torch.empty(max_tokens, hidden, dtype=dtype, device=device)

    def rows(self, num_tokens: int) -> Tensor:
        if num_tokens > self._buffer.shape[0]:
            raise ValueError(f"rows: num_tokens must be at most {self._buffer.shape[0]}, got {num_tokens}")
        return self._buffer[:num_tokens]


class EagerAddition(_Local):
    def reduce(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int) -> None:
        residual.add_(x)
        x.copy_(F.rms_norm(residual, weight.shape, weight, eps))


class FusedAddition(_Local):
    def reduce(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int) -> None:
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

    def reduce(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int) -> None:
        self.all_reduce(x, group=self.group)
        tokenweave_ops.add_rms_norm_(x, residual, weight, eps)


class FusedReduction:
    """One step. The residual is sharded: each rank keeps only the rows it owns up to date, nobody reads the others."""

    def __init__(self, workspace: tokenweave_ops.Workspace):
        self.workspace = workspace

    def rows(self, num_tokens: int) -> Tensor:
        return self.workspace.empty(num_tokens)

    def reduce(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, channel: int, max_ctas: int) -> None:
        tokenweave_ops.allreduce_rmsnorm_(
            x, residual, weight, self.workspace, eps, channel=channel, max_ctas=max_ctas
        )  # fmt: skip
