"""Benchmarks of family allreduce_rmsnorm: rms_norm and add_rms_norm_, and what a call of the latter costs.

To add a case: append `_norm_case(...)` or `_add_norm_case(...)` in `cases`; another op of the family: write one
function that returns a Case like theirs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import tokenweave_ops
from bench.harness import RETURNED, Case, Contestant, fill_values
from bench.machines import Buffer, Limit
from tokenweave_ops.reference import allreduce_rmsnorm as reference

FAMILY = "allreduce_rmsnorm"
EPS = 1e-6
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
    if device == "cpu":
        found.append(_call_case())
    return found


# Values under repetition: after one add_rms_norm_ the new x has the signs of the residual, so sums never cancel, and
# the residual stops growing when an update is below half its last place (at about 2^9 in bf16, 2^12 in fp16).
def _fill_weight(weight: torch.Tensor, generator: torch.Generator) -> None:
    weight.copy_(torch.rand(weight.shape, generator=generator, device=weight.device) * 0.2 + 0.9)


def _tolerance(dtype: torch.dtype) -> float:
    """Baselines round up to three times where the reference does not; a wrong kernel is off by far more."""
    return 4 * torch.finfo(dtype).eps


# --- formulations -----------------------------------------------------------------------------------------------------


def _ours_add_norm(x, residual, weight):
    tokenweave_ops.add_rms_norm_(x, residual, weight, EPS)


def _ours_norm(x, weight, out):
    tokenweave_ops.rms_norm(x, weight, EPS, out=out)


def _eager_norm(h, weight, out, wide, squares, scale):
    """As model code writes it (fp32 inside, rounded, then weighted), every intermediate preallocated."""
    wide.copy_(h)
    torch.mul(wide, wide, out=squares)
    torch.mean(squares, -1, keepdim=True, out=scale)
    scale.add_(EPS).rsqrt_()
    wide.mul_(scale)
    out.copy_(wide)
    out.mul_(weight)


def _eager_add_norm(x, residual, weight, wide, squares, scale):
    residual.add_(x)
    _eager_norm(residual, weight, x, wide, squares, scale)


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


def _compiled(function):
    """Compiled afresh for each case: static shapes, and no recompile limit shared between cases."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs")


def _contestant(name, formulation, function, arguments, outputs, compiled=False):
    ready = None

    def bind(buffers):
        nonlocal ready
        ready = ready or (_compiled(function) if compiled else function)
        return partial(ready, *(buffers[argument] for argument in arguments))

    return Contestant(name, formulation, bind, outputs)


# --- peers: named kernels of other projects, used when importable -----------------------------------------------------


def _peers(device: str, find: dict) -> tuple[list[Contestant], dict[str, str]]:
    contestants, skipped = [], {}
    if device == "cuda":
        for name, (formulation, load, arguments, outputs) in find.items():
            try:
                contestants.append(_contestant(name, formulation, load(), arguments, outputs))
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
            "weight": Buffer((hidden,), dtype, _fill_weight, rotates=False), **_scratch(tokens, hidden),
        },
        contestants=[
            _contestant("tokenweave", "tokenweave_ops.add_rms_norm_(x, residual, weight)",
                        _ours_add_norm, arguments, in_place),
            _contestant("eager", "residual.add_(x), then fp32 norm by torch ops, intermediates preallocated, in place",
                        _eager_add_norm, (*arguments, "wide", "squares", "scale"), in_place),
            _contestant("compile", "torch.compile(max-autotune), functional form, preallocated y and h",
                        _functional_add_norm, (*arguments, "y", "h"), out_of_place, compiled=True),
            _contestant("torch_rms_norm", "residual.add_(x), then nn.functional.rms_norm(residual), which has no out=",
                        _library_add_norm, arguments, {"y": RETURNED, "h": "residual"}),
            *peers,
        ],
        reference=_add_norm_reference,
        tolerance=_tolerance(dtype),
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
            "weight": Buffer((hidden,), dtype, _fill_weight, rotates=False), **_scratch(tokens, hidden),
        },
        contestants=[
            _contestant("tokenweave", "tokenweave_ops.rms_norm(x, weight, out=out)", _ours_norm, arguments, outputs),
            _contestant("eager", "fp32 norm by torch ops, intermediates and output preallocated",
                        _eager_norm, (*arguments, "wide", "squares", "scale"), outputs),
            _contestant("compile", "torch.compile(max-autotune), preallocated output",
                        _functional_norm, arguments, outputs, compiled=True),
            _contestant("torch_rms_norm", "torch.nn.functional.rms_norm(x), which has no out=",
                        _library_norm, ("x", "weight"), {"y": RETURNED}),
            *peers,
        ],
        reference=lambda t: {"y": reference.rms_norm(t["x"], t["weight"], EPS)},
        tolerance=_tolerance(dtype),
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
