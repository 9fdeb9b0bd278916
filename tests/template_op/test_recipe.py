"""CONTRIBUTING's 'How to add an op' cannot rot: the template is copied under a new name, built, and its tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenweave_ops import testing

ROOT = Path(__file__).resolve().parents[2]

# The recipe's renaming: family, op, the op's types.
RENAMES = [("template_op", "tinted_op"), ("scale_rows", "tint_rows"), ("ScaleRows", "TintRows")]

# Every file of an op, by floor.
FILES_OF_AN_OP = [
    "csrc/template_op/scale_rows.h",
    "csrc/template_op/scale_rows.cuh",
    "csrc/template_op/scale_rows.cu",
    "csrc/template_op/scale_rows_cpu.cpp",
    "csrc/template_op/scale_rows_torch.cpp",
    "csrc/template_op/scale_rows_host.cpp",
    "tokenweave_ops/template_op.py",
    "tokenweave_ops/reference/template_op.py",
    "tests/template_op/test_numerics.py",
    "tests/template_op/test_contract.py",
    "tests/template_op/test_compile.py",
    "tests/template_op/test_errors.py",
    "bench/template_op.py",
]

# What the new op builds on and does not touch.
SHARED = ["CMakeLists.txt", "cmake", "csrc/core", "csrc/simt", "csrc/torch", "csrc/host", "tests/conftest.py"]
SHARED_PYTHON = ["_library.py", "testing.py", "reference/__init__.py"]


def rename(text: str) -> str:
    for old, new in RENAMES:
        text = text.replace(old, new)
    return text


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_renamed(tree: Path) -> None:
    for name in FILES_OF_AN_OP:
        target = tree / rename(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename((ROOT / name).read_text()))
    for name in SHARED:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for name in SHARED_PYTHON:
        shutil.copy(ROOT / "tokenweave_ops" / name, tree / "tokenweave_ops" / name)
    # The one line a new family adds to the package; the other families stay behind so that the build is short.
    (tree / "tokenweave_ops" / "__init__.py").write_text(
        "from tokenweave_ops import _library, tinted_op\n\n_library.load_libraries()\n"
    )


def test_the_list_above_is_the_template():
    listed = {ROOT / name for name in FILES_OF_AN_OP}
    assert set((ROOT / "csrc/template_op").iterdir()) <= listed
    assert all(path.exists() for path in listed)


def test_a_copied_template_builds_and_passes_its_tests(tmp_path):
    if testing.load_simt() != "loaded":
        pytest.skip("the copy is built as a test build, and this is none")
    copy_renamed(tmp_path)
    build = tmp_path / "build"
    torch_home = Path(torch.__file__).parent
    include = f"{torch_home}/include;{torch_home}/include/torch/csrc/api/include"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKENWEAVE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run(
        ["cmake", "-G", "Ninja", "-S", str(tmp_path), "-B", str(build), "-DTOKENWEAVE_TEST_BUILD=ON"]
        + [f"-DTOKENWEAVE_TORCH_INCLUDE={include}", f"-DTOKENWEAVE_TORCH_LIB={torch_home}/lib"]
        + [f"-DPython3_EXECUTABLE={sys.executable}"],
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
