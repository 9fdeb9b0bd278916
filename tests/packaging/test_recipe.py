"""CONTRIBUTING's 'How to add an op' cannot rot: its commands are run in a copy of the tree, the new op is tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenweave_ops import testing

ROOT = Path(__file__).resolve().parents[2]

# What the new op builds on. The other families stay behind, so that the build is short.
SHARED = [
    *("CMakeLists.txt", "cmake", "csrc/core", "csrc/simt", "csrc/torch", "csrc/host", "tests/conftest.py"),
    *("tokenweave_ops/_library.py", "tokenweave_ops/testing.py", "tokenweave_ops/reference/__init__.py"),
]
TEMPLATE = ["csrc/template_op", "tests/template_op", "bench/template_op.py"]
TEMPLATE += ["tokenweave_ops/template_op.py", "tokenweave_ops/reference/template_op.py"]


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_into(tree: Path, names: list[str]) -> None:
    for name in names:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def recipe_commands() -> str:
    """The shell block of step 1, with its three example words replaced."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```sh\n(family=my_family.*?)```", text, re.DOTALL)
    for old, new in (("=my_family", "=tinted_op"), ("=my_op", "=tint_rows"), ("=MyOp", "=TintRows")):
        assert old in block, f"step 1 of the recipe no longer says {old}"
        block = block.replace(old, new)
    return block


def test_the_recipe_makes_an_op_that_builds_and_passes_its_tests(tmp_path):
    if testing.load_simt() != "loaded":
        pytest.skip("the copy is built as a test build, and this is none")
    copy_into(tmp_path, SHARED + TEMPLATE)
    run(["sh", "-ec", recipe_commands()], cwd=tmp_path)
    for name in TEMPLATE:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = [
        p for p in tmp_path.rglob("*") if p.is_file() and re.search("template_op|scale_rows|ScaleRows", p.read_text())
    ]
    assert left == [], f"the template's names are left in {left}"
    # Step 2: the package imports the family.
    (tmp_path / "tokenweave_ops/__init__.py").write_text(
        "from tokenweave_ops import _library, tinted_op\n\n_library.load_libraries()\n"
    )

    build = tmp_path / "build"
    torch_home = Path(torch.__file__).parent
    include = f"{torch_home}/include;{torch_home}/include/torch/csrc/api/include"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKENWEAVE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run(
        [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(tmp_path),
            "-B",
            str(build),
            "-DTOKENWEAVE_TEST_BUILD=ON",
            f"-DTOKENWEAVE_TORCH_INCLUDE={include}",
            f"-DTOKENWEAVE_TORCH_LIB={torch_home}/lib",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        env=environment,
    )
    run(["ninja", "-C", str(build)], env=environment)
    report = run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "tests/tinted_op"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path), "TOKENWEAVE_LIBRARY_DIR": str(build / "lib")},
    )
    # Every test but the CUDA ones ran: 23 on each of two backends, and the plan's.
    passed = int(report.split(" passed")[0].split()[-1])
    assert passed == 2 * 23 + 1, report
