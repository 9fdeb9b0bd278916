"""run.py as a user starts it, on a small family of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import harness, run

ROOT = Path(__file__).resolve().parents[2]

FAMILY = """
import os
from functools import partial

import torch

from bench.harness import Case, Contestant, fill_values
from bench.machines import Buffer, Limit


def cases(device, quick):
    factor = float(os.environ.get("FACTOR", "2"))
    sizes = (4,) if quick else (4, 8)
    return [
        Case(
            family="tiny", op="double", case=f"{rows}x1024", dtype=torch.float32,
            buffers={"x": Buffer((rows, 1024), torch.float32, fill_values), "out": Buffer((rows, 1024), torch.float32)},
            contestants=[
                Contestant("ours", "mul", lambda b: partial(torch.mul, b["x"], factor, out=b["out"]), {"y": "out"}),
                Contestant("eager", "add", lambda b: partial(torch.add, b["x"], b["x"], out=b["out"]), {"y": "out"}),
            ],
            reference=lambda inputs: {"y": 2 * inputs["x"]}, tolerance=1e-6, bytes=8 * rows * 1024, flops=rows * 1024,
            limit=Limit("copy", ("x", "out")),
        )
        for rows in sizes
    ]
"""


@pytest.fixture
def families(tmp_path):
    directory = tmp_path / "families"
    directory.mkdir()
    (directory / "tiny.py").write_text(FAMILY)
    (directory / "helper.py").write_text("VALUE = 1\n")
    return directory


def start(*arguments, **environment):
    import os

    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


# The real machine's caches decide how much memory a run touches: keep the test small and quick everywhere.
SMALL = {"TOKENWEAVE_BENCH_CACHE_BYTES": str(1 << 20)}


def test_quick_run_writes_a_valid_file_and_a_table(families, tmp_path):
    result = tmp_path / "out" / "result.json"
    done = start("--families", families, "--quick", "--json", result, **SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    doc = json.loads(result.read_text())
    harness.validate(doc)
    assert [(row["family"], row["op"], row["case"], row["ok"]) for row in doc["rows"]] == [
        ("tiny", "double", "4x1024", True)
    ] * len(doc["rows"])
    assert all(row["us"] > 0 and row["baselines"]["eager"] > 0 for row in doc["rows"])
    assert doc["env"]["device"] == "cpu" and doc["machine"]["copy_gb_per_s"] > 0 and 0 <= doc["env"]["other_load"] <= 1
    assert "double on cpu" in done.stdout and "4x1024" in done.stdout and " eager " in done.stdout
    plotted = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "plot.py"), str(result)], capture_output=True, text=True, timeout=120
    )
    assert plotted.returncode == 0, plotted.stderr
    assert result.with_suffix(".png").stat().st_size > 10_000


def test_a_wrong_kernel_fails_the_run_and_has_no_speed(families, tmp_path):
    result = tmp_path / "result.json"
    done = start("--families", families, "--quick", "--json", result, FACTOR="2.5", **SMALL)
    assert done.returncode == 1 and "wrong" in done.stdout
    (row,) = json.loads(result.read_text())["rows"]
    assert row["ok"] is False and row["us"] is None


def test_unknown_names_are_answered_with_the_known_ones(families):
    done = start("--families", families, "--family", "tinny")
    assert done.returncode == 1 and "no family 'tinny'; there are: tiny" in done.stderr
    done = start("--families", families, "--op", "triple")
    assert done.returncode == 1 and "no case of op 'triple'; there are: double" in done.stderr


def test_every_family_file_is_found_and_nothing_else(families):
    assert list(run.find_families(families)) == ["tiny"]
    assert "allreduce_rmsnorm" in run.find_families(ROOT / "bench")
    assert not {"harness", "run", "plot", "report", "timing"} & set(run.find_families(ROOT / "bench"))


def test_the_cases_of_the_first_family_are_those_promised():
    module = run.load_family(ROOT / "bench" / "allreduce_rmsnorm.py")
    full = [case for case in module.cases("cpu", quick=False) if "call" not in case.op]
    for op in ("add_rms_norm_", "rms_norm"):
        shapes = {case.case for case in full if case.op == op}
        assert shapes == {f"{t}x{h}" for t in (1, 16, 64, 256, 1024, 4096) for h in (4096, 8192)}
    (add,) = [case for case in full if case.op == "add_rms_norm_" and case.case == "64x4096"]
    assert add.bytes == (4 * 64 * 4096 + 4096) * 2
    assert [c.name for c in add.contestants] == ["tokenweave", "eager", "compile", "torch_rms_norm"]
    assert len(module.cases("cpu", quick=True)) < len(full) / 2
    assert "32768x8192" in {case.case for case in module.cases("cuda", quick=False)}
