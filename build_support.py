"""Finds torch, the compilers and what to build, runs CMake and Ninja, and records what was built.

setup.py calls build(); `python build_support.py` builds into the source tree without pip or setuptools. Every refusal
is a BuildError of one sentence. Nothing here imports torch: its version and directories are read from its files, so a
build needs no working GPU, driver or CUDA runtime.

Environment: TOKENWEAVE_CUDA=auto|1|0, TOKENWEAVE_TEST_BUILD=0|1, TOKENWEAVE_SANITIZE (such as address,undefined),
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME, CUDACXX, and TOKENWEAVE_BUILD_DIR (CMake's directory, default
build/cmake-<configuration>).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
MINIMUM_SETUPTOOLS = 77  # as in pyproject.toml
MINIMUM_NVCC = (12, 4)
MINIMUM_ARCHITECTURE = (9, 0)
DEFAULT_ARCHITECTURES = "9.0+PTX"
MACHINES = ("x86_64", "aarch64")
GIB_PER_JOB = 2  # nvcc on a kernel file; g++ on the glue takes less
INSTALL_COMMANDS = "`pip install torch==2.14.1 'setuptools>=77' cmake ninja`, then `pip install --no-build-isolation .`"


class BuildError(Exception):
    """Why nothing can be built: one sentence for the user."""


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None  # torch.version.cuda
    home: Path


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Plan:
    """One configuration; everything that decides what the compilers produce."""

    torch: Torch
    compiler: str
    compiler_version: str
    nvcc: Nvcc | None  # None: CPU kernels only
    no_cuda_reason: str
    architectures: tuple[str, ...]  # as in ("sm_90", "compute_90")
    test_build: bool
    sanitize: str
    jobs: int
    jobs_reason: str

    @property
    def key(self) -> str:
        """Names the CMake directory: another configuration gets another one, so switching back rebuilds nothing."""
        nvcc = str(self.nvcc and self.nvcc.path)
        facts = (str(self.torch.home), self.compiler, nvcc, self.architectures, sys.version)
        parts = ["cmake", f"torch{self.torch.version}", "cuda" if self.nvcc else "cpu"]
        parts += ["test"] * self.test_build + ["sanitize"] * bool(self.sanitize)
        return "-".join([*parts, hashlib.sha256(repr(facts).encode()).hexdigest()[:8]])


# --------------------------------------------------------------------------------------------- what the user asked for


def read_choice(environment: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise BuildError(f"{name} must be one of {', '.join(choices)}; it is {value!r}.")
    return value


def parse_architectures(text: str, known: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """TORCH_CUDA_ARCH_LIST -> (targets such as sm_90 and compute_90, entries left out because they are too old).

    `known` is what nvcc can target, as in ("sm_90", ...); empty if it did not say.
    """
    targets: list[str] = []
    too_old: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has the unknown architecture {entry!r}; write 9.0, 9.0a, 9.0+PTX or 10.0, say."
            )
        major, minor, feature, ptx = match.groups()
        if (int(major), int(minor)) < MINIMUM_ARCHITECTURE:
            too_old.append(entry)
            continue
        number = f"{major}{minor}"
        if known and f"sm_{number}" not in known:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {entry}, but this nvcc only knows {', '.join(known)}.")
        targets += [f"sm_{number}{feature}"] + ([f"compute_{number}{feature}"] if ptx else [])
    if not targets:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST has {', '.join(too_old)} only, but these kernels need 9.0 (sm_90, Hopper) or newer."
        )
    return tuple(dict.fromkeys(targets)), too_old


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's -gencode values: one for each virtual architecture, with every code made from it."""
    by_virtual: dict[str, list[str]] = {}
    for target in architectures:
        by_virtual.setdefault(target.replace("sm_", "compute_"), []).append(target)
    return [f"arch={virtual},code=[{','.join(codes)}]" for virtual, codes in by_virtual.items()]


def choose_jobs(environment: Mapping[str, str], cores: int, free_gib: float) -> tuple[int, str]:
    text = environment.get("MAX_JOBS")
    if text:
        if not re.fullmatch(r"[1-9]\d*", text):
            raise BuildError(f"MAX_JOBS must be a positive number; it is {text!r}.")
        return int(text), "MAX_JOBS"
    jobs = max(1, min(cores, int(free_gib / GIB_PER_JOB)))
    return jobs, f"{cores} cores, {free_gib:.0f} GiB free"


# ---------------------------------------------------------------------------------------------- what this machine has


def check_platform(system: str, machine: str) -> None:
    if system != "Linux" or machine not in MACHINES:
        raise BuildError(f"tokenweave-ops builds on Linux on {' and '.join(MACHINES)}; this is {system} on {machine}.")


def check_setuptools(version: str) -> None:
    if int(version.split(".")[0]) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"Building needs setuptools {MINIMUM_SETUPTOOLS} or newer, and {version} is installed: "
            f"run `pip install 'setuptools>={MINIMUM_SETUPTOOLS}'`."
        )


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            f"tokenweave-ops builds against the installed torch, and {sys.executable} has none: run {INSTALL_COMMANDS}."
        )
    return read_torch(Path(spec.origin).parent)


def read_torch(home: Path) -> Torch:
    facts: dict = {}
    exec((home / "version.py").read_text(), facts)
    version = facts["__version__"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(
            f"tokenweave-ops needs torch {minimum} or newer, and torch {version} is installed: run {INSTALL_COMMANDS}."
        )
    return Torch(version, facts.get("cuda"), home)


def run_for_output(command: Sequence[str | os.PathLike], stdin: str = "") -> str | None:
    """Standard output, or None if the command cannot run or fails."""
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


CXX20_PROBE = "#include <bit>\n#include <concepts>\nstatic_assert(std::bit_cast<unsigned>(1.0f) == 0x3f800000u);\n"


def find_compiler(environment: Mapping[str, str]) -> tuple[str, str]:
    """(path, first line of --version) of the C++ compiler: $CXX, else the first of c++, g++, clang++ on PATH."""
    wanted = [environment["CXX"]] if environment.get("CXX") else ["c++", "g++", "clang++"]
    path = next(filter(None, (shutil.which(name, path=environment.get("PATH")) for name in wanted)), None)
    if path is None:
        raise BuildError(
            f"No C++ compiler was found (looked for {', '.join(wanted)}): install g++ 11 or newer, or set CXX."
        )
    version = (run_for_output([path, "--version"]) or "unknown version").splitlines()[0]
    if run_for_output([path, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"], CXX20_PROBE) is None:
        raise BuildError(f"{path} ({version}) does not compile C++20: install g++ 11 or newer, or set CXX.")
    return path, version


def nvcc_candidates(environment: Mapping[str, str], site_directories: Sequence[str]) -> list[Path]:
    """Where nvcc may be, best first: what the user named, PATH, CUDA's pip packages, the usual place."""
    candidates = []
    if environment.get("CUDA_HOME"):
        candidates.append(Path(environment["CUDA_HOME"]) / "bin" / "nvcc")
    for name in filter(None, (environment.get("CUDACXX"), "nvcc")):
        found = shutil.which(name, path=environment.get("PATH"))
        if found:
            candidates.append(Path(found))
    for directory in site_directories:
        candidates += sorted(Path(directory).glob("nvidia/*/bin/nvcc"), reverse=True)
    return [*candidates, Path("/usr/local/cuda/bin/nvcc")]


def find_nvcc(environment: Mapping[str, str], site_directories: Sequence[str]) -> Nvcc | None:
    """The first candidate that runs and tells its version."""
    for path in nvcc_candidates(environment, site_directories):
        release = re.search(r"release (\d+)\.(\d+)", run_for_output([path, "--version"]) or "")
        if release:
            return Nvcc(path, (int(release[1]), int(release[2])))
    return None


def decide_cuda(choice: str, nvcc: Nvcc | None, torch: Torch) -> str:
    """Why CUDA kernels are not built, empty if they are. TOKENWEAVE_CUDA=1 turns every reason into an error."""
    if choice == "0":
        return "TOKENWEAVE_CUDA=0 asked for CPU kernels only"
    reason = ""
    if torch.cuda is None:
        reason = f"torch {torch.version} is a build without CUDA"
    elif nvcc is None:
        reason = "no nvcc was found in $CUDA_HOME, $CUDACXX, PATH, the pip packages of CUDA or /usr/local/cuda"
    elif nvcc.version < MINIMUM_NVCC:
        reason = f"{nvcc} ({nvcc.path}) is older than {MINIMUM_NVCC[0]}.{MINIMUM_NVCC[1]}"
    if reason and choice == "1":
        raise BuildError(f"TOKENWEAVE_CUDA=1, but {reason}.")
    return reason


def free_memory_gib() -> float:
    """What the kernel says is available, or what this control group may still take, whichever is less."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(match[1]) / 2**20 if match else GIB_PER_JOB
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, (int(limit) - int(used)) / 2**30)
    except (OSError, ValueError):  # no such file, or "max"
        return free


def find_tool(name: str) -> str:
    """cmake or ninja: beside this Python first (a virtual environment need not be activated), then on PATH."""
    path = os.pathsep.join(
        [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    found = shutil.which(name, path=path)
    if found is None:
        raise BuildError(f"{name} was not found: run `pip install cmake ninja`.")
    return found


def check_test_build(include: Path) -> None:
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("A test build (TOKENWEAVE_TEST_BUILD=1) needs pybind11: run `pip install pybind11`.")
    if not (include / "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise BuildError(f"A test build needs Python.h in {include}: `apt install {package}` on Debian and Ubuntu.")


def make_plan(environment: Mapping[str, str]) -> Plan:
    check_platform(platform.system(), platform.machine())
    cuda_choice = read_choice(environment, "TOKENWEAVE_CUDA", ("auto", "1", "0"))
    test_build = read_choice(environment, "TOKENWEAVE_TEST_BUILD", ("0", "1")) == "1"
    if test_build:
        check_test_build(Path(sysconfig.get_path("include")))
    jobs, jobs_reason = choose_jobs(environment, len(os.sched_getaffinity(0)), free_memory_gib())
    torch = find_torch()
    compiler, compiler_version = find_compiler(environment)
    nvcc = find_nvcc(environment, sys.path)
    no_cuda_reason = decide_cuda(cuda_choice, nvcc, torch)
    architectures: tuple[str, ...] = ()
    if no_cuda_reason:
        nvcc = None
    else:
        known = [code for code in (run_for_output([nvcc.path, "--list-gpu-code"]) or "").split() if int(code[3:]) >= 90]
        architectures, too_old = parse_architectures(
            environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES, known
        )
        if too_old:
            print(f"Left out of TORCH_CUDA_ARCH_LIST: {', '.join(too_old)}; these kernels need 9.0 or newer.")
    sanitize = environment.get("TOKENWEAVE_SANITIZE", "")
    return Plan(
        torch, compiler, compiler_version, nvcc, no_cuda_reason, architectures, test_build, sanitize, jobs, jobs_reason
    )


# ---------------------------------------------------------------------------------------------------------- the build


def describe(plan: Plan) -> str:
    cuda = (
        f"{', '.join(plan.architectures)} with {plan.nvcc} ({plan.nvcc.path})"
        if plan.nvcc
        else f"not built: {plan.no_cuda_reason}"
    )
    lines = [
        f"torch         {plan.torch.version} ({plan.torch.home})",
        f"CPU kernels   {platform.machine()} with {plan.compiler_version}",
        f"CUDA kernels  {cuda}",
        f"jobs          {plan.jobs} ({plan.jobs_reason})",
    ]
    if plan.test_build:
        lines.insert(3, "test build    with the emulator, the emulated kernels and the _host module")
    if plan.sanitize:
        lines.insert(3, f"sanitizers    {plan.sanitize}")
    return "\n".join(["Building tokenweave-ops:", *(f"  {line}" for line in lines)])


def cmake_command(plan: Plan, build_directory: Path) -> list[str]:
    settings = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "CMAKE_CXX_COMPILER": plan.compiler,
        "Python3_EXECUTABLE": sys.executable,
        "TOKENWEAVE_CUDA": "ON" if plan.nvcc else "OFF",
        "TOKENWEAVE_TEST_BUILD": "ON" if plan.test_build else "OFF",
        "TOKENWEAVE_SANITIZE": plan.sanitize,
        "TOKENWEAVE_TORCH_INCLUDE": str(plan.torch.home / "include"),
        "TOKENWEAVE_TORCH_LIB": str(plan.torch.home / "lib"),
    }
    if plan.nvcc:
        settings |= {
            "TOKENWEAVE_NVCC": str(plan.nvcc.path),
            "TOKENWEAVE_GENCODE": ";".join(gencode(plan.architectures)),
        }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    return [find_tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build_directory), *definitions]


def git_commit() -> str | None:
    """Short hash of the source tree's commit, "-dirty" if tracked files differ; None outside a repository of ours."""
    if not (ROOT / ".git").exists():
        return None
    commit = run_for_output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    changes = run_for_output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("-dirty" if changes else "")


def package_version() -> str:
    return re.search(r'__version__ = "([^"]+)"', (ROOT / "tokenweave_ops" / "__init__.py").read_text())[1]


def build_info(plan: Plan, libraries: Sequence[str]) -> dict:
    """What `python -m tokenweave_ops.info` shows. No dates, paths or host names: two equal builds are equal files."""
    return {
        "version": package_version(),
        "git_commit": git_commit(),
        "machine": platform.machine(),
        "torch": plan.torch.version,
        "torch_cuda": plan.torch.cuda,
        "compiler": plan.compiler_version,
        "nvcc": ".".join(map(str, plan.nvcc.version)) if plan.nvcc else None,
        "cuda_architectures": list(plan.architectures),
        "no_cuda_reason": plan.no_cuda_reason or None,
        "libraries": sorted(libraries),
        "test_build": plan.test_build,
        "sanitize": plan.sanitize or None,
    }


def install(libraries: Sequence[Path], info: dict, output: Path) -> None:
    """Makes `output` hold these libraries and no other; each is replaced whole, for processes that have it mapped."""
    output.mkdir(parents=True, exist_ok=True)
    kept = {library.name for library in libraries}
    for old in [*output.glob("*.so"), *output.glob("*.part")]:
        if old.name not in kept:
            old.unlink()
    for library in libraries:
        part = output / f"{library.name}.part"
        shutil.copy2(library, part)
        part.replace(output / library.name)
    (output / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def build(output: Path, python_specific: bool = True) -> None:
    """Builds what the environment asks for into `output`; python_specific=False leaves out _host (for a wheel)."""
    plan = make_plan(os.environ)
    build_directory = Path(os.environ.get("TOKENWEAVE_BUILD_DIR") or ROOT / "build" / plan.key)
    print(describe(plan), flush=True)
    start = time.monotonic()
    configured = subprocess.run(
        cmake_command(plan, build_directory), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if configured.returncode != 0:
        raise BuildError(f"CMake could not configure the build:\n{configured.stdout}")
    if subprocess.run([find_tool("ninja"), "-C", str(build_directory), f"-j{plan.jobs}"]).returncode != 0:
        raise BuildError("The build failed; the first error above says where.")
    names = (build_directory / "libraries.txt").read_text().split()
    libraries = [build_directory / "lib" / name for name in names if python_specific or not name.startswith("_host")]
    install(libraries, build_info(plan, [library.name for library in libraries]), output)
    print(f"Built {', '.join(library.name for library in libraries)} in {time.monotonic() - start:.0f} s.", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "tokenweave_ops" / "lib", help="default: %(default)s")
    try:
        build(parser.parse_args().output)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
