#!/usr/bin/env python3
"""Runs the benchmarks: every contestant is checked, then timed interleaved, and compared with limits measured here.

    python bench/run.py                                  all families on the GPU if there is one, else on the CPU
    python bench/run.py --quick --json build/bench.json  a few cases in under a minute, kept for bench/plot.py
    python bench/run.py --family allreduce_rmsnorm --op add_rms_norm_ --device cuda

Exits with 1 if a kernel's result is wrong, and such a row prints no speed, or if processes that measure together fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
# At the end: an installed tokenweave_ops must win over the source tree, which may hold no built library.
sys.path.append(str(BENCH.parent))

import torch  # noqa: E402

from bench import environment, harness, machines, ranks, report  # noqa: E402
from bench.harness import load_family  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

BUDGET_S = {False: 1.5, True: 0.6}  # of timing per row; quick or not


def find_families(directory: Path) -> dict[str, Path]:
    """Family files are those that define `cases`: a new family is one new file."""
    files = sorted(directory.glob("*.py"))
    return {path.stem: path for path in files if "\ndef cases(" in path.read_text()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if a GPU is visible")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--families", type=Path, default=BENCH, metavar="DIR", help="where the family files are")
    return parser.parse_args(arguments)


def select_cases(
    options: argparse.Namespace, device: str
) -> tuple[list[harness.Case], list[tuple[Path, int, ranks.RankCase]]]:
    """The cases of this process, and those between processes with the file and the index by which a rank finds them."""
    families = find_families(options.families)
    if options.family and options.family not in families:
        raise SystemExit(f"run.py: no family {options.family!r}; there are: {', '.join(families) or 'none'}")
    chosen = [options.family] if options.family else list(families)
    cases, rank_cases = [], []
    for name in chosen:
        module = load_family(families[name])
        cases += module.cases(device, options.quick)
        between = module.rank_cases(device, options.quick) if hasattr(module, "rank_cases") else []
        rank_cases += [(families[name], index, case) for index, case in enumerate(between)]
    selected = [case for case in cases if options.op in (None, case.op)]
    rank_selected = [entry for entry in rank_cases if options.op in (None, entry[2].op)]
    if not selected and not rank_selected:
        ops = ", ".join(dict.fromkeys(case.op for case in [*cases, *(entry[2] for entry in rank_cases)]))
        wanted = (
            f"op {options.op!r}" if options.op else f"family {options.family!r}" if options.family else "any family"
        )
        raise SystemExit(f"run.py: no {'quick ' * options.quick}case of {wanted}; there are: {ops or 'none'}")
    return selected, rank_selected


def describe_case(case: harness.Case | ranks.RankCase) -> str:
    return f"{case.op} {case.case} {harness.DTYPE_NAME[case.dtype]}"


def run_between_ranks(cases, device: str, cache_bytes: int | None, quick: bool, advance, take) -> str | None:
    """take(rows) for every case; what went wrong if the ranks failed, with which the remaining cases are left out."""
    if device == "cuda":
        torch.cuda.empty_cache()  # the ranks are processes of their own
    for world_size in dict.fromkeys(case.world_size for _, _, case in cases):
        with ranks.Processes(world_size, device, cache_bytes) as processes:
            for family, index, case in cases:
                if case.world_size == world_size:
                    advance(describe_case(case))
                    try:
                        take(processes.run_case(family, quick, index, BUDGET_S[quick]))
                    except ranks.RanksFailed as error:
                        return f"{describe_case(case)}: {error}"
    return None


def main() -> int:
    options = parse_arguments()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run.py: --device cuda, but torch sees no GPU; run with --device cpu")
    terminal = Terminal()
    cases, rank_cases = select_cases(options, device)
    monitor = environment.GpuMonitor() if device == "cuda" else None
    cache_bytes = int(os.environ.get("TOKENWEAVE_BENCH_CACHE_BYTES", "0")) or None  # None: what the machine reports
    machine = {"cpu": machines.CpuMachine, "cuda": machines.CudaMachine}[device](cache_bytes)
    env, others = environment.describe(device, monitor), environment.OtherLoad()

    rows: list[dict] = []
    with terminal.progress(len(cases) + len(rank_cases) + 1) as advance:

        def take(measured: list[dict]) -> None:
            rows.extend(measured)
            if not terminal.is_live:  # no bar: a line per row, so that a log shows life
                for row in measured:
                    terminal.print(" ".join([row["op"], *report.cells(row, [])]))

        limits = harness.measure_machine(machine)
        for case in cases:
            advance(describe_case(case))
            with torch.no_grad():  # as an inference engine runs; a training case turns it on in its contestants
                take(harness.run_case(case, machine, BUDGET_S[options.quick], monitor))
        failure = run_between_ranks(rank_cases, device, machine.cache_bytes, options.quick, advance, take)
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
    if failure:
        print(f"run.py: the ranks failed, rows are missing: {failure}", file=sys.stderr)
    return 0 if not failure and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
