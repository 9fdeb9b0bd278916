"""What ptxas said of each kernel: no spills, no local memory, registers within the budget stated above the kernel.

A budget is the comment `// registers: <= N` above a TW_KERNEL in a family. Then what the sm_90 code holds: instructions
that a kernel is there for. .ci/run runs this file by itself.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = re.compile(
    r"(?:// registers: <= (?P<budget>\d+)\n(?:template <[^\n]*>\n)?)?TW_KERNEL void[^;{]*?(?P<name>\w+_kernel)\("
)
REPORT = re.compile(
    r"Compiling entry function '(?P<entry>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    entry: str  # mangled
    target: str
    registers: int
    local_bytes: int  # stack frame and spills


def parse_report(text: str) -> list[Usage]:
    return [
        Usage(m["entry"], m["target"], int(m["registers"]), int(m["frame"]) + int(m["stores"]) + int(m["loads"]))
        for m in REPORT.finditer(text)
    ]


def parse_budgets(text: str) -> dict[str, int | None]:
    """Kernel name -> its budget, None if it states none."""
    return {m["name"]: int(m["budget"]) if m["budget"] else None for m in KERNEL.finditer(text)}


def budgets() -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for path in sorted((ROOT / "csrc").glob("*/*.cu*")):
        if path.parent.name != "core":
            found |= parse_budgets(path.read_text())
    return found


def find_problems(usages: list[Usage], allowed: dict[str, int | None]) -> list[str]:
    problems = []
    for usage in usages:
        # Itanium mangling writes a name as its length and itself.
        name = next((name for name in allowed if re.search(rf"\D{len(name)}{name}\D", usage.entry)), None)
        if name is None or allowed[name] is None:
            problems.append(f"{usage.entry}: no `// registers: <= N` above its TW_KERNEL")
        elif usage.registers > allowed[name]:
            problems.append(f"{name} ({usage.entry}): {usage.registers} registers, the budget is {allowed[name]}")
        if usage.local_bytes:
            problems.append(f"{usage.entry}: {usage.local_bytes} bytes of spills or local memory")
    return problems


def test_kernels_stay_within_their_budgets(request):
    allowed = budgets()
    assert allowed, "no kernel was found in csrc"
    # With CUDA asked for, a missing report is a failure: the check must not vanish silently.
    asked = os.environ.get("TOKENWEAVE_CUDA") == "1"
    directory = request.getfixturevalue("cmake_directory")
    logs = sorted((directory / "ptxas").rglob("*.log"))
    if not logs:
        assert not asked, f"TOKENWEAVE_CUDA=1, but {directory} holds no report of ptxas"
        pytest.skip("no CUDA kernels were built here")
    usages = [usage for log in logs for usage in parse_report(log.read_text())]
    hopper = [usage for usage in usages if usage.target in ("sm_90", "sm_90a")]
    problems = find_problems(hopper, allowed)
    assert not problems, "\n".join(problems)
    compiled = " ".join(usage.entry for usage in hopper)
    missing = [name for name in allowed if name not in compiled]
    assert not missing, f"no sm_90 code was reported for {missing}"


# ------------------------------------------------------------------------------------------------------ instructions


def find_tool(name: str) -> str | None:
    """From the toolkit, or from the package of that name on PyPI (requirements/dev.txt)."""
    for site in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        for path in sorted(Path(site).glob(f"nvidia/*/bin/{name}")):
            return str(path)
    return shutil.which(name)


@pytest.fixture
def machine_code(request):
    """machine_code("family/op.cu"): its sm_90 code as text, one instruction a line."""
    asked = os.environ.get("TOKENWEAVE_CUDA") == "1"
    directory = request.getfixturevalue("cmake_directory") / "cuda"
    tools = find_tool("cuobjdump"), find_tool("nvdisasm")
    if not directory.is_dir() or None in tools:
        assert not asked, f"TOKENWEAVE_CUDA=1, but there are no objects in {directory} or no cuobjdump and nvdisasm"
        pytest.skip("no CUDA kernels were built here, or cuobjdump and nvdisasm are missing")
    path = os.pathsep.join([*(str(Path(tool).parent) for tool in tools), os.environ.get("PATH", "")])

    def disassemble(name: str) -> str:
        command = [tools[0], "-sass", "-arch", "sm_90", str(directory / f"{name}.o")]
        return subprocess.run(
            command, env=os.environ | {"PATH": path}, check=True, capture_output=True, text=True
        ).stdout

    return disassemble


@pytest.mark.parametrize(("dtype", "reduction"), [("bf16", "F32ADD.BF16"), ("fp16", "F32ADD.F16"), ("fp32", "ADD.F32")])
def test_collectives_use_the_switch(machine_code, dtype, reduction):
    """multimem.ld_reduce with fp32 additions, multimem.st, multimem.red; 16-byte loads and stores for peers."""
    code = machine_code(f"allreduce_rmsnorm/allreduce.{dtype}.cu")
    for instruction in (
        rf"LDGMC\.E\.{reduction}",
        r"STG\.E\.128\.STRONG\.SYS",
        r"REDG\.E\.ADD\.64\.STRONG\.SYS",
        r"LDG\.E\.NA\.128",
        r"STG\.E\.NA\.128",
    ):
        assert re.search(rf"\b{instruction}", code), f"no {instruction} in the code for {dtype}"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_decode_step_streams_its_rows(machine_code, dtype):
    """16-byte loads past L1, exponentials by the special unit, tickets at gpu scope; no local memory."""
    code = machine_code(f"anchor_decoding/decode_step.{dtype}.cu")
    for instruction in (r"LDG\.E\.NA\.128", r"MUFU\.EX2", r"ATOMG\.E\.ADD\.STRONG\.GPU"):
        assert re.search(rf"\b{instruction}", code), f"no {instruction} in the code for {dtype}"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    functions = re.split(r"Function : ", code)[1:]
    assert len(functions) == 4
    for function in functions:
        assert len(re.findall(r"\bMUFU\.EX2", function)) >= 16, "the terms of a group of packs are not unrolled"


@pytest.mark.parametrize("op", ["sample_power_domain", "sample_geometry", "rayleigh_conditional"])
def test_samplers_keep_the_bits_of_the_cpu(machine_code, op):
    """No approximate exponential or logarithm, which differ from a CPU's; counts by one atomic in shared memory."""
    code = machine_code(f"sinr_field/{op}.cu")
    assert not re.search(r"\bMUFU\.(EX2|LG2)\b", code), "an approximation that no CPU has"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    assert re.search(r"\bATOMS\.", code), "histograms are not counted in shared memory"
    if op != "rayleigh_conditional":  # which reads its tables once for each realisation
        assert re.search(r"\bLDS\.128\b", code), "the four coefficients of an interval are not one load"


# ------------------------------------------------------------------------------------------- the check can fail

LOG = """ptxas info    : Compiling entry function '_ZN10tokenweave12backend_cuda11some_kernelIfEEvNS0_1PE' for 'sm_90'
ptxas info    : Function properties for _ZN10tokenweave12backend_cuda11some_kernelIfEEvNS0_1PE
    {frame} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers
"""


@pytest.mark.parametrize(
    ("frame", "spill", "registers", "problem"),
    [
        (0, 0, 40, None),
        (0, 0, 41, r"some_kernel .*: 41 registers, the budget is 40"),
        (8, 0, 40, "8 bytes of spills or local memory"),
        (0, 4, 40, "8 bytes of spills or local memory"),
    ],
)
def test_a_kernel_over_its_budget_is_named(frame, spill, registers, problem):
    usages = parse_report(LOG.format(frame=frame, spill=spill, registers=registers))
    assert len(usages) == 1
    problems = find_problems(usages, {"some_kernel": 40})
    assert len(problems) == (problem is not None)
    assert problem is None or re.search(problem, problems[0])


@pytest.mark.parametrize("allowed", [{"some_kernel": None}, {"other_kernel": 40}, {"awesome_kernel": 40}])
def test_a_kernel_without_a_budget_is_named(allowed):
    problems = find_problems(parse_report(LOG.format(frame=0, spill=0, registers=1)), allowed)
    assert problems
    assert "no `// registers: <= N`" in problems[0]


def test_budgets_are_read_above_kernels_of_any_form():
    text = """
// registers: <= 64
template <class T, int kPacks>
TW_KERNEL void __launch_bounds__(kMax<kPacks>, kMin<kPacks>) first_kernel(Params p) {}
// registers: <= 32
TW_KERNEL void second_kernel(float* p) {}
TW_KERNEL void __launch_bounds__(256) third_kernel(float* p) {}
"""
    assert parse_budgets(text) == {"first_kernel": 64, "second_kernel": 32, "third_kernel": None}
