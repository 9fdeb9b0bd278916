"""Laws that hold exactly, over generated inputs. A file of its own: a GPU server may have pytest and no hypothesis."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenweave_ops import testing

family = testing.family("allreduce_rmsnorm")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("hidden", [24, 45])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-8, 8), dtype=st.sampled_from(DTYPES))
def test_laws(backend, hidden, seed, exponent, dtype):
    """Exact laws: x * 2^k gives the same y (eps = 0), negating x negates y, and y scales with weight."""
    x = backend.tensor(3, hidden, dtype=dtype, seed=seed)
    weight = backend.tensor(hidden, dtype=dtype, seed=seed + 1)
    with backend.use(family):
        y = family.rms_norm(x, weight, 0.0)
        scaled = x * 2.0**exponent
        if torch.equal(scaled * 2.0**-exponent, x):  # no bit fell off the end of fp16
            assert torch.equal(family.rms_norm(scaled, weight, 0.0), y)
        assert torch.equal(family.rms_norm(-x, weight, 0.0), -y)
        normal = y.abs() >= torch.finfo(dtype).tiny  # subnormals have a fixed spacing, which does not scale
        assert torch.equal(family.rms_norm(x, weight * 2.0, 0.0)[normal], (y * 2.0)[normal])
