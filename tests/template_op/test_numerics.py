"""Results against float64."""

from __future__ import annotations

import pytest
import torch

from tokenweave_ops import template_op as family
from tokenweave_ops import testing
from tokenweave_ops.reference import template_op as reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (2, 3, 64), (5, 300)], ids=str)
def test_scale_rows_matches_float64(backend, shape, dtype):
    x = backend.tensor(*shape, dtype=dtype)
    scale = backend.tensor(torch.Size(shape[:-1]).numel(), dtype=torch.float32, seed=1)
    with backend.use(family):
        y = family.scale_rows(x, scale)
    exact = reference.scale_rows(x.cpu().double(), scale.cpu())
    testing.assert_close(y, exact, exact.to(dtype))


def test_nan_and_infinity(backend):
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0]], device=backend.device)
    with backend.use(family):
        y = family.scale_rows(x, torch.tensor([2.0, -1.0], device=backend.device))
    assert y[0, 0].isnan() and y[0, 1] == 2.0 and y[1, 0] == -float("inf") and y[1, 1] == 0.0
