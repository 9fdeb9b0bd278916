#!/usr/bin/env python3
"""The last page of scripts/gpu_check.sh: steps, a line for each family (tests, what every sanitizer found), and every
bench row. From the files that its steps left, so that steps of several calls add up.

    python scripts/gpu_table.py build/gpu-check bench/results/nvidia-h100

Exits with 1 if a step failed, or a sanitizer found something or did not say what.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import report  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def steps(folder: Path) -> list[list[str]]:
    """Name, seconds and state; a step that was run again replaces what it said before."""
    path = folder / "steps.tsv"
    lines = path.read_text().splitlines() if path.exists() else []
    return list({line.split("\t")[0]: line.split("\t") for line in lines}.values())


def tests(path: Path) -> str:
    """Of a junit file."""
    if not path.exists():
        return "not run"
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    said = [
        f"{passed} passed",
        *[f"{bad} FAILED"] * bool(bad),
        *[f"{counts['skipped']} skipped"] * bool(counts["skipped"]),
    ]
    return ", ".join(said)


def findings(path: Path) -> str:
    """Of a sanitizer's output: how many it counted, over all processes it watched."""
    if not path.exists():
        return "not run"
    counted = SUMMARY.findall(path.read_text(errors="replace"))
    if not counted:
        return "NO SUMMARY"
    total = sum(map(int, counted))
    return f"{total} FOUND" if total else "clean"


def families(folder: Path) -> list[list[str]]:
    names = {path.stem.split("_", 1)[1] for path in folder.glob("tests_*.xml")}
    names |= {path.stem.split("_", 1)[1] for tool in TOOLS for path in folder.glob(f"{tool}_*.log")}
    return [
        [name, tests(folder / f"tests_{name}.xml"), *(findings(folder / f"{tool}_{name}.log") for tool in TOOLS)]
        for name in sorted(names)
    ]


def main(folder: Path, results: Path) -> int:
    terminal = Terminal()
    for path in sorted(results.glob("*.json")):
        report.print_tables(report.load(path), terminal)
    found = families(folder)
    bad = [any(word in cell for cell in row[1:] for word in ("FAILED", "FOUND", "NO SUMMARY")) for row in found]
    if found:
        terminal.table("Families on this GPU", ["case", "tests", *TOOLS], found, bad)
    done = steps(folder)
    failed = ["FAILED" in state for _, _, state in done]
    terminal.table("Steps", ["case", "s", "state"], done, failed)
    if any(failed):
        terminal.print(f"{sum(failed)} of {len(done)} steps failed.")
    if any(bad):
        terminal.print(f"{sum(bad)} of {len(found)} families are not clean.")
    return int(any(failed) or any(bad))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
