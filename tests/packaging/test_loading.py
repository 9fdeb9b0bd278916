"""Importing with no library, with a stale one, and with CUDA kernels but no GPU: a sentence, never a crash."""

import json
import subprocess

import pytest
import torch

from tokenweave_ops import _library

CALL = """
import torch, tokenweave_ops
x = torch.ones(2, 8)
try:
    tokenweave_ops.rms_norm(x, torch.ones(8))
except RuntimeError as error:
    print(error)
"""
STALE = r"""
extern "C" __attribute__((visibility("default"))) const char* tokenweave_schemas() { return R"(%s)"; }
extern "C" __attribute__((visibility("default"))) void tokenweave_register() { __builtin_trap(); }
"""


def test_without_a_library_import_works_and_a_call_says_what_to_do(run_python, tmp_path):
    printed = run_python(CALL, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout
    assert "libtokenweave_cpu.so has not been built" in printed
    assert "pip install --no-build-isolation ." in printed
    assert len(printed.strip().splitlines()) == 1


def test_the_reason_for_no_cuda_kernels_reaches_the_status(run_python, tmp_path):
    (tmp_path / "_build_info.json").write_text(json.dumps({"no_cuda_reason": "no nvcc was found."}))
    code = "from tokenweave_ops import _library; print(_library.status()['cuda'])"
    assert "no nvcc was found" in run_python(code, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout


def test_a_stale_library_says_rebuild_and_registers_nothing(run_python, tmp_path):
    schemas = dict(_library._schemas)
    schemas["rms_norm"] = schemas["rms_norm"].replace("float eps", "int eps")
    assert schemas != _library._schemas
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(tmp_path / "libtokenweave_cpu.so")],
        input=STALE % "\n".join(schemas.values()), text=True, check=True,
    )  # fmt: skip
    printed = run_python(CALL, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout
    assert "libtokenweave_cpu.so is stale, rebuild it (pip install --no-build-isolation .)" in printed
    assert schemas["rms_norm"] in printed


def test_a_file_that_is_no_library_says_rebuild(run_python, tmp_path):
    (tmp_path / "libtokenweave_cpu.so").write_text("not a library")
    assert (
        "libtokenweave_cpu.so cannot be loaded, rebuild it"
        in run_python(CALL, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout
    )


def test_cuda_kernels_load_and_register_without_a_gpu(run_python, library):
    library("cuda")
    if torch.version.cuda is None:
        pytest.skip("torch is a build without CUDA")
    code = """
import torch, tokenweave_ops
from tokenweave_ops import _library
assert not torch.cuda.is_available()
print(_library.status()["cuda"])
names = _library._schemas
print(all(torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenweave::{name}", "CUDA") for name in names), len(names))
"""
    loaded, registered = run_python(code, CUDA_VISIBLE_DEVICES="").stdout.splitlines()
    assert loaded == "loaded"
    assert registered == f"True {len(_library._schemas)}"


def test_cuda_kernels_under_a_torch_without_cuda_are_a_sentence(run_python, tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("torch is a build with CUDA")
    (tmp_path / "libtokenweave_cuda.so").write_text("never opened")
    code = "from tokenweave_ops import _library; print(_library.status()['cuda'])"
    assert "needs a CUDA build of torch" in run_python(code, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout


def test_a_torch_that_is_too_old_is_one_sentence():
    with pytest.raises(ImportError, match=r"tokenweave_ops needs torch >= 2\.11, but torch is 2\.10\.1\+cpu\."):
        _library._check_torch_version("2.10.1+cpu")
    _library._check_torch_version("2.11.0a0+git123")
    _library._check_torch_version("3.0.0")


def test_no_torch_is_one_sentence(run_python):
    code = """
import sys
sys.modules["torch"] = None  # what Python makes of a module that cannot be found
try:
    import tokenweave_ops
except ImportError as error:
    print(error)
"""
    assert run_python(code).stdout == "tokenweave_ops needs torch >= 2.11: pip install torch\n"
