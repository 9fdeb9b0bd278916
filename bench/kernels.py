#!/usr/bin/env python3
"""Kernels before a GPU has run them: registers, shared memory, occupancy and instructions as compiled, and estimates.

    python bench/kernels.py build/cmake-...            # prints the tables
    python bench/kernels.py build/cmake-... --write    # into docs/performance.md

Which instance of a template a call takes, with how many threads and how much shared memory, is what its launcher asks
the emulator for: no such number is typed here. So it needs a test build with CUDA kernels, and cuobjdump and nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import tokenweave_ops as tw  # noqa: E402
from bench import allreduce_rmsnorm, anchor_decoding, machine_code, sinr_field  # noqa: E402
from bench.selector_formulations import MASK_ID  # noqa: E402
from bench.sinr_formulations import single_slope_geometry_table, single_slope_power_table  # noqa: E402
from tokenweave_ops import testing  # noqa: E402
from tokenweave_ops.testing_ranks import LocalRanks  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- kernels -->\n).*?(<!-- end of kernels -->)", re.S)
BF16, FP32 = torch.bfloat16, torch.float32

# Not measured by this project: estimates rest on them and are labelled as such.
COPY_BYTES_PER_S = 3.0e12  # a device copy on another H100, bytes read and written
LINK_BYTES_PER_S = 273e9  # all-reduce through the switch of 8 GPUs, bytes of x; published with TokenWeave's artifact
LANE_OPERATIONS_PER_S = 132 * 128 * 1.755e9  # multiprocessors, fp32 lanes, a clock that is assumed


# --------------------------------------------------------------------------------------------------- what is launched


@dataclass(frozen=True)
class Call:
    """A call small enough for the emulator, with rows of a real length: launches differ in their grid alone."""

    name: str
    family: str
    run: Callable[[], object]


def calls() -> list[Call]:
    def norm(hidden: int, dtype: torch.dtype) -> None:
        tw.rms_norm(torch.ones(4, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype))

    def add_norm(hidden: int, dtype: torch.dtype) -> None:
        tw.add_rms_norm_(*(torch.ones(4, hidden, dtype=dtype) for _ in range(2)), torch.ones(hidden, dtype=dtype))

    def backward(hidden: int, dtype: torch.dtype) -> None:
        rows = torch.ones(4, hidden, dtype=dtype)
        ops = torch.ops.tokenweave_simt
        ops.rms_norm_backward(rows, rows, rows, torch.ones(hidden, dtype=dtype), torch.ones(4), 0.0)

    def collective(transport: str, hidden: int, dtype: torch.dtype) -> None:
        with LocalRanks(2, 4, hidden, dtype, transport=transport) as ranks:
            x = [workspace.empty(2) for workspace in ranks.workspaces]
            for one in x:
                one.fill_(1.0)
            residual, weight = [torch.ones(2, hidden, dtype=dtype) for _ in x], torch.ones(hidden, dtype=dtype)
            ranks.run(
                lambda rank, workspace: tw.allreduce_rmsnorm_(x[rank], residual[rank], weight, workspace, max_ctas=1)
            )

    def step(dtype: torch.dtype, is_cut: bool) -> None:
        requests = tw.DecodeRequests.make(1, 4, policy="local_leap", threshold=0.9, relaxed_threshold=0.75, radius=4)
        logits, tokens = torch.zeros(1, 4, MASK_ID + 2048, dtype=dtype), torch.full((1, 4), MASK_ID)
        if is_cut:
            scan = tw.confidence_scan(logits, tokens, requests, mask_id=MASK_ID)
            tw.select_and_commit_(scan, tokens, requests, mask_id=MASK_ID)
        else:
            tw.decode_step_(logits, tokens, requests, mask_id=MASK_ID)

    grid, two = tw.SinrGrid.make([1.0], [1.0]), tw.SinrGrid.make([1.0, 2.0], [1.0])
    power, geometry = single_slope_power_table("cpu"), single_slope_geometry_table("cpu")
    sampler = {"num_realisations": 64}
    template_op = testing.family("template_op")
    norms, selector, sinr = "allreduce_rmsnorm", "anchor_decoding", "sinr_field"
    return [
        Call("rms_norm, hidden 4096, bf16", norms, partial(norm, 4096, BF16)),
        Call("rms_norm, hidden 8192, bf16", norms, partial(norm, 8192, BF16)),
        Call("rms_norm, hidden 4097, bf16", norms, partial(norm, 4097, BF16)),
        Call("add_rms_norm_, hidden 4096, bf16", norms, partial(add_norm, 4096, BF16)),
        Call("add_rms_norm_, hidden 8192, bf16", norms, partial(add_norm, 8192, BF16)),
        Call("add_rms_norm_, hidden 8192, fp32", norms, partial(add_norm, 8192, FP32)),
        Call("backward, hidden 8192, bf16", norms, partial(backward, 8192, BF16)),
        Call("allreduce_rmsnorm_, peer, hidden 8192, bf16", norms, partial(collective, "peer", 8192, BF16)),
        Call("allreduce_rmsnorm_, multimem, hidden 8192, bf16", norms, partial(collective, "multimem", 8192, BF16)),
        Call("decode_step_, bf16", selector, partial(step, BF16, False)),
        Call("select_and_commit_", selector, partial(step, BF16, True)),
        Call("sample_power_domain", sinr, partial(tw.sample_power_domain, power, grid, **sampler)),
        Call("sample_power_domain, 2 densities", sinr, partial(tw.sample_power_domain, power, two, **sampler)),
        Call("sample_geometry", sinr, partial(tw.sample_geometry, geometry, grid, num_points=16, **sampler)),
        Call("rayleigh_conditional", sinr, partial(tw.rayleigh_conditional, geometry, grid, num_points=16, **sampler)),
        Call("scale_rows, hidden 4096, bf16", "template_op",
             partial(template_op.scale_rows, torch.ones(4, 4096, dtype=BF16), torch.ones(4))),
    ]  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel that a call launches, as compiled for sm_90."""

    call: str
    name: str  # with its template arguments
    threads: int
    registers: int
    shared_bytes: int
    occupancy: machine_code.Occupancy
    code: list[str]  # instructions, without operands

    def widest(self, kind: str) -> int:
        """Bits of the widest access among LDG, STG, LDS, ...; 0 if there is none."""
        found = [one.split(".") for one in self.code if one.split(".")[0] == kind]
        return max((next((int(p) for p in parts if p in ("64", "128")), 32) for parts in found), default=0)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, one) is not None for one in self.code)


def symbols(library: str) -> dict[int, str]:
    """Mangled names by address."""
    found = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    return {int(line.split()[0], 16): line.split()[2] for line in found.splitlines() if len(line.split()) == 3}


def short_name(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    name = re.sub(r"tokenweave::(?:backend_\w+::)?", "", name.removeprefix("void "))
    name = re.sub(r"\(Transport\)(\d)", lambda m: ("peer", "multimem")[int(m[1])], name)
    return name.partition("(")[0]


def kernels(cmake_directory: Path) -> list[Kernel]:
    """What the calls launch; what an earlier one has launched in the same shape is not named again."""
    usages = {usage.entry: usage for usage in machine_code.usages(cmake_directory)}
    code: dict[str, list[str]] = {}
    for file in sorted((cmake_directory / "cuda").rglob("*.cu.o")):
        code |= machine_code.functions(machine_code.disassemble(file))
    testing.load_simt()
    simt, places, found = testing.host().simt, {}, {}
    for call in calls():
        simt.set_options()
        with testing.emulated(testing.family(call.family)):
            call.run()
        for launch in simt.launched():
            library = launch["library"]
            places.setdefault(library, symbols(library))
            entry = places[library][launch["offset"]].replace("backend_simt", "backend_cuda")
            usage, threads = usages[entry], launch["threads"]
            shared = usage.static_shared_bytes + launch["shared_bytes"]
            held = machine_code.occupancy(threads, usage.registers, shared)
            one = Kernel(call.name, short_name(entry), threads, usage.registers, shared, held, code[entry])
            found.setdefault((entry, threads, shared), one)
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """A case's bytes and operations over such limits; what a kernel loses on the way is not in it."""

    op: str
    case: str
    num_bytes: int
    operations: int
    bytes_per_s: float = COPY_BYTES_PER_S

    @property
    def memory_us(self) -> float:
        return self.num_bytes / self.bytes_per_s * 1e6

    @property
    def arithmetic_us(self) -> float:
        return self.operations / LANE_OPERATIONS_PER_S * 1e6


SAMPLED = (
    "16 powers", "16 powers, 40 thresholds", "256 stations", "64 stations, nearest", "32 stations, strongest",
)  # fmt: skip


def estimates() -> list[Estimate]:
    """Of some cases of bench/, which count their bytes and operations themselves; samplers at the sizes of a GPU."""
    norms = {(case.op, case.case, case.dtype): case for case in allreduce_rmsnorm.cases("cuda", quick=False)}
    wanted = [("rms_norm", "4096x8192"), ("add_rms_norm_", "256x8192"), ("add_rms_norm_", "4096x8192")]
    wanted += [("allreduce_rmsnorm_ (virtual ranks)", f"8192x4096 x{ranks}") for ranks in (2, 8)]
    found = [norms[op, case, BF16] for op, case in wanted]
    selector = {(case.op, case.case, case.dtype): case for case in anchor_decoding.cases("cpu", quick=False)}
    found += [selector["decode_step_", f"{rows}x126464", BF16] for rows in (32, 256)]
    rows = [Estimate(case.op, case.case, case.bytes, case.flops) for case in found]
    tokens, hidden, ranks = 4096, 8192, 8
    between = Estimate(
        "allreduce_rmsnorm_ (8 GPUs)", f"{tokens}x{hidden}", 2 * tokens * hidden,
        (ranks + 5) * tokens * hidden // ranks, LINK_BYTES_PER_S,
    )  # fmt: skip
    rows.insert(len(wanted), between)
    for case in sinr_field.cases("cpu", quick=False):
        if case.case in SAMPLED:  # a multiply-add is 2 flops and one operation
            scale = sinr_field.GPU_SCALE
            rows.append(Estimate(case.op, case.case, scale * case.bytes, scale * case.flops // 2))
    return rows


# ---------------------------------------------------------------------------------------------------------- the tables

KERNEL_HEADS = (
    "call", "kernel", "threads", "registers", "shared, bytes", "warps on an SM", "held by", "instructions",
    "widest load, store", "of note",
)  # fmt: skip
ESTIMATE_HEADS = ("op", "case", "MB", "us to move them", "operations, 10^6", "us to do them", "bound by")
NOTES = {
    "MUFU.RSQ": r"MUFU\.RSQ",
    "MUFU.EX2": r"MUFU\.EX2",
    "multimem": r"LDGMC",
    "stores to peers": r"STG\..*SYS",
    "global atomics": r"(ATOMG|RED|REDG)\b",
    "shared atomics": r"ATOMS",
    "tensor cores": r"(HMMA|HGMMA|QGMMA|IMMA)",
}


def kernel_cells(kernel: Kernel) -> tuple[str, ...]:
    notes = ", ".join(name for name, pattern in NOTES.items() if kernel.count(pattern))
    return (
        kernel.call, f"`{kernel.name}`", str(kernel.threads), str(kernel.registers), f"{kernel.shared_bytes:,}",
        f"{kernel.occupancy.warps} ({kernel.occupancy.percent:.0f} %)", kernel.occupancy.limit, f"{len(kernel.code):,}",
        f"{kernel.widest('LDG')}, {kernel.widest('STG')}", notes or "-",
    )  # fmt: skip


def estimate_cells(one: Estimate) -> tuple[str, ...]:
    memory = "link" if one.bytes_per_s == LINK_BYTES_PER_S else "memory"
    return (
        f"`{one.op}`", one.case, digits(one.num_bytes / 1e6), digits(one.memory_us), digits(one.operations / 1e6),
        digits(one.arithmetic_us), memory if one.memory_us > one.arithmetic_us else "arithmetic",
    )  # fmt: skip


def digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def compiler(cmake_directory: Path) -> str:
    nvcc = re.search(r"^TOKENWEAVE_NVCC:FILEPATH=(.+)$", (cmake_directory / "CMakeCache.txt").read_text(), re.M)[1]
    found = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", found)[1]


def as_markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def page(cmake_directory: Path) -> str:
    found = kernels(cmake_directory)
    return (
        f"Compiled by {compiler(cmake_directory)} for sm_90:\n\n"
        + as_markdown(KERNEL_HEADS, [kernel_cells(kernel) for kernel in found])
        + "\nEstimates:\n\n"
        + as_markdown(ESTIMATE_HEADS, [estimate_cells(one) for one in estimates()])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cmake_directory", type=Path, help="of the libraries in use: build/cmake-...")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    text = page(arguments.cmake_directory)
    if arguments.write:
        PAGE.write_text(BLOCK.sub(lambda m: m[1] + text + m[2], PAGE.read_text()))
        print(f"Written: {PAGE.relative_to(ROOT)}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
