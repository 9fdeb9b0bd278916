"""The cases of the ops that sum over ranks: between processes (`rank_cases`), and virtual ranks on one device.

Bytes that must move, over all W ranks together, for N bytes of x per rank: a rank's x is read once by the owners of its
rows and written once with their results, and an owner reads and writes its rows of the residual: 2 W N + 2 N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tokenweave_ops
from bench.harness import RETURNED, Case, Contestant, fill_values
from bench.machines import Buffer, Limit
from bench.norm_formulations import EPS, FAMILY, contestant, eager_norm, fill_weight, tolerance
from bench.ranks import RankCase
from tokenweave_ops import Workspace
from tokenweave_ops.reference import allreduce_rmsnorm as reference

PROCESSES = 2
PROCESS_SHAPES = (
    (16, 4096, torch.bfloat16), (128, 4096, torch.bfloat16), (1024, 4096, torch.bfloat16), (4096, 8192, torch.bfloat16),
    (1024, 4096, torch.float16), (1024, 4096, torch.float32),
)  # fmt: skip
GPU_TOKENS = (64, 1024, 8192)
VIRTUAL_WORLD_SIZES = (2, 4, 8)
MAX_CTAS = (2, 4, 8, 16)  # per rank, beside all that fit
TIMEOUT_S = 20.0
ARGUMENTS = ("x", "residual", "weight")


def fused_bytes(world_size: int, tokens: int, hidden: int, dtype: torch.dtype) -> int:
    return 2 * (world_size + 1) * tokens * hidden * dtype.itemsize


class WorkspaceRows:
    """A case's x: rows of a workspace that is made for as many buffer sets as the harness asks for."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, make: Callable[[int], Workspace]):
        self.tokens, self.set_bytes, self.make = tokens, tokens * hidden * dtype.itemsize, make
        self.workspace: Workspace | None = None

    def place(self, sets: int) -> list[torch.Tensor]:
        self.workspace = self.make(sets * self.tokens)
        return [self.workspace.empty(self.tokens, offset_bytes=index * self.set_bytes) for index in range(sets)]

    def close(self) -> None:
        if self.workspace is not None:
            self.workspace.close()
            self.workspace = None


# --- between processes ------------------------------------------------------------------------------------------------


def rank_cases(device: str, quick: bool) -> list[RankCase]:
    if device == "cuda":
        gpus = torch.cuda.device_count()
        tokens = GPU_TOKENS[-1:] if quick else GPU_TOKENS
        return [
            _rank_case("allreduce_rmsnorm_", _fused_on_gpus, gpus, t, 8192, torch.bfloat16) for t in tokens if gpus > 1
        ]
    shapes = [(1024, 4096, torch.bfloat16)] if quick else PROCESS_SHAPES
    found = [_rank_case("allreduce_rmsnorm_", _fused_on_cpu, PROCESSES, *shape) for shape in shapes]
    if not quick:
        for op, make in {"allreduce_": _sum_on_cpu, "gather_residual_": _gather_on_cpu}.items():
            found += [_rank_case(op, make, PROCESSES, 1024, 4096, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return found


def why_no_gpus(device: str) -> dict[str, str]:
    """The baselines that need several GPUs, and why there is no row of them."""
    gpus = torch.cuda.device_count()
    if device != "cuda" or gpus > 1:
        return {}
    return dict.fromkeys(("nccl", "symm_mem"), f"several GPUs are needed, torch sees {gpus}")


def _rank_case(op: str, make, world_size: int, tokens: int, hidden: int, dtype: torch.dtype) -> RankCase:
    tokens -= tokens % world_size
    case = f"{tokens}x{hidden} x{world_size}"
    fields = {"family": FAMILY, "op": op, "case": case, "dtype": dtype, "tolerance": tolerance(dtype)}
    return RankCase(op, case, dtype, world_size, partial(make, fields, tokens, hidden))


def _make_workspace(machine, hidden: int, dtype: torch.dtype, staging: bool) -> Callable[[int], Workspace]:
    options = {"device": machine.kind, "staging": staging, "num_channels": 1, "timeout_s": TIMEOUT_S}
    return lambda tokens: Workspace(machine.group, tokens, hidden, dtype, **options)


def _owners(tokens: int, world_size: int, dtype: torch.dtype) -> Buffer:
    """Who owns a row: an input of the reference, so that it is sampled like the rows."""

    def fill(tensor, _generator):
        for rank in range(world_size):
            tensor[reference.owned_rows(tokens, world_size, rank)] = rank

    return Buffer((tokens, 1), dtype, fill)


def _fused_case(fields, tokens, hidden, machine, rows: WorkspaceRows, buffers, contestants, close) -> Case:
    shape, dtype, world_size = (tokens, hidden), fields["dtype"], machine.world_size
    own, moved = reference.owned_rows(tokens, world_size, machine.rank), fused_bytes(world_size, tokens, hidden, dtype)

    def expected(inputs):
        y, h = reference.allreduce_rms_norm(machine.gather(inputs["x"]), inputs["residual"], inputs["weight"], EPS)
        # An owner's rows become h, the others stay what they were.
        return {"y": y, "h": h, "sharded h": torch.where(inputs["owner"] == machine.rank, h, inputs["residual"])}

    return Case(
        **fields,
        buffers={
            "x": Buffer(shape, dtype, machine.fill_apart, place=rows.place),
            "residual": Buffer(shape, dtype, fill_values), "owner": _owners(tokens, world_size, dtype),
            "weight": Buffer((hidden,), dtype, fill_weight, rotates=False), **buffers,
        },
        contestants=contestants, reference=expected, bytes=moved, flops=(world_size + 5) * tokens * hidden,
        limit=Limit("rmw" if machine.kind == "cpu" else "none", ("x", "residual"),
                    parts=lambda b: [b["x"], b["residual"][own]], part_bytes=moved // 2 // world_size),
        close=close,
    )  # fmt: skip


def _fused_on_cpu(fields, tokens, hidden, machine) -> Case:
    dtype, group = fields["dtype"], machine.group
    rows = WorkspaceRows(tokens, hidden, dtype, _make_workspace(machine, hidden, dtype, staging=False))
    staged_workspace = _make_workspace(machine, hidden, dtype, staging=True)(tokens)

    def ours(x, residual, weight):
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, rows.workspace, EPS)

    def staged(x, residual, weight):
        return tokenweave_ops.allreduce_rmsnorm(x, residual, weight, staged_workspace, EPS)

    def gloo(x, residual, weight):
        dist.all_reduce(x, group=group)
        residual = x + residual
        return F.rms_norm(residual, weight.shape, weight, EPS)

    def gloo_strong(x, residual, weight):
        dist.all_reduce(x, group=group)
        tokenweave_ops.add_rms_norm_(x, residual, weight, EPS)

    def close():
        rows.close()
        staged_workspace.close()

    contestants = [
        contestant("tokenweave", "tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, workspace), x inside it",
                   ours, ARGUMENTS, {"y": "x", "sharded h": "residual"}),
        contestant("staged", "tokenweave_ops.allreduce_rmsnorm(x, residual, weight, workspace), a new tensor",
                   staged, ARGUMENTS, {"y": RETURNED, "sharded h": "residual"}),
        _undoing_the_sum(contestant(
            "gloo", "as people write it: dist.all_reduce(x), x + residual, nn.functional.rms_norm, both new tensors",
            gloo, ARGUMENTS, {"y": RETURNED}), machine.world_size),
        contestant("gloo_strong", "dist.all_reduce(x), then tokenweave_ops.add_rms_norm_(x, residual), in place",
                   gloo_strong, ARGUMENTS, {"y": "x", "h": "residual"}),
    ]  # fmt: skip
    return _fused_case(fields, tokens, hidden, machine, rows, {}, contestants, close)


def _undoing_the_sum(adding: Contestant, world_size: int) -> Contestant:
    """After a sum all ranks hold the same x: the next sum would be world_size times as large, and so on."""
    return replace(adding, undo=lambda buffers: partial(buffers["x"].mul_, 1 / world_size))


def _sum_on_cpu(fields, tokens, hidden, machine) -> Case:
    dtype, world_size, shape = fields["dtype"], machine.world_size, (tokens, hidden)
    rows = WorkspaceRows(tokens, hidden, dtype, _make_workspace(machine, hidden, dtype, staging=False))
    staged_workspace = _make_workspace(machine, hidden, dtype, staging=True)(tokens)

    def ours(x):
        tokenweave_ops.allreduce_(x, rows.workspace)

    def staged(x):
        return tokenweave_ops.allreduce(x, staged_workspace)

    def gloo(x):
        dist.all_reduce(x, group=machine.group)

    def close():
        rows.close()
        staged_workspace.close()

    contestants = [
        contestant("tokenweave", "tokenweave_ops.allreduce_(x, workspace), x inside it", ours, ["x"], {"s": "x"}),
        contestant("staged", "tokenweave_ops.allreduce(x, workspace), a new tensor", staged, ["x"],
                   {"s": RETURNED}),
        contestant("gloo", "dist.all_reduce(x), in place", gloo, ["x"], {"s": "x"}),
    ]  # fmt: skip
    return Case(
        **fields, buffers={"x": Buffer(shape, dtype, machine.fill_apart, place=rows.place)},
        contestants=[c if c.name == "staged" else _undoing_the_sum(c, world_size) for c in contestants],
        reference=lambda inputs: {"s": reference.allreduce(machine.gather(inputs["x"]))},
        bytes=2 * world_size * tokens * hidden * dtype.itemsize,  # every rank's x read and written
        flops=world_size * tokens * hidden, limit=Limit("rmw", ("x",)), close=close,
    )  # fmt: skip


def _gather_on_cpu(fields, tokens, hidden, machine) -> Case:
    dtype, world_size, shape = fields["dtype"], machine.world_size, (tokens, hidden)
    own, moved = reference.owned_rows(tokens, world_size, machine.rank), world_size * tokens * hidden * dtype.itemsize
    workspace = _make_workspace(machine, hidden, dtype, staging=True)(tokens)

    def ours(residual):
        tokenweave_ops.gather_residual_(residual, workspace)

    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its new and its old name

    def gloo(residual, out):
        all_gather(out, residual[own], group=machine.group)

    def expected(inputs):
        parts = machine.gather(inputs["residual"])
        return {"whole": sum(torch.where(inputs["owner"] == rank, part, 0) for rank, part in enumerate(parts))}

    half = tokens // 2
    return Case(
        **fields,
        buffers={
            "residual": Buffer(shape, dtype, machine.fill_apart), "out": Buffer(shape, dtype),
            "owner": _owners(tokens, world_size, dtype),
        },
        contestants=[
            contestant("tokenweave", "tokenweave_ops.gather_residual_(residual, workspace), in place",
                       ours, ["residual"], {"whole": "residual"}),
            contestant("gloo", "dist.all_gather_single(out, residual[own rows]), out preallocated",
                       gloo, ["residual", "out"], {"whole": "out"}),
        ],
        reference=expected, bytes=moved, flops=0,  # owned rows read once, the others' rows written
        limit=Limit("copy", ("residual", "out"), parts=lambda b: [b["residual"][:half], b["out"][:half]],
                    part_bytes=moved // world_size),
        close=workspace.close,
    )  # fmt: skip


def _fused_on_gpus(fields, tokens, hidden, machine) -> Case:
    from torch.distributed import _symmetric_memory as symmetric_memory

    dtype, group = fields["dtype"], machine.group
    rows = WorkspaceRows(tokens, hidden, dtype, _make_workspace(machine, hidden, dtype, staging=False))

    def place_symmetric(sets):
        tensors = [symmetric_memory.empty(tokens, hidden, dtype=dtype, device="cuda") for _ in range(sets)]
        for tensor in tensors:
            symmetric_memory.rendezvous(tensor, group)
        return tensors

    def ours(x, residual, weight):
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, rows.workspace, EPS)

    def then_norm(x, residual, weight, *, all_reduce):
        all_reduce(x)
        tokenweave_ops.add_rms_norm_(x, residual, weight, EPS)

    def symmetric(op):
        return partial(then_norm, all_reduce=lambda x: op(x, "sum", group.group_name))

    nccl = partial(then_norm, all_reduce=lambda x: dist.all_reduce(x, group=group))
    symmetric_arguments, ops = ("symmetric", "residual", "weight"), torch.ops.symm_mem
    whole, symmetric_whole = {"y": "x", "h": "residual"}, {"y": "symmetric", "h": "residual"}
    contestants = [
        contestant("tokenweave", "tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, workspace), x inside it",
                   ours, ARGUMENTS, {"y": "x", "sharded h": "residual"}),
        contestant("nccl", "NCCL dist.all_reduce(x), then tokenweave_ops.add_rms_norm_(x, residual), in place",
                   nccl, ARGUMENTS, whole),
        contestant("multimem", "symm_mem.multimem_all_reduce_(x), then tokenweave_ops.add_rms_norm_(x, residual)",
                   symmetric(ops.multimem_all_reduce_), symmetric_arguments, symmetric_whole),
        contestant("two_shot", "symm_mem.two_shot_all_reduce_(x), then tokenweave_ops.add_rms_norm_(x, residual)",
                   symmetric(ops.two_shot_all_reduce_), symmetric_arguments, symmetric_whole),
    ]  # fmt: skip
    buffers = {"symmetric": Buffer((tokens, hidden), dtype, machine.fill_apart, place=place_symmetric)}
    return _fused_case(fields, tokens, hidden, machine, rows, buffers, contestants, rows.close)


# --- virtual ranks ----------------------------------------------------------------------------------------------------


def virtual_cases(device: str, quick: bool) -> list[Case]:
    """All ranks in one device's memory: what the kernel costs without a fabric between them."""
    make = partial(_virtual_case, device=device, hidden=4096, dtype=torch.bfloat16)
    if device == "cpu":
        return [] if quick else [make(world_size=4, tokens=1024)]
    if quick:
        return [make(world_size=4, tokens=8192)]
    return [
        make(world_size=world_size, tokens=8192, max_ctas=max_ctas)
        for world_size in VIRTUAL_WORLD_SIZES
        for max_ctas in (None, *MAX_CTAS)
    ]


def _virtual_case(world_size, tokens, hidden, dtype, device, max_ctas: int | None = None) -> Case:
    """Without max_ctas: as many blocks per rank as fill the GPU, and the baselines beside it."""
    every_rank = (world_size, tokens, hidden)
    options = {"device": device, "staging": False, "num_channels": 1, "timeout_s": TIMEOUT_S}
    rows = WorkspaceRows(
        tokens, hidden, dtype, lambda tokens: Workspace.virtual(world_size, tokens, hidden, dtype, **options)
    )

    ctas = max_ctas or _ctas_that_fill(device, world_size)

    def ours(x, residual, weight):
        tokenweave_ops.allreduce_rmsnorm_(x, residual, weight, rows.workspace, EPS, max_ctas=ctas)

    contestants = [
        contestant("tokenweave", f"tokenweave_ops.allreduce_rmsnorm_(..., max_ctas={ctas}), virtual ranks",
                   ours, ARGUMENTS, {"y": "x", "sharded h": "residual"}),
        contestant("eager", "sum over ranks, add, fp32 norm by torch ops, intermediates preallocated, copied to x "
                   "of every rank", _eager_fused, (*ARGUMENTS, "h", "normed", "wide", "squares", "scale"),
                   {"y": "x", "h": "h"}),
        contestant("compile", "torch.compile(max-autotune) of the same, preallocated y of every rank and h",
                   _functional_fused, (*ARGUMENTS, "y", "h"), {"y": "y", "h": "h"}, compiled=True),
    ]  # fmt: skip
    moved = fused_bytes(world_size, tokens, hidden, dtype)
    return Case(
        family=FAMILY, op="allreduce_rmsnorm_ (virtual ranks)", dtype=dtype, tolerance=tolerance(dtype),
        case=f"{tokens}x{hidden} x{world_size}" + (f" cta{max_ctas}" if max_ctas else ""),
        buffers={
            "x": Buffer(every_rank, dtype, fill_values, place=rows.place, row_dim=1),
            "residual": Buffer(every_rank, dtype, _fill_replicated, row_dim=1),
            "owner": _owners(tokens, world_size, dtype),
            "weight": Buffer((hidden,), dtype, fill_weight, rotates=False),
            **({} if max_ctas else _baseline_buffers(every_rank, dtype)),
        },
        contestants=contestants[:1] if max_ctas else contestants,
        reference=_virtual_reference, bytes=moved, flops=(world_size + 5) * tokens * hidden,
        skipped=why_no_gpus(device), close=rows.close,
        # The first rank's residual is as large as all owned rows together.
        limit=Limit("rmw", ("x", "residual"), parts=lambda b: [*b["x"], b["residual"][0]], part_bytes=moved // 2),
    )  # fmt: skip


def _ctas_that_fill(device: str, world_size: int) -> int:
    if device != "cuda" or not torch.cuda.is_available():
        return 0  # a CPU has no blocks
    return max(1, torch.cuda.get_device_properties(0).multi_processor_count // world_size)


def _baseline_buffers(every_rank: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Buffer]:
    shape = every_rank[1:]
    return {
        "y": Buffer(every_rank, dtype, row_dim=1), "h": Buffer(shape, dtype),
        "normed": Buffer(shape, dtype, rotates=False),
        "wide": Buffer(shape, torch.float32, rotates=False), "squares": Buffer(shape, torch.float32, rotates=False),
        "scale": Buffer((shape[0], 1), torch.float32, rotates=False),
    }  # fmt: skip


def _fill_replicated(tensor: torch.Tensor, generator: torch.Generator) -> None:
    fill_values(tensor[0], generator)
    tensor[1:] = tensor[0]


def _virtual_reference(inputs):
    residual = inputs["residual"]
    y, h = reference.allreduce_rms_norm(inputs["x"], residual[0], inputs["weight"], EPS)
    sharded = [torch.where(inputs["owner"] == rank, h, residual[rank]) for rank in range(len(residual))]
    return {"y": y.expand_as(inputs["x"]), "h": h, "sharded h": torch.stack(sharded)}


def _eager_fused(x, residual, weight, h, normed, wide, squares, scale):
    torch.sum(x, 0, out=h)
    h.add_(residual[0])
    eager_norm(h, weight, normed, wide, squares, scale)
    x.copy_(normed)


def _functional_fused(x, residual, weight, y, h):
    total = x.float().sum(0).to(x.dtype) + residual[0]
    h.copy_(total)
    wide = total.float()
    y.copy_((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight)
