"""The GPU check as a whole, on a GPU that is not there: a python that answers for one, and the tables at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Says that there is a GPU, writes the junit file that pytest would, and runs nothing but the tables.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *get_device_name*) echo "NVIDIA Fake 100" ;;
  *gpu_table.py*) exec {python} "$@" ;;
  *--junitxml=*)
    file=$(echo "$*" | sed 's/.*--junitxml=\\([^ ]*\\).*/\\1/')
    echo '<testsuites><testsuite tests="9" failures="'$FAILURES'" errors="0" skipped="2"/></testsuites>' >"$file"
    exit "$FAILURES" ;;
esac
"""
# Answers as compute-sanitizer does, and runs nothing.
FAKE_SANITIZER = """#!/bin/sh
case "$2" in
  memcheck) echo "========= ERROR SUMMARY: $FINDINGS errors"; [ "$FINDINGS" = 0 ] || exit 7 ;;
  racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
  synccheck) echo "$SYNCCHECK" ;;
  *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    def run(parts=None, failures=0, findings=0, synccheck="========= ERROR SUMMARY: 0 errors", has_gpu=True):
        programs = {"python3": FAKE_PYTHON.format(python=sys.executable), "compute-sanitizer": FAKE_SANITIZER}
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python3") if has_gpu else sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "REPORT": str(tmp_path / "report"),
            "RESULTS": str(tmp_path / "results"),
            "FAILURES": str(failures),
            "FINDINGS": str(findings),
            "SYNCCHECK": synccheck,
        }
        environment.pop("PARTS", None)
        if parts:
            environment["PARTS"] = parts
        command = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    return run


def lines(text, word):
    return [line for line in text.splitlines() if word in line]


def test_every_family_has_a_line_of_what_was_found(check):
    done = check(parts="tests sanitize")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    table = done.stdout[done.stdout.index("Families on this GPU") :]
    for family in ("allreduce_rmsnorm", "anchor_decoding", "sinr_field"):
        (line,) = [line for line in lines(table, family) if "passed" in line]
        assert "7 passed, 2 skipped" in line and line.count("clean") == 4
    assert "bench" not in table


def test_a_failure_or_a_finding_is_shown_and_fails_the_whole(check):
    done = check(parts="tests sanitize", failures=1, findings=3)
    assert done.returncode == 1
    assert "6 passed, 1 FAILED, 2 skipped" in done.stdout and "3 FOUND" in done.stdout
    assert lines(done.stdout, "memcheck sinr_field")[-1].strip().endswith("FAILED (exit 7)")
    assert "steps failed." in done.stdout


@pytest.mark.parametrize(
    ("said", "shown"), [("cut off", "NO SUMMARY"), ("========= ERROR SUMMARY: 2 errors", "2 FOUND")]
)
def test_a_sanitizer_that_ends_well_must_have_said_that_it_found_nothing(check, said, shown):
    done = check(parts="sanitize", synccheck=said)
    assert done.returncode == 1 and shown in done.stdout and "families are not clean." in done.stdout


def test_parts_of_several_calls_add_up(check):
    assert check(parts="tests", failures=1).returncode == 1
    done = check(parts="tests")  # again: the new result counts
    assert done.returncode == 0 and "not run" in done.stdout
    done = check(parts="sanitize")
    assert done.returncode == 0 and "7 passed" in done.stdout and "clean" in done.stdout
    done = check()  # all of it: nothing of before is told again
    assert done.returncode == 0 and "bench sinr_field" in done.stdout and "densification verify" in done.stdout


def test_without_a_gpu_it_says_so(check):
    done = check(has_gpu=False)
    assert done.returncode == 1 and "error: no GPU that" in done.stdout
