"""Determinism, strides, emptiness, the launch plan."""

from __future__ import annotations

import pytest
import torch

from tokenweave_ops import template_op as family


def test_same_bits_every_run(backend):
    x, scale = backend.tensor(9, 77, dtype=torch.bfloat16), backend.tensor(9, dtype=torch.float32, seed=1)
    with backend.use(family):
        results = [family.scale_rows(x, scale) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_rows(backend):
    wide, scale = backend.tensor(4, 3, 48, dtype=torch.float32), backend.tensor(8, dtype=torch.float32, seed=1)
    view = wide[:, :2, 5:38]
    with backend.use(family):
        y = family.scale_rows(view, scale)
        assert y.is_contiguous() and torch.equal(y, family.scale_rows(view.contiguous(), scale))


@pytest.mark.no_launch
def test_no_rows(backend):
    with backend.use(family):
        y = family.scale_rows(backend.tensor(0, 8, dtype=torch.float16), backend.tensor(0, dtype=torch.float32))
    assert y.shape == (0, 8)


def test_plan_beyond_32_bits(host):
    plan = host.plan_scale_rows
    assert plan(2**40, 4096).grid == 2**31 - 1
    assert plan(3, 40).block_x == 64 and plan(3, 4096).block_x == 256 and plan(3, 40).grid == 3


def test_graph_capture(cuda):
    x, scale = cuda.tensor(9, 77, dtype=torch.bfloat16), cuda.tensor(9, dtype=torch.float32, seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = family.scale_rows(x, scale)
    graph.replay()
    assert torch.equal(y, family.scale_rows(x, scale))
