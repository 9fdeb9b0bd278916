"""Bad input: one sentence each, the same on every backend."""

from __future__ import annotations

import re

import pytest
import torch

from tokenweave_ops import template_op as family

pytestmark = pytest.mark.no_launch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s: (x.int(), s), "scale_rows: x must be bf16, fp16 or fp32, got int32 (dtype int32"),
        (lambda x, s: (x, s[:3]), "scale_rows: scale must have shape [num_rows]=[4], got [3] (dtype fp32"),
        (lambda x, s: (x, s.half()), "scale_rows: scale must be fp32, got fp16 (dtype fp16"),
        (
            lambda x, s: (x.t(), s),
            "scale_rows: x must have a contiguous last dimension, got strides [1, 16] (dtype bf16",
        ),
        (lambda x, s: (x, s.requires_grad_()), "scale_rows: an input requires grad"),
    ],
)
def test_bad_input(backend, change, message):
    x, scale = backend.tensor(4, 16, dtype=torch.bfloat16), backend.tensor(4, dtype=torch.float32, seed=1)
    with backend.use(family), pytest.raises(RuntimeError, match=re.escape(message)):
        family.scale_rows(*change(x, scale))
