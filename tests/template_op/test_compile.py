"""torch's own view of the op."""

from __future__ import annotations

import torch

from tokenweave_ops import template_op as family


def test_opcheck(backend):
    x, scale = backend.tensor(5, 16, dtype=torch.float32), backend.tensor(5, dtype=torch.float32, seed=1)
    torch.library.opcheck(backend.ops.scale_rows.default, (x, scale))


def test_compile_fullgraph_equals_eager(backend):
    x, scale = backend.tensor(5, 16, dtype=torch.float32), backend.tensor(5, dtype=torch.float32, seed=1)
    torch._dynamo.reset()
    with backend.use(family):
        expected = family.scale_rows(x * 2, scale).relu()
        compiled = torch.compile(
            lambda x, scale: family.scale_rows(x * 2, scale).relu(), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x, scale), expected)
