"""What was built, for what, what is visible now, and why CUDA kernels are absent if they are.

``python -m tokenweave_ops.info [--json]``
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence


def native_architecture(architectures: Sequence[str], capability: tuple[int, int]) -> str | None:
    """The best of the built targets that runs on a device: machine code first, else PTX for the driver to compile.

    Machine code for sm_XY runs on X.Z with Z >= Y; PTX for compute_XY on everything from X.Y up; a feature set such as
    sm_90a or compute_90a on exactly 9.0 (sm_100f: on its family, taken here as the same major version).
    """
    best = None
    for target in architectures:
        kind, major, minor, feature = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target).groups()
        built = int(major), int(minor)
        if feature == "a":
            runs = built == capability
        elif kind == "sm" or feature == "f":
            runs = built[0] == capability[0] and built[1] <= capability[1]
        else:
            runs = built <= capability
        # Machine code beats PTX; among equals, the closest to the device.
        if runs and (best is None or (kind == "sm", built) > best[0]):
            best = (kind == "sm", built), target
    return best[1] if best else None


def _gpus(torch, architectures: Sequence[str]) -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        target = native_architecture(architectures, (properties.major, properties.minor))
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "runs": target,
                "note": _target_note(target, architectures),
            }
        )
    return found


def _target_note(target: str | None, architectures: Sequence[str]) -> str:
    if target is None:
        built = f"kernels were built for {', '.join(architectures)}" if architectures else "no CUDA kernels were built"
        return f"not supported: {built}"
    return f"runs {target}" + (" (compiled by the driver at first use)" if target.startswith("compute") else "")


def _gpu_note(torch) -> str | None:
    """Why there is no GPU to use; None if there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA."
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first_sentence = str(error).split(". ")[0].strip().rstrip(".")
        return f"torch sees no GPU: {first_sentence}."
    return "torch sees no GPU."


def _cuda_note(build: dict, backends: dict[str, str], gpus: list[dict], gpu_note: str | None) -> str:
    """One sentence on whether CUDA kernels can run here, and if not, why."""
    if backends.get("cuda") != "loaded":
        return backends.get("cuda", "CUDA kernels were not loaded.")
    if not gpus:
        return f"CUDA kernels are built and loaded, but {gpu_note}"
    usable = [gpu for gpu in gpus if gpu["runs"]]
    if not usable:
        return f"CUDA kernels are built for {', '.join(build['cuda_architectures'])}, which no GPU here can run."
    return f"CUDA kernels run on {len(usable)} of {len(gpus)} GPUs."


def collect() -> dict:
    """All facts, as plain values. Never raises for a missing torch, library or GPU: it says what is missing."""
    facts: dict = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    try:
        import torch
    except ImportError as error:
        sentence = f"torch cannot be imported ({error}): run `pip install torch==2.14.1`."
        return facts | {"torch": None, "error": sentence}

    import tokenweave_ops
    from tokenweave_ops import _library

    build = _library.build_info()
    backends = _library.status()
    gpus, gpu_note = _gpus(torch, build.get("cuda_architectures", [])), _gpu_note(torch)
    return facts | {
        "version": tokenweave_ops.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": build,
        "library_directory": str(_library.LIBRARY_DIRECTORY),
        "backends": backends,
        "gpus": gpus,
        "gpu_note": gpu_note,
        "cuda_note": _cuda_note(build, backends, gpus, gpu_note),
    }


def _table(facts: dict) -> str:
    rows = [("python", f"{facts['python']}, {facts['machine']}")]
    if facts["torch"] is None:
        return _align([*rows, ("torch", facts["error"])])
    build = facts["build"]
    rows += [("tokenweave-ops", facts["version"]), ("torch", facts["torch"]), ("libraries", facts["library_directory"])]
    if build:
        extras = ["test build"] * build["test_build"] + [build["sanitize"]] * bool(build["sanitize"])
        rows += [
            ("built from", f"{build['version']}, commit {build['git_commit'] or 'unknown'}"),
            ("built with", f"torch {build['torch']}, {build['compiler']}"),
            ("built for CUDA", _built_for_cuda(build)),
            ("built", ", ".join([*build["libraries"], *extras])),
        ]
    else:
        rows.append(("built", "nothing recorded"))
    rows += [(f"{name} kernels", status) for name, status in facts["backends"].items()]
    rows += [("gpu", f"{gpu['name']}, capability {gpu['capability']}: {gpu['note']}") for gpu in facts["gpus"]]
    if facts["gpu_note"]:
        rows.append(("gpu", facts["gpu_note"]))
    return _align([*rows, ("CUDA", facts["cuda_note"])])


def _built_for_cuda(build: dict) -> str:
    if build["nvcc"] is None:
        return f"no: {build['no_cuda_reason']}"
    return f"{', '.join(build['cuda_architectures'])}, nvcc {build['nvcc']}"


def _align(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenweave_ops.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
