"""What ptxas said of each kernel: no spills, no local memory, registers within the budget stated above the kernel.

A budget is the comment `// registers: <= N` above a TW_KERNEL in a family. Then what the sm_90 code holds: instructions
that a kernel is there for. .ci/run runs this file by itself.
"""

import os
import re
from pathlib import Path

import pytest

from bench import kernels, machine_code
from bench.machine_code import Usage, occupancy, parse_report

ROOT = Path(__file__).resolve().parents[2]
KERNEL = re.compile(
    r"(?:// registers: <= (?P<budget>\d+)\n(?:template <[^\n]*>\n)?)?TW_KERNEL void[^;{]*?(?P<name>\w+_kernel)\("
)


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
    hopper = machine_code.usages(directory)
    if not hopper:
        assert not asked, f"TOKENWEAVE_CUDA=1, but {directory} holds no report of ptxas"
        pytest.skip("no CUDA kernels were built here")
    problems = find_problems(hopper, allowed)
    assert not problems, "\n".join(problems)
    compiled = " ".join(usage.entry for usage in hopper)
    missing = [name for name in allowed if name not in compiled]
    assert not missing, f"no sm_90 code was reported for {missing}"


# ------------------------------------------------------------------------------------------------------ instructions


@pytest.fixture
def built(request) -> Path:
    """The CMake directory, which has CUDA kernels and can be disassembled."""
    asked = os.environ.get("TOKENWEAVE_CUDA") == "1"
    directory = request.getfixturevalue("cmake_directory")
    if not (directory / "cuda").is_dir() or None in map(machine_code.find_tool, ("cuobjdump", "nvdisasm")):
        assert not asked, f"TOKENWEAVE_CUDA=1, but there are no objects in {directory} or no cuobjdump and nvdisasm"
        pytest.skip("no CUDA kernels were built here, or cuobjdump and nvdisasm are missing")
    return directory


@pytest.fixture
def machine_code_of(built):
    """machine_code_of("family/op.cu"): its sm_90 code as text, one instruction a line."""
    return lambda name: machine_code.disassemble(built / "cuda" / f"{name}.o")


def test_norms_move_packs_of_16_bytes(machine_code_of):
    """Every access to rows and weight is 128 bits wide; a reciprocal root by the special unit; no local memory."""
    code = machine_code.functions(machine_code_of("allreduce_rmsnorm/rms_norm.cu"))
    packed = {name: body for name, body in code.items() if "rms_norm_kernel" in name}
    assert len(packed) == 3 * 4 * 2  # dtypes, packs of a thread, with and without a residual
    for name, body in packed.items():
        packs, has_residual = re.search(r"Li(\d)ELb(\d)E", name).groups()
        tensors = 2 + int(has_residual)  # x and weight, and the residual
        loads, stores = ([one for one in body if re.match(rf"{kind}\.", one)] for kind in ("LDG", "STG"))
        assert sum(".128" in one for one in loads) >= tensors * int(packs), f"{name}: {loads}"
        assert sum(".128" in one for one in stores) >= (1 + int(has_residual)) * int(packs), f"{name}: {stores}"
        assert all(".128" in one for one in loads), f"{name}: {loads}"
        narrow = [one for one in stores if ".128" not in one]  # the saved root of training, one number a row
        assert len(narrow) <= 1 and not any(".U16" in one for one in narrow), f"{name}: {narrow}"
        assert "MUFU.RSQ" in body, name
        assert not {"LDL", "STL"} & {one.split(".")[0] for one in body}, f"{name}: local memory"
    for name in code.keys() - packed.keys():
        assert "rms_norm_scalar_kernel" in name


def test_gradients_move_packs_of_16_bytes(machine_code_of):
    code = machine_code.functions(machine_code_of("allreduce_rmsnorm/rms_norm_backward.cu"))
    rows = {name: body for name, body in code.items() if "backward_rows" in name and re.search(r"Li[48]E", name)}
    assert len(rows) == 3  # dtypes
    for name, body in rows.items():
        wide = [one for one in body if re.match(r"(LDG|STG)\..*128", one)]
        assert sum(one.startswith("LDG") for one in wide) >= 4, f"{name}: {wide}"  # grad_y, grad_h, h, weight
        assert sum(one.startswith("STG") for one in wide) >= 1, f"{name}: {wide}"
        assert not {"LDL", "STL"} & {one.split(".")[0] for one in body}, f"{name}: local memory"


@pytest.mark.parametrize(("dtype", "reduction"), [("bf16", "F32ADD.BF16"), ("fp16", "F32ADD.F16"), ("fp32", "ADD.F32")])
def test_collectives_use_the_switch(machine_code_of, dtype, reduction):
    """multimem.ld_reduce with fp32 additions, multimem.st, multimem.red; 16-byte loads and stores for peers."""
    code = machine_code_of(f"allreduce_rmsnorm/allreduce.{dtype}.cu")
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
def test_decode_step_streams_its_rows(machine_code_of, dtype):
    """16-byte loads past L1, exponentials by the special unit, tickets at gpu scope; no local memory."""
    code = machine_code_of(f"anchor_decoding/decode_step.{dtype}.cu")
    for instruction in (r"LDG\.E\.NA\.128", r"MUFU\.EX2", r"ATOMG\.E\.ADD\.STRONG\.GPU"):
        assert re.search(rf"\b{instruction}", code), f"no {instruction} in the code for {dtype}"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    functions = re.split(r"Function : ", code)[1:]
    assert len(functions) == 4
    for function in functions:
        assert len(re.findall(r"\bMUFU\.EX2", function)) >= 16, "the terms of a group of packs are not unrolled"


@pytest.mark.parametrize("op", ["sample_power_domain", "sample_geometry", "rayleigh_conditional"])
def test_samplers_keep_the_bits_of_the_cpu(machine_code_of, op):
    """No approximate exponential or logarithm, which differ from a CPU's; counts by one atomic in shared memory."""
    code = machine_code_of(f"sinr_field/{op}.cu")
    assert not re.search(r"\bMUFU\.(EX2|LG2)\b", code), "an approximation that no CPU has"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    assert re.search(r"\bATOMS\.", code), "histograms are not counted in shared memory"
    if op != "rayleigh_conditional":  # which reads its tables once for each realisation
        assert re.search(r"\bLDS\.128\b", code), "the four coefficients of an interval are not one load"


def test_the_page_of_kernels_is_what_was_built(built):
    """docs/performance.md, "Kernels that no GPU has run yet"; numbers of another compiler are not compared."""
    stated = kernels.BLOCK.search(kernels.PAGE.read_text())[0]
    if kernels.compiler(built) not in stated:
        pytest.skip(f"the page is of another compiler than {kernels.compiler(built)}")
    if not any((built / "lib").glob("libtokenweave_simt*")):
        pytest.skip("the emulator was not built here")
    assert kernels.page(built) in stated, "python bench/kernels.py build/cmake-... --write"


# ------------------------------------------------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    ("threads", "registers", "shared_bytes", "blocks", "limit"),
    [
        (1024, 32, 0, 2, "warps"),
        (1024, 33, 0, 1, "registers"),
        (256, 64, 0, 4, "registers"),
        (256, 65, 0, 3, "registers"),  # 72 after rounding: 7 warps to each quarter
        (128, 110, 17808, 4, "registers"),
        (32, 16, 0, 32, "blocks"),
        (96, 168, 0, 4, "registers"),  # 12 warps in all
        (256, 32, 56 * 1024, 4, "shared memory"),
        (256, 32, 57 * 1024, 3, "shared memory"),  # one KiB a block is the system's
        (128, 32, 227 * 1024, 1, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_calculator(threads, registers, shared_bytes, blocks, limit):
    found = occupancy(threads, registers, shared_bytes)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * threads // 32, limit)


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
