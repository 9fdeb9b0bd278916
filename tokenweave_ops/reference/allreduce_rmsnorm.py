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
