"""build_support.py: every refusal is one sentence that says what to do, and every choice is the documented one."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

import build_support
from build_support import BuildError, Nvcc, Torch

CUDA_TORCH = Torch("2.14.1+cu130", "13.0", Path("/t"))
CPU_TORCH = Torch("2.13.0+cpu", None, Path("/t"))
NVCC = Nvcc(Path("/cuda/bin/nvcc"), (13, 0))
KNOWN = ("sm_90", "sm_100", "sm_120")


def make_executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make_nvcc(path: Path, version: str) -> Path:
    return make_executable(path, f'echo "Cuda compilation tools, release {version}, V{version}.88"')


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# ------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("9.0", ("sm_90",)),
        ("9.0a", ("sm_90a",)),
        ("9.0+PTX", ("sm_90", "compute_90")),
        ("9.0 10.0", ("sm_90", "sm_100")),
        ("9.0;10.0a+PTX", ("sm_90", "sm_100a", "compute_100a")),
        (" 9.0, 12.0f ", ("sm_90", "sm_120f")),
        ("9.0;9.0+PTX", ("sm_90", "compute_90")),
    ],
)
def test_architectures_are_read_in_torchs_forms(text, targets):
    assert build_support.parse_architectures(text, KNOWN) == (targets, [])


def test_architectures_older_than_hopper_are_left_out_and_named():
    assert build_support.parse_architectures("8.0;8.6+PTX;9.0", KNOWN) == (("sm_90",), ["8.0", "8.6+PTX"])


@pytest.mark.parametrize("text", ["Hopper", "9", "sm_90", "9.0x", "9.0+SASS", "native"])
def test_an_unknown_architecture_is_named(text):
    with pytest.raises(BuildError, match=f"unknown architecture '{re.escape(text)}'") as error:
        build_support.parse_architectures(f"9.0;{text}", KNOWN)
    assert "9.0+PTX" in one_sentence(error)


def test_only_old_architectures_says_what_is_the_least():
    with pytest.raises(BuildError, match=r"8\.0, 8\.6 only, but these kernels need 9\.0 \(sm_90, Hopper\)") as error:
        build_support.parse_architectures("8.0;8.6", KNOWN)
    one_sentence(error)


def test_an_architecture_that_nvcc_lacks_lists_those_it_has():
    with pytest.raises(BuildError, match=r"has 13\.0, but this nvcc only knows sm_90, sm_100, sm_120") as error:
        build_support.parse_architectures("13.0", KNOWN)
    one_sentence(error)


def test_gencode_groups_machine_code_and_ptx_of_one_architecture():
    assert build_support.gencode(("sm_90", "compute_90", "sm_100a")) == [
        "arch=compute_90,code=[sm_90,compute_90]",
        "arch=compute_100a,code=[sm_100a]",
    ]


# ----------------------------------------------------------------------------------------------- TOKENWEAVE_CUDA, jobs


@pytest.mark.parametrize(
    ("choice", "nvcc", "torch", "reason"),
    [
        ("auto", NVCC, CUDA_TORCH, ""),
        ("1", NVCC, CUDA_TORCH, ""),
        ("0", NVCC, CUDA_TORCH, "TOKENWEAVE_CUDA=0 asked for CPU kernels only"),
        ("auto", NVCC, CPU_TORCH, r"torch 2\.13\.0\+cpu is a build without CUDA"),
        ("auto", None, CUDA_TORCH, "no nvcc was found"),
        ("auto", Nvcc(Path("/old/nvcc"), (11, 8)), CUDA_TORCH, r"nvcc 11\.8 \(/old/nvcc\) is older than 12\.4"),
    ],
)
def test_cuda_kernels_are_built_or_the_reason_is_told(choice, nvcc, torch, reason):
    answer = build_support.decide_cuda(choice, nvcc, torch)
    assert re.match(reason, answer) if reason else answer == ""


@pytest.mark.parametrize(
    ("nvcc", "torch", "reason"), [(None, CUDA_TORCH, "no nvcc"), (NVCC, CPU_TORCH, "without CUDA")]
)
def test_cuda_asked_for_but_impossible_is_an_error(nvcc, torch, reason):
    with pytest.raises(BuildError, match=f"TOKENWEAVE_CUDA=1, but .*{reason}") as error:
        build_support.decide_cuda("1", nvcc, torch)
    one_sentence(error)


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENWEAVE_CUDA", "yes"), ("TOKENWEAVE_CUDA", "2"), ("TOKENWEAVE_TEST_BUILD", "true")]
)
def test_a_setting_with_another_value_is_an_error(name, value):
    with pytest.raises(BuildError, match=f"{name} must be one of .*; it is '{value}'") as error:
        build_support.make_plan({name: value, "PATH": os.environ["PATH"]})
    one_sentence(error)


@pytest.mark.parametrize(
    ("environment", "cores", "free_gib", "jobs"),
    [
        ({}, 8, 100.0, 8),
        ({}, 8, 7.9, 3),
        ({}, 8, 0.5, 1),
        ({"MAX_JOBS": "5"}, 2, 1.0, 5),
        ({"MAX_JOBS": ""}, 2, 9.0, 2),
    ],
)
def test_jobs_fit_cores_and_memory_unless_told(environment, cores, free_gib, jobs):
    assert build_support.choose_jobs(environment, cores, free_gib)[0] == jobs


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_max_jobs_must_be_a_positive_number(value):
    with pytest.raises(BuildError, match=f"MAX_JOBS must be a positive number; it is '{value}'"):
        build_support.choose_jobs({"MAX_JOBS": value}, 2, 8.0)


# ---------------------------------------------------------------------------------------------- what this machine has


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_another_platform_is_refused(system, machine):
    with pytest.raises(BuildError, match=f"this is {system} on {machine}") as error:
        build_support.check_platform(system, machine)
    assert "Linux on x86_64 and aarch64" in one_sentence(error)


def test_no_torch_gives_the_two_commands(monkeypatch):
    monkeypatch.setattr(build_support.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError) as error:
        build_support.find_torch()
    command = "`pip install torch==2.14.1 'setuptools>=77' cmake ninja`, then `pip install --no-build-isolation .`"
    assert command in one_sentence(error)


def test_the_commands_name_the_pinned_torch():
    pinned = (build_support.ROOT / "requirements" / "dev.txt").read_text()
    assert re.search(r"^torch==.*$", pinned, re.M)[0] in build_support.INSTALL_COMMANDS


def test_an_old_setuptools_is_one_sentence():
    with pytest.raises(BuildError, match=r"setuptools 77 or newer, and 65\.5\.0 is installed") as error:
        build_support.check_setuptools("65.5.0")
    assert "`pip install 'setuptools>=77'`" in one_sentence(error)
    build_support.check_setuptools(f"{build_support.MINIMUM_SETUPTOOLS}.0.1.post2")
    assert f"setuptools>={build_support.MINIMUM_SETUPTOOLS}" in (build_support.ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0"])
def test_an_old_torch_is_refused(tmp_path, version):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    with pytest.raises(BuildError, match=rf"needs torch 2\.11 or newer, and torch {re.escape(version)}"):
        build_support.read_torch(tmp_path)


@pytest.mark.parametrize(
    ("version", "cuda"), [("2.11.0+cu130", "13.0"), ("2.14.1+cpu", None), ("3.0.0a0+git1", "13.0")]
)
def test_torch_is_read_from_its_files(tmp_path, version, cuda):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\ncuda = {cuda!r}\n")
    assert build_support.read_torch(tmp_path) == Torch(version, cuda, tmp_path)


def test_no_compiler_is_one_sentence(tmp_path):
    with pytest.raises(
        BuildError, match=r"No C\+\+ compiler was found \(looked for c\+\+, g\+\+, clang\+\+\)"
    ) as error:
        build_support.find_compiler({"PATH": str(tmp_path)})
    one_sentence(error)


def test_an_old_compiler_is_one_sentence(tmp_path):
    make_executable(tmp_path / "g++", 'case "$*" in --version) echo "g++ 7.5.0";; *) exit 1;; esac')
    with pytest.raises(BuildError, match=r"g\+\+ \(g\+\+ 7\.5\.0\) does not compile C\+\+20") as error:
        build_support.find_compiler({"PATH": str(tmp_path)})
    one_sentence(error)


def test_cxx_names_the_compiler(tmp_path):
    chosen = make_executable(tmp_path / "my-c++", "echo my compiler")
    assert build_support.find_compiler({"CXX": str(chosen), "PATH": "/usr/bin"}) == (str(chosen), "my compiler")


def test_nvcc_is_searched_in_the_documented_order(tmp_path):
    places = [
        make_nvcc(tmp_path / "home" / "bin" / "nvcc", "13.5"),
        make_nvcc(tmp_path / "cudacxx" / "nvcc-13.4", "13.4"),
        make_nvcc(tmp_path / "path" / "nvcc", "13.3"),
        make_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", "13.2"),
    ]
    environment = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDACXX": str(places[1]),
        "PATH": str(tmp_path / "path") + ":/bin",
    }
    sites = [str(tmp_path / "empty"), str(tmp_path / "site")]
    for minor, place in zip((5, 4, 3, 2), places, strict=True):
        assert build_support.find_nvcc(environment, sites) == Nvcc(place, (13, minor))
        place.unlink()
    assert build_support.nvcc_candidates(environment, sites) == [
        tmp_path / "home" / "bin" / "nvcc",
        Path("/usr/local/cuda/bin/nvcc"),
    ]


def test_an_nvcc_that_does_not_run_is_passed_over(tmp_path):
    make_executable(tmp_path / "broken" / "bin" / "nvcc", "exit 1")
    working = make_nvcc(tmp_path / "path" / "nvcc", "12.9")
    environment = {"CUDA_HOME": str(tmp_path / "broken"), "PATH": str(tmp_path / "path") + ":/bin"}
    assert build_support.find_nvcc(environment, []) == Nvcc(working, (12, 9))


def test_a_missing_tool_is_one_sentence(monkeypatch):
    monkeypatch.setattr(build_support.shutil, "which", lambda name, path: None)
    with pytest.raises(BuildError, match="ninja was not found: run `pip install cmake ninja`") as error:
        build_support.find_tool("ninja")
    one_sentence(error)


def test_a_test_build_without_python_headers_is_one_sentence(tmp_path):
    with pytest.raises(BuildError, match=r"needs Python\.h in .*`apt install python3\.\d+-dev`") as error:
        build_support.check_test_build(tmp_path)
    one_sentence(error)


# ------------------------------------------------------------------------------------------------------------- output


def plan(**changes) -> build_support.Plan:
    facts = {
        "torch": CUDA_TORCH, "compiler": "c++", "compiler_version": "c++ 12", "nvcc": NVCC, "no_cuda_reason": "",
        "architectures": ("sm_90", "compute_90"), "test_build": False, "sanitize": "", "jobs": 2, "jobs_reason": "",
    }  # fmt: skip
    return build_support.Plan(**facts | changes)


def test_each_configuration_builds_in_a_directory_of_its_own():
    changes = [
        {}, {"test_build": True}, {"sanitize": "address"}, {"nvcc": None}, {"torch": CPU_TORCH}, {"compiler": "g++"},
        {"architectures": ("sm_90",)},
    ]  # fmt: skip
    assert len({plan(**change).key for change in changes}) == len(changes)
    assert plan(jobs=7).key == plan().key


def test_the_build_says_what_it_builds_and_why():
    assert "sm_90, compute_90 with nvcc 13.0 (/cuda/bin/nvcc)" in build_support.describe(plan())
    text = build_support.describe(plan(nvcc=None, no_cuda_reason="no nvcc was found", jobs_reason="2 cores"))
    assert "CUDA kernels  not built: no nvcc was found\n" in text
    assert "jobs          2 (2 cores)" in text


def test_an_installed_directory_holds_this_build_and_nothing_else(tmp_path):
    made, output = tmp_path / "made", tmp_path / "out"
    made.mkdir()
    output.mkdir()
    (output / "libtokenweave_cuda.so").write_text("of an earlier configuration")
    (made / "libtokenweave_cpu.so").write_text("new")
    build_support.install([made / "libtokenweave_cpu.so"], {"version": "1"}, output)
    assert {path.name for path in output.iterdir()} == {"libtokenweave_cpu.so", "_build_info.json"}
    assert json.loads((output / "_build_info.json").read_text()) == {"version": "1"}


def test_build_info_is_free_of_paths_and_dates():
    text = json.dumps(build_support.build_info(plan(), ["b.so", "a.so"]))
    assert "/" not in text
    assert not re.search(r"20\d\d-\d\d", text)
    assert json.loads(text)["libraries"] == ["a.so", "b.so"]
