"""A wheel is built, opened, installed into a clean environment, and the README's quickstart is run from there."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tokenweave_ops import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(cmake_directory, tmp_path_factory) -> Path:
    """A release wheel of CPU kernels, from a copy of the sources; the objects of the build at hand are reused."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree beside the tests")
    output = tmp_path_factory.mktemp("wheel")
    settings = {
        "TOKENWEAVE_BUILD_DIR": str(cmake_directory),
        "TOKENWEAVE_CUDA": "0",
        "TOKENWEAVE_TEST_BUILD": "0",
        "PIP_NO_INDEX": "1",
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(output), str(ROOT)]
    process = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (made,) = output.iterdir()
    return made


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_fits_every_python_3(wheel):
    assert wheel.name == f"tokenweave_ops-{__version__}-py3-none-linux_{platform.machine()}.whl"


def test_the_wheel_holds_the_release_libraries_and_no_other(names):
    libraries = {name for name in names if ".so" in name}
    assert libraries == {"tokenweave_ops/lib/libtokenweave_cpu.so"}


def test_the_wheel_holds_both_packages_whole(names):
    for package, source in (("tokenweave_ops", ROOT), ("tokenweave_models", ROOT / "python")):
        modules = {str(path.relative_to(source)) for path in (source / package).rglob("*.py")}
        assert modules
        assert modules == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}


def test_the_wheel_holds_nothing_of_the_build(names):
    information = f"tokenweave_ops-{__version__}.dist-info/"
    packages = ("tokenweave_ops/", "tokenweave_models/", information)
    assert not [name for name in names if not name.startswith(packages)]
    endings = {Path(name).suffix for name in names if not name.startswith(information)}
    assert endings <= {".py", ".so", ".json", ".typed"}
    assert {"tokenweave_ops/py.typed", "tokenweave_ops/lib/_build_info.json"} <= set(names)
    assert any(name.startswith(information) and name.endswith("/LICENSE") for name in names)


def test_the_wheel_states_its_needs(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"tokenweave_ops-{__version__}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    required = re.findall(r"^Requires-Dist: (\S+)", metadata.replace(" ;", ";"), re.M)
    assert [name for name in required if ";" not in name] == ["torch>=2.11", "numpy"]


def test_the_wheel_records_its_build(wheel):
    info = json.loads(zipfile.ZipFile(wheel).read("tokenweave_ops/lib/_build_info.json"))
    assert info["version"] == __version__
    assert info["libraries"] == ["libtokenweave_cpu.so"]
    assert info["no_cuda_reason"] == "TOKENWEAVE_CUDA=0 asked for CPU kernels only"
    assert info["test_build"] is False


def test_the_quickstart_runs_in_a_clean_environment(wheel, tmp_path):
    quickstart = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert quickstart, "README.md has no ```python block"
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)  # all that pip does for a wheel without scripts and headers
    # torch and numpy from the outer environment, which may hold an (editable) tokenweave_ops: the wheel's comes first.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = f"{quickstart[1]}\nimport tokenweave_ops\nprint(tokenweave_ops.__file__)\n"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TOKENWEAVE", "PYTHON"))}
    process = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == str(site / "tokenweave_ops" / "__init__.py")
    shutil.rmtree(environment)
