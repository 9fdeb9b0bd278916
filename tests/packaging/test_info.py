"""python -m tokenweave_ops.info: what was built and what is missing, whatever is missing."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenweave_ops
from tokenweave_ops import _library, info

COLLECT = "from tokenweave_ops import info; info.main(['--json'])"


def test_json_states_what_was_built_and_what_loads():
    printed = subprocess.run(
        [sys.executable, "-m", "tokenweave_ops.info", "--json"], capture_output=True, text=True, check=True
    ).stdout
    facts = json.loads(printed)
    assert facts["version"] == tokenweave_ops.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["backends"]["cpu"] == "loaded"
    build = facts["build"]
    assert build == _library.build_info()
    assert build["version"] == tokenweave_ops.__version__
    assert "libtokenweave_cpu.so" in build["libraries"]
    assert (build["nvcc"] is None) == ("libtokenweave_cuda.so" not in build["libraries"])
    assert (build["no_cuda_reason"] is None) == bool(build["cuda_architectures"])
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["gpu_note"] is None or facts["gpu_note"].endswith(".")


def test_the_table_has_a_line_for_each_fact(capsys):
    assert info.main([]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["cpu kernels"].strip() == "loaded"
    assert {"python", "tokenweave-ops", "built from", "built with", "built", "CUDA"} <= lines.keys()


def test_without_any_library_it_says_so(run_python, tmp_path):
    facts = json.loads(run_python(COLLECT, TOKENWEAVE_LIBRARY_DIR=str(tmp_path)).stdout)
    assert facts["build"] == {}
    assert "has not been built" in facts["backends"]["cpu"]
    assert "pip install --no-build-isolation ." in facts["cuda_note"]


def test_without_a_gpu_it_says_why(run_python):
    facts = json.loads(run_python(COLLECT, CUDA_VISIBLE_DEVICES="").stdout)
    assert facts["gpus"] == []
    assert facts["gpu_note"].startswith(("torch sees no GPU", f"torch {torch.__version__} is a build without CUDA"))


def test_without_torch_it_gives_the_command(tmp_path):
    # -S: no site-packages. The file itself, because the package cannot be imported without torch.
    process = subprocess.run(
        [sys.executable, "-S", str(Path(info.__file__)), "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout)
    assert facts["torch"] is None
    assert "run `pip install torch==2.14.1`" in facts["error"]


@pytest.mark.parametrize(
    ("architectures", "capability", "target"),
    [
        (["sm_90", "compute_90"], (9, 0), "sm_90"),
        (["sm_90", "compute_90"], (10, 0), "compute_90"),  # a newer GPU: PTX, compiled by the driver
        (["sm_90"], (10, 0), None),  # machine code does not cross a major version
        (["sm_90", "compute_90"], (8, 9), None),
        (["sm_100"], (10, 3), "sm_100"),  # but runs on a later minor version
        (["sm_103"], (10, 0), None),
        (["sm_90a", "compute_90a"], (9, 0), "sm_90a"),
        (["compute_90a"], (10, 0), None),  # a feature set is for one architecture only
        (["sm_90", "sm_100", "compute_100"], (10, 0), "sm_100"),
        (["compute_90", "compute_100"], (12, 0), "compute_100"),
        ([], (9, 0), None),
    ],
)
def test_a_device_is_compared_with_what_was_built(architectures, capability, target):
    assert info.native_architecture(architectures, capability) == target


def test_a_gpu_that_no_kernel_was_built_for_is_called_unsupported():
    build = {"cuda_architectures": ["sm_90"]}
    gpus = [{"runs": None}]
    assert "built for sm_90, which no GPU here can run" in info._cuda_note(build, {"cuda": "loaded"}, gpus, None)
    assert info._target_note(None, ["sm_90"]) == "not supported: kernels were built for sm_90"
