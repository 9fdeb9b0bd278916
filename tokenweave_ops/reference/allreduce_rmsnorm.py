"""The meaning of family allreduce_rmsnorm. Written for reading and for float64, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * (weight + weight_bias)`` over the last dimension, in x's dtype throughout."""
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * (weight + weight_bias)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(h), h)`` with ``h = x + residual``; h is what add_rms_norm_ leaves in residual."""
    h = x + residual
    return rms_norm(h, weight, eps, weight_bias=weight_bias), h


def allreduce(partial_sums: Tensor) -> Tensor:
    """The sum over ranks of ``partial_sums[world_size, num_tokens, hidden]``, added rank by rank from rank 0 on."""
    total = partial_sums[0]
    for part in partial_sums[1:]:
        total = total + part
    return total


def allreduce_rms_norm(
    partial_sums: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(h), h)`` with ``h = sum + residual``: what allreduce_rmsnorm_ leaves in x and in its owners' h."""
    return add_rms_norm(allreduce(partial_sums), residual, weight, eps, weight_bias=weight_bias)


def owned_rows(num_tokens: int, world_size: int, rank: int) -> slice:
    """The rows a rank owns: contiguous, the first ``num_tokens % world_size`` ranks own one more than the others."""
    each, extra = divmod(num_tokens, world_size)
    begin = rank * each + min(rank, extra)
    return slice(begin, begin + each + (rank < extra))
