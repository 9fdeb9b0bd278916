"""Benchmark of family template_op: the bench file to copy when adding an op."""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import RETURNED, Case, Contestant, fill_values
from bench.machines import Buffer, Limit
from tokenweave_ops import template_op
from tokenweave_ops.reference import template_op as reference

FAMILY = "template_op"


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return []  # the template is no op anyone uses: it stays out of the demo's table
    return [_scale_rows_case(tokens, 4096, torch.bfloat16) for tokens in (64, 4096)]


def _scale_rows_case(tokens: int, hidden: int, dtype: torch.dtype) -> Case:
    return Case(
        family=FAMILY, op="scale_rows", case=f"{tokens}x{hidden}", dtype=dtype,
        buffers={
            "x": Buffer((tokens, hidden), dtype, fill_values),
            "scale": Buffer((tokens,), torch.float32, fill_values),
            "y": Buffer((tokens, hidden), dtype),
        },
        contestants=[
            Contestant("tokenweave", "template_op.scale_rows(x, scale), new output", _ours, {"y": RETURNED}),
            Contestant("eager", "torch.mul(x, scale column in x's dtype, out=y)", _eager, {"y": "y"}),
        ],
        reference=lambda t: {"y": reference.scale_rows(t["x"], t["scale"])},
        tolerance=4 * torch.finfo(dtype).eps,  # eager rounds scale to bf16 first
        bytes=2 * tokens * hidden * dtype.itemsize + 4 * tokens,
        flops=tokens * hidden, limit=Limit("copy", ("x", "y")),
    )  # fmt: skip


def _ours(buffers):
    return partial(template_op.scale_rows, buffers["x"], buffers["scale"])


def _eager(buffers):
    column = buffers["scale"].to(buffers["x"].dtype)[:, None]
    return partial(torch.mul, buffers["x"], column, out=buffers["y"])
