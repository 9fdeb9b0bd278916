"""Where the libraries under test lie, and the CMake directory that made them."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenweave_ops
from tokenweave_ops import _library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_python(tmp_path):
    """run_python(code, **environment) -> CompletedProcess of a fresh interpreter outside the source tree."""

    package = str(Path(tokenweave_ops.__file__).parents[1])  # this one, installed or not
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(code: str, *, check: bool = True, **changes: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": search} | changes
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        if check:
            assert process.returncode == 0, process.stderr
        return process

    return run


@pytest.fixture(scope="session")
def library():
    """library(backend) -> path of a library that was built; skips the test if it was not."""

    def find(backend: str) -> Path:
        path = _library.library_path(backend)
        if not path.exists():
            pytest.skip(f"{path.name} was not built")
        return path

    return find


@pytest.fixture(scope="session")
def cmake_directory() -> Path:
    """The CMake directory whose libraries are the ones in use."""
    built = _library.library_path("cpu")
    candidates = [_library.LIBRARY_DIRECTORY.parent, *(ROOT / "build").glob("cmake-*")]
    for directory in candidates:
        made = directory / "lib" / built.name
        if (directory / "CMakeCache.txt").exists() and made.exists() and filecmp.cmp(made, built, shallow=False):
            return directory
    pytest.skip(f"no CMake directory here made {built}")
