"""The meaning of family template_op."""

from __future__ import annotations

from torch import Tensor


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """``x[..., :] * scale[row]``, in x's dtype."""
    return x * scale.to(x.dtype).reshape(*x.shape[:-1], 1)
