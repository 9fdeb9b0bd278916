"""The example runs as its reader would run it, and finds the same bits on two ranks as on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_densification_on_ranks():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "examples/densification_on_ranks.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stdout and "one process alone: the same bits" in done.stdout
    rows = re.findall(r"^ +[\d.e+]+((?: +0\.\d+ \(0\.\d+\)){3})$", done.stdout, re.MULTILINE)
    coverage = [[float(cell) for cell in re.findall(r"(0\.\d+) \(", row)] for row in rows]
    assert len(coverage) == 4
    assert all(one > two > three > 0 for one, two, three in coverage)
    assert coverage[0][1] > 5 * coverage[3][1]  # density harms where the near slope is 1.5 and the tail light
