"""Tensor parallelism: the share of a decoder that a rank holds, and the two ways to sum over the ranks before a norm.

Heads and the inner features of the MLP are divided, as in Megatron-LM. q, k, v, gate and up keep some rows of their
weight (column-parallel: each rank makes other features); o and down keep some columns (row-parallel: each rank makes a
partial sum of all features). So one sum over the ranks ends each sublayer; the residual addition and the norm follow:

    separate    all_reduce of the process group, then tokenweave_ops.add_rms_norm_ on all rows
    fused       tokenweave_ops.allreduce_rmsnorm_: one pass, each rank adds and norms only the rows it owns

In both the GEMM writes its partial sums straight into the memory that is communicated.
"""

import torch
import torch.distributed as dist
from torch import Tensor

import tokenweave_ops
from tokenweave_models.tokenweave.model import Decoder

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def shard(model: Decoder, rank: int, world_size: int) -> Decoder:
    """The share of a rank: contiguous ranges of heads and inner features. Undivided weights are `model`'s own."""

    def share_of(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in COLUMN_PARALLEL:
            return weight.chunk(world_size, dim=0)[rank].clone()
        if module in ROW_PARALLEL:
            return weight.chunk(world_size, dim=1)[rank].contiguous()
        return weight

    with torch.device("meta"):
        share = Decoder(model.config, world_size)
    weights = {name: share_of(name, weight) for name, weight in model.state_dict().items()}
    share.load_state_dict(weights, assign=True)
    return share


def project_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, written to out [num_tokens, hidden] and shaped like x."""
    torch.mm(x.flatten(0, -2), weight.T, out=out)
    return out.view(*x.shape[:-1], -1)


class SeparateReduction:
    """Two steps, in their strong form: in place, in memory allocated once, the addition and norm by our own op."""

    def __init__(self, group: dist.ProcessGroup, max_tokens: int, hidden: int, dtype: torch.dtype):
        self.group = group
        self.buffer = torch.empty(max_tokens, hidden, dtype=dtype)

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return tokenweave_ops.rms_norm(x, weight, eps)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        num_tokens = x.shape[:-1].numel()
        return project_into(self.buffer[:num_tokens], x, weight)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dist.all_reduce(x, group=self.group)
        tokenweave_ops.add_rms_norm_(x, residual, weight, eps)
        return x, residual


class FusedReduction:
    """One step. The residual is sharded: each rank keeps only the rows it owns up to date, nobody reads the others."""

    def __init__(self, workspace: tokenweave_ops.Workspace):
        self.workspace = workspace

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return tokenweave_ops.rms_norm(x, weight, eps)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        num_tokens = x.shape[:-1].numel()
        return project_into(self.workspace.empty(num_tokens), x, weight)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, self.workspace, eps)
        return x, residual
