"""The CPU ranks' protocol as threads under the thread sanitizer: a race is found even where x86 would hide it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("protocol_threads.cpp")
FAMILY = ROOT / "csrc" / "allreduce_rmsnorm"
MODES = ["mixed", "missing", "half", "refused", "lost", "closed", "interrupted", "window", "bell", "link", "link_lost"]


def compile_with_sanitizer(program: Path, source: Path, *include: Path) -> subprocess.CompletedProcess:
    # -Wno-tsan: the sanitizer does not follow fences. They order the bell only, and nothing else relies on that.
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-tsan"]
    names = ["-DTOKENWEAVE_BACKEND=backend_cpu", "-DTOKENWEAVE_ISA=isa_threads"]
    folders = [f"-I{folder}" for folder in (*include, ROOT / "csrc")]
    return subprocess.run(
        ["g++", *flags, *names, *folders, str(source), "-o", str(program)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> list[str]:
    """What to write before a program: gcc 12's sanitizer fails where the kernel randomizes addresses widely."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("probe")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    if compile_with_sanitizer(program, source).returncode != 0:
        pytest.skip("g++ lacks its thread sanitizer (libtsan)")
    launchers = [[]] + ([["setarch", "--addr-no-randomize"]] if shutil.which("setarch") else [])
    for prefix in launchers:
        if subprocess.run([*prefix, str(program)], capture_output=True).returncode == 0:
            return prefix
    pytest.skip("the thread sanitizer does not run on this kernel")


def run(launcher: list[str], program: Path, mode: str, world_size: int, seed: int = 1) -> subprocess.CompletedProcess:
    command = [*launcher, str(program), mode, str(world_size), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def program(launcher, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("protocol") / "protocol_threads"
    done = compile_with_sanitizer(path, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return path


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_threads(launcher, program, mode, world_size):
    done = run(launcher, program, mode, world_size)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.stdout == "ok\n"
    assert not done.stderr, done.stderr[-8000:]


@pytest.mark.parametrize(
    "name, right, wrong, complaint",
    [
        (
            "host_protocol.h",
            "value, __ATOMIC_RELEASE",
            "value, __ATOMIC_RELAXED",
            "WARNING: ThreadSanitizer: data race",
        ),
        (
            "allreduce_cpu.cpp",
            "T* const arrived = rows.buffer(self, row)",
            "T* const arrived = rows.buffer(self, 0)",
            "wrong",
        ),
    ],
    ids=["race", "wrong row"],
)
def test_a_fault_is_found(launcher, tmp_path, name, right, wrong, complaint):
    """The same program with one word of the kernel changed."""
    faulty = tmp_path / FAMILY.name
    faulty.mkdir()
    source = (FAMILY / name).read_text()
    assert source.count(right) == 1
    (faulty / name).write_text(source.replace(right, wrong))
    done = compile_with_sanitizer(tmp_path / "program", PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(launcher, tmp_path / "program", "mixed", 3)
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr
