"""What the compiled libraries show and need: no Python, no C++ of torch, no symbol that one could take from another."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
EXPORTS = {"tokenweave_schemas", "tokenweave_register"}
# Versioned symbols are those of libc, libstdc++ and libgcc; these few come without a version.
RUNTIME = re.compile(r"__gmon_start__|_ITM_\w+|__cxa_finalize|__(asan|ubsan|tls)_\w+")
TORCH_C = re.compile(r"(aoti_torch|torch)_\w+")
EMULATOR = re.compile(r"_ZN?K?4simt\w+")


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol; names without their version."""
    lines = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    fields = (line.split() for line in lines if line and not line.endswith(":"))
    return [(field[-2], field[-1]) for field in fields if len(field) >= 2]


def undefined(path: Path) -> set[str]:
    return {name for _, name in symbols(path, "-D", "--undefined-only") if "@" not in name}


@pytest.mark.parametrize("backend", ["cpu", "cuda", "simt"])
def test_an_op_library_exports_its_two_functions_only(library, backend):
    assert {name for _, name in symbols(library(backend), "-D", "--defined-only")} == EXPORTS


@pytest.mark.parametrize("backend", ["cpu", "cuda", "simt"])
def test_an_op_library_needs_torchs_c_functions_only(library, backend):
    allowed = [RUNTIME, TORCH_C] + [EMULATOR] * (backend == "simt")
    foreign = {name for name in undefined(library(backend)) if not any(rule.fullmatch(name) for rule in allowed)}
    assert not foreign
    assert any(TORCH_C.fullmatch(name) for name in undefined(library(backend)))


def test_the_emulator_needs_neither_torch_nor_python(library):
    foreign = {name for name in undefined(library("emulator")) if not RUNTIME.fullmatch(name)}
    assert not foreign


def test_only_the_cuda_library_needs_torchs_cuda_functions(library):
    assert not {name for name in undefined(library("cpu")) if "cuda_stream" in name}
    assert "aoti_torch_get_current_cuda_stream" in undefined(library("cuda"))


def test_no_library_has_unique_symbols(library):
    """The dynamic linker merges STB_GNU_UNIQUE symbols across libraries even when they are loaded apart."""
    library("cpu")
    for path in library("cpu").parent.glob("libtokenweave_*.so"):
        unique = [name for kind, name in symbols(path, "-D") if kind == "u"]
        assert not unique, f"{path.name}: {unique}"


def test_code_for_an_instruction_set_shares_no_function_with_other_code(cmake_directory):
    """A weak function outside its own namespace is merged with the baseline's: AVX-512 code on a CPU without it."""
    checked = 0
    for isa in ("isa_avx2", "isa_avx512"):
        for path in (cmake_directory / "CMakeFiles" / f"{isa}.dir").rglob("*.o"):
            shared = [name for kind, name in symbols(path, "--defined-only") if kind in "WVu" and isa not in name]
            assert not shared, f"{path.name}: {shared}"
            checked += 1
    if (cmake_directory / "CMakeFiles" / "isa_avx2.dir").exists():
        assert checked >= 2
    else:
        pytest.skip("this machine's CPU kernels have one instruction set")


@pytest.mark.parametrize(("isa", "register"), [("isa_avx2", "ymm"), ("isa_avx512", "zmm")])
def test_code_for_an_instruction_set_uses_its_registers(cmake_directory, isa, register):
    """Without its compiler flag an object would still pass every other test, several times slower."""
    objects = list((cmake_directory / "CMakeFiles" / f"{isa}.dir").rglob("*.o"))
    if not objects or shutil.which("objdump") is None:
        pytest.skip("this machine's CPU kernels have one instruction set, or objdump (binutils) is not installed")
    for path in objects:
        code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert code.count(f"%{register}") > 100, f"{path.name} of {isa} hardly uses {register} registers"


def test_no_library_names_a_directory_of_this_machine(library, cmake_directory):
    """Line tables of a test build's GPU code are exempt: compute-sanitizer needs the paths."""
    source = re.search(r"CMAKE_HOME_DIRECTORY:INTERNAL=(.+)", (cmake_directory / "CMakeCache.txt").read_text())[1]
    for path in library("cpu").parent.glob("libtokenweave_*.so"):
        if path.name != "libtokenweave_cuda.so":
            assert source.encode() not in path.read_bytes(), path.name
