"""Benchmarks of family allreduce_rmsnorm: rms_norm, add_rms_norm_, what a call of the latter costs, and the cases of
bench/allreduce_cases.py: sums over ranks.

To add a case: append `_norm_case(...)` or `_add_norm_case(...)` in `cases`; another op of the family: write one
function that returns a Case like theirs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import tokenweave_ops
from bench import allreduce_cases
from bench.harness import RETURNED, Case, Contestant, fill_values
from bench.machines import Buffer, Limit
from bench.norm_formulations import EPS, FAMILY, contestant, eager_norm, fill_weight, tolerance
from tokenweave_ops.reference import allreduce_rmsnorm as reference

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 32768)
CPU_MOST_TOKENS = 4096


def cases(device: str, quick: bool) -> list[Case]:
    tokens = [t for t in TOKENS if device == "cuda" or t <= CPU_MOST_TOKENS]
    shapes = [(t, hidden) for hidden in (4096, 8192) for t in tokens]
    if quick:
        shapes = [(t, 4096) for t in ((1, 64, 4096) if device == "cpu" else (1, 64, 1024, 16384))]
    found = [make(*shape, torch.bfloat16, device) for make in (_add_norm_case, _norm_case) for shape in shapes]
    if not quick:
        found += [_add_norm_case(1024, 8192, dtype, device) for dtype in (torch.float16, torch.float32)]
    found += allreduce_cases.virtual_cases(device, quick)
    if device == "cpu":
        found.append(_call_case())
    return found


rank_cases = allreduce_cases.rank_cases


# --- formulations -----------------------------------------------------------------------------------------------------


def _ours_add_norm(x, residual, weight):
    tokenweave_ops.add_rms_norm_(x, residual, weight, EPS)


def _ours_norm(x, weight, out):
    tokenweave_ops.rms_norm(x, weight, EPS, out=out)


def _eager_add_norm(x, residual, weight, wide, squares, scale):
    residual.add_(x)
    eager_norm(residual, weight, x, wide, squares, scale)


def _functional_norm(x, weight, out):
    wide = x.float()
    out.copy_((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight)


def _functional_add_norm(x, residual, weight, y, h):
    total = x + residual
    h.copy_(total)
    wide = total.float()
    y.copy_((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight)


def _library_add_norm(x, residual, weight):
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, EPS)


def _library_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


# --- peers: named kernels of other projects, used when importable -----------------------------------------------------


def _peers(device: str, find: dict) -> tuple[list[Contestant], dict[str, str]]:
    contestants, skipped = [], {}
    if device == "cuda":
        for name, (formulation, load, arguments, outputs) in find.items():
            try:
                contestants.append(contestant(name, formulation, load(), arguments, outputs))
            except Exception as error:  # a peer built for another torch fails in its own ways
                skipped[name] = f"not importable: {type(error).__name__}"
    return contestants, skipped


def _vllm_add_norm():
    from vllm import _custom_ops

    return lambda x, residual, weight: _custom_ops.fused_add_rms_norm(x, residual, weight, EPS)


def _vllm_norm():
    from vllm import _custom_ops

    return lambda x, weight, out: _custom_ops.rms_norm(out, x, weight, EPS)


def _flashinfer_add_norm():
    from flashinfer.norm import fused_add_rmsnorm

    return lambda x, residual, weight: fused_add_rmsnorm(x, residual, weight, EPS)


def _flashinfer_norm():
    from flashinfer.norm import rmsnorm

    return lambda x, weight, out: rmsnorm(x, weight, EPS, out=out)


# --- cases ------------------------------------------------------------------------------------------------------------


def _scratch(tokens: int, hidden: int) -> dict[str, Buffer]:
    return {
        "wide": Buffer((tokens, hidden), torch.float32, rotates=False),
        "squares": Buffer((tokens, hidden), torch.float32, rotates=False),
        "scale": Buffer((tokens, 1), torch.float32, rotates=False),
    }


def _add_norm_case(tokens: int, hidden: int, dtype: torch.dtype, device: str) -> Case:
    rows = (tokens, hidden)
    in_place, out_of_place = {"y": "x", "h": "residual"}, {"y": "y", "h": "h"}
    arguments = ("x", "residual", "weight")
    peers, skipped = _peers(device, {
        "vllm": ("vllm _custom_ops.fused_add_rms_norm, in place", _vllm_add_norm, arguments, in_place),
        "flashinfer": ("flashinfer.norm.fused_add_rmsnorm, in place", _flashinfer_add_norm, arguments, in_place),
    })  # fmt: skip
    return Case(
        family=FAMILY, op="add_rms_norm_", case=f"{tokens}x{hidden}", dtype=dtype,
        buffers={
            "x": Buffer(rows, dtype, fill_values), "residual": Buffer(rows, dtype, fill_values),
            "y": Buffer(rows, dtype), "h": Buffer(rows, dtype),
            "weight": Buffer((hidden,), dtype, fill_weight, rotates=False), **_scratch(tokens, hidden),
        },
        contestants=[
            contestant("tokenweave", "tokenweave_ops.add_rms_norm_(x, residual, weight)",
                       _ours_add_norm, arguments, in_place),
            contestant("eager", "residual.add_(x), then fp32 norm by torch ops, intermediates preallocated, in place",
                       _eager_add_norm, (*arguments, "wide", "squares", "scale"), in_place),
            contestant("compile", "torch.compile(max-autotune), functional form, preallocated y and h",
                       _functional_add_norm, (*arguments, "y", "h"), out_of_place, compiled=True),
            contestant("torch_rms_norm", "residual.add_(x), then nn.functional.rms_norm(residual), which has no out=",
                       _library_add_norm, arguments, {"y": RETURNED, "h": "residual"}),
            *peers,
        ],
        reference=_add_norm_reference,
        tolerance=tolerance(dtype),
        bytes=(4 * tokens + 1) * hidden * dtype.itemsize,  # x, residual read and written; weight read
        flops=6 * tokens * hidden, limit=Limit("rmw", ("x", "residual")), skipped=skipped,
    )  # fmt: skip


def _add_norm_reference(inputs):
    y, h = reference.add_rms_norm(inputs["x"], inputs["residual"], inputs["weight"], EPS)
    return {"y": y, "h": h}


def _norm_case(tokens: int, hidden: int, dtype: torch.dtype, device: str) -> Case:
    rows, arguments, outputs = (tokens, hidden), ("x", "weight", "out"), {"y": "out"}
    peers, skipped = _peers(device, {
        "vllm": ("vllm _custom_ops.rms_norm into preallocated out", _vllm_norm, arguments, outputs),
        "flashinfer": ("flashinfer.norm.rmsnorm(out=)", _flashinfer_norm, arguments, outputs),
    })  # fmt: skip
    return Case(
        family=FAMILY, op="rms_norm", case=f"{tokens}x{hidden}", dtype=dtype,
        buffers={
            "x": Buffer(rows, dtype, fill_values), "out": Buffer(rows, dtype),
            "weight": Buffer((hidden,), dtype, fill_weight, rotates=False), **_scratch(tokens, hidden),
        },
        contestants=[
            contestant("tokenweave", "tokenweave_ops.rms_norm(x, weight, out=out)", _ours_norm, arguments, outputs),
            contestant("eager", "fp32 norm by torch ops, intermediates and output preallocated",
                       eager_norm, (*arguments, "wide", "squares", "scale"), outputs),
            contestant("compile", "torch.compile(max-autotune), preallocated output",
                       _functional_norm, arguments, outputs, compiled=True),
            contestant("torch_rms_norm", "torch.nn.functional.rms_norm(x), which has no out=",
                       _library_norm, ("x", "weight"), {"y": RETURNED}),
            *peers,
        ],
        reference=lambda t: {"y": reference.rms_norm(t["x"], t["weight"], EPS)},
        tolerance=tolerance(dtype),
        bytes=(2 * tokens + 1) * hidden * dtype.itemsize,  # x and weight read, out written
        flops=5 * tokens * hidden, limit=Limit("copy", ("x", "out")), skipped=skipped,
    )  # fmt: skip


def _call_case() -> Case:
    """What a call costs beyond its work: the op on one row of eight, a no-op of its schema, the Python function."""
    case = _add_norm_case(1, 8, torch.bfloat16, "cpu")
    arguments, outputs = ("x", "residual", "weight"), {"y": "x", "h": "residual"}

    def direct(op, *scalars):
        def bind(buffers):
            return partial(op, *(buffers[argument] for argument in arguments), *scalars)

        return bind

    op = torch.ops.tokenweave.add_rms_norm_.default
    case.op = "add_rms_norm_ (call)"
    case.contestants = [
        Contestant("tokenweave", "torch.ops.tokenweave.add_rms_norm_.default(...)", direct(op, EPS, 0.0), outputs),
        Contestant("wrapper", "tokenweave_ops.add_rms_norm_(...)", direct(tokenweave_ops.add_rms_norm_, EPS), outputs),
    ]
    formulation = "torch.ops.tokenweave.noop.default, the schema of add_rms_norm_, does nothing"
    noop = torch.ops.tokenweave.noop.default
    case.contestants.append(Contestant("noop", formulation, direct(noop, EPS, 0.0), yardstick=True))
    return case
