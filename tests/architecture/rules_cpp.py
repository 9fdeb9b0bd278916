"""Rules about csrc: who may include whom, where machine instructions stand, how code may end."""

import re
from collections.abc import Callable
from pathlib import Path

from tree import cpp_code, cpp_files, family_folders, matches, rule

INCLUDE = r'^\s*#\s*include\s*[<"](?P<header>[^>"]+)[>"]'


def code_matches(root: Path, pattern: str, problem: str, allowed: Callable[[str], bool]) -> list[str]:
    """Matches of `pattern` in csrc's code (not comments, not strings), but for files whose path `allowed` accepts."""
    return [
        violation
        for path in cpp_files(root)
        if not allowed(path.relative_to(root / "csrc").as_posix())
        for violation in matches(root, path, cpp_code(path), pattern, problem)
    ]


def includes(path: Path) -> list[tuple[int, str]]:
    code = cpp_code(path, keep_strings=True)
    return [
        (code.count("\n", 0, match.start("header")) + 1, match["header"])
        for match in re.finditer(INCLUDE, code, re.MULTILINE)
    ]


def is_glue(path: str) -> bool:
    return path.startswith("torch/") or path.endswith(("_torch.cpp", "_torch.h"))


def is_host(path: str) -> bool:
    return path.startswith("host/") or path.endswith("_host.cpp")


# ----------------------------------------------------------------------------------------------------------- C++ layers


@rule
def only_glue_includes_torch(root: Path) -> list[str]:
    """Kernels know no torch, so that the emulator, sanitizers and other frameworks can have them as they are."""
    torch_header = re.compile(r"(torch|ATen|c10|caffe2)/")
    return [
        f"{path.relative_to(root)}:{line}: only csrc/torch and *_torch.cpp may include torch: {header}"
        for path in cpp_files(root)
        if not is_glue(path.relative_to(root / "csrc").as_posix())
        for line, header in includes(path)
        if torch_header.match(header)
    ]


@rule
def only_host_includes_python(root: Path) -> list[str]:
    """The libraries that users get must load under any Python version."""
    return [
        f"{path.relative_to(root)}:{line}: only csrc/host and *_host.cpp may include Python: {header}"
        for path in cpp_files(root)
        if not is_host(path.relative_to(root / "csrc").as_posix())
        for line, header in includes(path)
        if re.match(r"(pybind11/|Python\.h|torch/(extension|python)\.h)", header)
    ]


@rule
def cpp_layers(root: Path) -> list[str]:
    """Includes go down only: a family uses core (its glue also torch/, its host binding also host/), never a family."""
    layers = {"core": {"core", "simt"}, "simt": {"simt"}, "torch": {"torch", "core"}, "host": {"host", "core", "simt"}}
    rooms = {folder.name for folder in family_folders(root)} | set(layers)
    problems = []
    for path in cpp_files(root):
        inside = path.relative_to(root / "csrc")
        own = inside.parts[0]
        allowed = layers.get(own, {own, "core"})
        if own not in layers and is_glue(inside.as_posix()):
            allowed = allowed | {"torch"}
        if own not in layers and is_host(inside.as_posix()):
            allowed = allowed | {"host", "simt"}
        for line, header in includes(path):
            room = header.split("/")[0]
            if "/" in header and room in rooms - allowed:
                problems.append(f"{path.relative_to(root)}:{line}: may include only {sorted(allowed)}: {header}")
            elif header.startswith("."):
                problems.append(f"{path.relative_to(root)}:{line}: include by the path below csrc, not: {header}")
    return problems


@rule
def instructions_only_in_arch(root: Path) -> list[str]:
    """Each machine instruction has a host twin beside it, so it stands in core/arch.cuh and nowhere else."""
    pattern = (
        r"\b(asm|__asm__|__asm)\b|\b__(shfl|ballot|any|all|activemask|match|reduce)_?\w*sync\b|\b__activemask\b"
        r"|\b__sync(threads|warp)\w*|\batomic[A-Z]\w*|\b__threadfence\w*|\b__nanosleep\b|\bclock(64)?\s*\(|\b__ld[gc]\w*\b"
        r"|\b__bar_sync\w*"
    )
    return code_matches(
        root,
        pattern,
        "device instructions belong in core/arch.cuh",
        lambda path: path == "core/arch.cuh" or path.startswith("simt/"),
    )


@rule
def one_launch(root: Path) -> list[str]:
    """All kernels start through launch() in core/launch.h, which the emulator shares and which checks every launch."""
    return code_matches(
        root, r"<<<|\bcudaLaunch\w+", "launch through core/launch.h", lambda path: path == "core/launch.h"
    )


@rule
def shared_memory_only_in_arch(root: Path) -> list[str]:
    """A static __shared__ array is one array for all interleaved blocks when emulated, and is not bounds-checked."""
    return code_matches(root, r"\b__shared__\b", "take arch::shared<Struct>()", lambda path: path == "core/arch.cuh")


@rule
def backend_switches(root: Path) -> list[str]:
    """One place knows which backend it is compiled for; device or host is core's business."""
    return code_matches(
        root,
        r"\bTOKENWEAVE_BACKEND_\w+",
        "#if on the backend belongs in csrc/torch/backend.h",
        lambda path: path == "torch/backend.h",
    ) + code_matches(
        root,
        r"\b__CUDA_?(CC|ARCH)__|\b__NVCC__",
        "#if on the compiler belongs in csrc/core",
        lambda path: path.startswith("core/"),
    )


@rule
def backend_namespace(root: Path) -> list[str]:
    """Without a namespace per backend the linker may merge equal symbols of libraries built from one source."""
    return code_matches(
        root,
        r"\bnamespace\s+tokenweave\b(?!\s*::\s*inline\s+TOKENWEAVE_BACKEND\b)(?=[\w:\s]*\{)",
        "open `namespace tokenweave::inline TOKENWEAVE_BACKEND`",
        lambda path: False,
    )


# -------------------------------------------------------------------------------------------------------- C++ behaviour


@rule
def nothing_ends_the_process(root: Path) -> list[str]:
    """A library does not end its caller, and a trap poisons the CUDA context for the whole process."""
    return code_matches(
        root,
        r"(?<![\w.>])(std::)?(exit|_exit|_Exit|quick_exit|abort|terminate|__trap|__brkpt|assert)\s*\(",
        "report with Status",
        lambda path: path.startswith("simt/"),
    ) + [
        violation
        for path in cpp_files(root)
        if not path.is_relative_to(root / "csrc" / "simt")
        for violation in matches(
            root, path, cpp_code(path, keep_strings=True), r'"[^"\n]*\b(trap|exit);', "report with Status"
        )
    ]


@rule
def only_glue_raises(root: Path) -> list[str]:
    """Launchers and kernels return Status; the glue, and the host module, turn it into an exception."""
    return code_matches(
        root,
        r"\bthrow\b|\b\w*TORCH_CHECK\w*",
        "return Status::error",
        lambda path: is_glue(path) or is_host(path) or path.startswith("simt/"),
    )


@rule
def nothing_synchronizes_or_allocates(root: Path) -> list[str]:
    """Ops run on the caller's stream and in torch's memory; a hidden synchronisation breaks graph capture."""
    pattern = (
        r"\bcuda(Device|Stream|Event|Ctx)Synchronize\b|\bcudaThreadSynchronize\b|\bcudaStream(Default|Legacy|PerThread)\b"
        r"|\bcuda(Malloc|Free|HostAlloc)\w*|\bcudaMem(cpy|set)(2D|3D)?(To\w+|From\w+)?\s*\(|\bcudaDeviceReset\b"
    )
    return code_matches(root, pattern, "use the current stream and torch's allocator", lambda path: False)
