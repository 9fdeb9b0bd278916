"""The example runs as its reader would run it, and finds its results equal."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_engine_integration():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "examples/engine_integration.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(.+?) +error against float64 ([\d.]+) \(limit ([\d.]+)\)", done.stdout, re.MULTILINE)
    assert [name for name, *_ in lines] == ["unpatched", "patched", "patched, compiled"]
    for _, error, limit in lines:
        assert 0 < float(error) <= float(limit)
    assert "4 row-parallel GEMMs now write into Workspace" in done.stdout
