import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_example():
    """run_example("name.py"): what it prints, run as its reader would run it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": path}

    def run(name: str) -> str:
        command = [sys.executable, f"examples/{name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
