#!/usr/bin/env python3
"""Runs the benchmarks: every contestant is checked, then timed interleaved, and compared with limits measured here.

    python bench/run.py                                  all families on the GPU if there is one, else on the CPU
    python bench/run.py --quick --json build/bench.json  a few cases in under a minute, kept for bench/plot.py
    python bench/run.py --family allreduce_rmsnorm --op add_rms_norm_ --device cuda

Exits with 1 if a kernel's result is wrong: such a row prints no speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
# At the end: an installed tokenweave_ops must win over the source tree, which may hold no built library.
sys.path.append(str(BENCH.parent))

import torch  # noqa: E402

from bench import environment, harness, machines, report  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

BUDGET_S = {False: 1.5, True: 0.6}  # of timing per row; quick or not


def find_families(directory: Path) -> dict[str, Path]:
    """Family files are those that define `cases`: a new family is one new file."""
    files = sorted(directory.glob("*.py"))
    return {path.stem: path for path in files if "\ndef cases(" in path.read_text()}


def load_family(path: Path):
    spec = importlib.util.spec_from_file_location(f"bench_family_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if a GPU is visible")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--families", type=Path, default=BENCH, metavar="DIR", help="where the family files are")
    return parser.parse_args(arguments)


def select_cases(options: argparse.Namespace, device: str) -> list[harness.Case]:
    families = find_families(options.families)
    if options.family and options.family not in families:
        raise SystemExit(f"run.py: no family {options.family!r}; there are: {', '.join(families) or 'none'}")
    chosen = [options.family] if options.family else list(families)
    cases = [case for name in chosen for case in load_family(families[name]).cases(device, options.quick)]
    selected = [case for case in cases if options.op in (None, case.op)]
    if not selected:
        ops = ", ".join(dict.fromkeys(case.op for case in cases))
        wanted = (
            f"op {options.op!r}" if options.op else f"family {options.family!r}" if options.family else "any family"
        )
        raise SystemExit(f"run.py: no {'quick ' * options.quick}case of {wanted}; there are: {ops or 'none'}")
    return selected


def main() -> int:
    options = parse_arguments()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run.py: --device cuda, but torch sees no GPU; run with --device cpu")
    terminal = Terminal()
    cases = select_cases(options, device)
    monitor = environment.GpuMonitor() if device == "cuda" else None
    cache_bytes = int(os.environ.get("TOKENWEAVE_BENCH_CACHE_BYTES", "0")) or None  # None: what the machine reports
    machine = {"cpu": machines.CpuMachine, "cuda": machines.CudaMachine}[device](cache_bytes)
    env, others = environment.describe(device, monitor), environment.OtherLoad()

    rows: list[dict] = []
    with terminal.progress(len(cases) + 1) as advance:
        limits = harness.measure_machine(machine)
        for case in cases:
            advance(f"{case.op} {case.case} {harness.DTYPE_NAME[case.dtype]}")
            with torch.no_grad():  # as an inference engine runs; a training case turns it on in its contestants
                measured = harness.run_case(case, machine, BUDGET_S[options.quick], monitor)
            rows += measured
            if not terminal.is_live:  # no bar: a line per row, so that a log shows life
                for row in measured:
                    terminal.print(" ".join([row["op"], *report.cells(row, [])]))
    env["other_load"] = others.share()
    if monitor:
        env["clocks_after"] = monitor.snapshot()

    doc = harness.document(env, limits, rows)
    harness.validate(doc)
    report.print_tables(doc, terminal)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(doc, indent=1) + "\n")
        terminal.print(f"written: {options.json}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
