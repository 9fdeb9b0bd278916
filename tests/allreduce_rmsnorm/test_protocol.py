"""The CPU ranks' protocol as threads under the thread sanitizer: a race is found even where x86 would hide it."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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


FAULTS = {  # one word of the kernel changed: file, right, wrong, complaint
    "race": (
        "host_protocol.h",
        "value, __ATOMIC_RELEASE",
        "value, __ATOMIC_RELAXED",
        "WARNING: ThreadSanitizer: data race",
    ),
    "wrong row": (
        "allreduce_cpu.cpp",
        "T* const arrived = rows.buffer(self, row)",
        "T* const arrived = rows.buffer(self, 0)",
        "wrong",
    ),
}


@pytest.fixture(scope="module")
def programs(launcher, tmp_path_factory) -> dict[str, Path]:
    """The right one, "", and those with a fault; compiled two at a time, which is what this file's time is spent on."""
    folders = {name: tmp_path_factory.mktemp("protocol") for name in ("", *FAULTS)}
    for name, (file, right, wrong, _) in FAULTS.items():
        source = (FAMILY / file).read_text()
        assert source.count(right) == 1
        (folders[name] / FAMILY.name).mkdir()
        (folders[name] / FAMILY.name / file).write_text(source.replace(right, wrong))
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda folder: compile_with_sanitizer(folder / "program", PROGRAM, folder), folders.values())
    for result in done:
        assert result.returncode == 0 and not result.stderr, result.stderr
    return {name: folder / "program" for name, folder in folders.items()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_threads(launcher, programs, mode, world_size):
    done = run(launcher, programs[""], mode, world_size)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.stdout == "ok\n"
    assert not done.stderr, done.stderr[-8000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(launcher, programs, name):
    done = run(launcher, programs[name], "mixed", 3)
    assert done.returncode != 0
    assert FAULTS[name][3] in done.stdout + done.stderr
