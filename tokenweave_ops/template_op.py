"""Family template_op: one trivial, complete op to copy when adding an op (CONTRIBUTING.md, "How to add an op").

Numeric contract, met by every backend: ``y = round(fp32(x) * scale)``, one rounding to x's dtype (nearest even); NaN
and infinities as the product gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled

from tokenweave_ops._library import define_op

define_op(
    "scale_rows(Tensor x, Tensor scale) -> Tensor",
    fake=lambda x, scale: x.new_empty(x.shape),
)

_scale_rows = torch.ops.tokenweave.scale_rows.default


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Multiplies each row by its own factor: ``y[..., :] = x[..., :] * scale[row]``. No gradient.

    Args:
        x: ``[..., hidden]``, bf16, fp16 or fp32; contiguous last dimension, leading ones foldable into two strides.
        scale: ``[number of rows]``, fp32, contiguous, device of x.

    Returns:
        A new contiguous tensor like x.

    Raises:
        RuntimeError: an argument does not fit, an input requires grad while grad mode is on, or no kernels were built
            for the device.
    """
    if is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        raise RuntimeError("scale_rows: an input requires grad, but this op has no gradient; use torch's x * scale")
    return _scale_rows(x, scale)
