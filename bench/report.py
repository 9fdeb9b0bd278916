#!/usr/bin/env python3
"""Results as people read them: a table for the terminal, the tables of docs/performance.md, and README's excerpt.

`python bench/report.py` rewrites what stands between `<!-- results -->` and `<!-- end of results -->` in
docs/performance.md and between `<!-- bench:begin -->` and `<!-- bench:end -->` in README.md, from the files under
bench/results; `--check` only says whether they are up to date. So no number on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import environment, harness  # noqa: E402
from bench.terminal import Terminal  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.S)
EXCERPT = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.S)
EXCERPT_BASELINES = ("eager", "compile", "gloo", "gloo_strong", "nccl")
NO_RESULTS = "No results have been committed yet. `python bench/run.py` prints those of your machine."


def load(path: Path) -> dict:
    doc = json.loads(path.read_text())
    harness.validate(doc)
    return doc


def by_op(doc: dict) -> list[tuple[str, list[dict]]]:
    """Rows grouped by op, in the order of their first appearance."""
    order = list(dict.fromkeys((row["family"], row["op"]) for row in doc["rows"]))
    rows = sorted(doc["rows"], key=lambda row: order.index((row["family"], row["op"])))
    return [(op, list(group)) for (_, op), group in groupby(rows, key=lambda row: (row["family"], row["op"]))]


def baseline_names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["baselines"]))


def gb_per_s(row: dict) -> float | None:
    return None if row["us"] is None else row["bytes"] / row["us"] / 1e3


def _time(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _ratio(row: dict, name: str) -> str:
    if name not in row["baselines"] or row["us"] is None:
        return "-"
    us = row["baselines"][name]
    return "wrong" if us is None else f"{us / row['us']:.2f}x"


def headings(rows: list[dict]) -> list[str]:
    return ["case", "dtype", "cache", "us", "p20 - p80", "GB/s", "of limit", *(f"vs {n}" for n in baseline_names(rows))]


def cells(row: dict, names: list[str]) -> list[str]:
    start = [row["case"], row["dtype"], row["cache"]]
    if not row["ok"]:
        return [*start, "wrong", *["-"] * (3 + len(names))]
    rate = gb_per_s(row)
    share = "-" if row["pct_of_limit"] is None else f"{row['pct_of_limit']:.0f} %"
    times = [_time(row["us"]), f"{_time(row['us_p20'])} - {_time(row['us_p80'])}"]
    return [*start, *times, f"{rate:.1f}" if rate >= 0.1 else "-", share, *(_ratio(row, name) for name in names)]


def remarks(doc: dict) -> list[str]:
    """Sentences under the tables: the machine, its limits, what was skipped and why, flags."""
    env, machine = doc["env"], doc["machine"]
    where, commit = environment.device_label(env), environment.commit_label(env)
    lines = [f"{where}; torch {env['torch']}; {env['date'][:10]}; commit {commit}."]
    if machine:
        lines.append(
            f"Measured on buffers of {machine['buffer_bytes'] / 2**20:.0f} MiB: copy {machine['copy_gb_per_s']:.1f}, "
            f"in-place read-modify-write {machine['rmw_gb_per_s']:.1f}, read {machine['read_gb_per_s']:.1f} GB/s; "
            f"matmul bf16 {machine['matmul_bf16_tflop_per_s']:.2f}, "
            f"fp32 {machine['matmul_fp32_tflop_per_s']:.2f} TFLOP/s."
        )
    if (env.get("other_load") or 0) > 0.1:
        share = f"{100 * env['other_load']:.0f} %"
        lines.append(f"Not a quiet machine: other processes used {share} of its cores during this run.")
    for row in doc["rows"]:
        noop, wrapper = row["baselines"].get("noop"), row["baselines"].get("wrapper")
        if row["ok"] and noop:
            lines.append(f"{row['op']}: {row['us'] / noop:.2f}x a no-op of the same schema ({noop:.2f} us).")
        if row["ok"] and wrapper:
            lines.append(f"{row['op']}: the Python function adds {wrapper - row['us']:.2f} us.")
        if row["ok"] and row.get("counts"):
            rates = [f"{1e3 * row['us'] / n:.3g} ns a {name}" for name, n in row["counts"].items()]
            rates += [f"{1e6 * n / row['us']:.3g} {name}s/s" for name, n in row["counts"].items()]
            lines.append(f"{row['op']} {row['case']}: {', '.join(rates)}.")
    skipped = {f"{name} was skipped: {why}." for row in doc["rows"] for name, why in row["skipped"].items()}
    flags: dict[str, list[str]] = {}
    for row in doc["rows"]:
        for flag in row["flags"]:
            flags.setdefault(flag, []).append(f"{row['op']} {row['case']} {row['dtype']} {row['cache']}")
    return lines + sorted(skipped) + [f"{flag}: {', '.join(rows)}." for flag, rows in flags.items()]


def print_tables(doc: dict, terminal: Terminal) -> None:
    for op, rows in by_op(doc):
        names = baseline_names(rows)
        lines = [cells(row, names) for row in rows]
        terminal.table(f"{op} on {doc['env']['device']}", headings(rows), lines, [not row["ok"] for row in rows])
    for line in remarks(doc):
        terminal.print(line)


def markdown(doc: dict) -> str:
    lines = []
    for op, rows in by_op(doc):
        titles = headings(rows)
        lines += [f"**{op}**", "", "| " + " | ".join(titles) + " |"]
        lines += ["|" + "|".join("---" if t in ("case", "dtype", "cache") else "---:" for t in titles) + "|"]
        lines += ["| " + " | ".join(cells(row, baseline_names(rows))) + " |" for row in rows] + [""]
    return "\n".join(lines + [f"- {line}" for line in remarks(doc)]) + "\n"


def render(page: str, results: Path = RESULTS) -> str:
    """The page with its results block replaced by the tables of every file under `results`."""
    sections = []
    for path in sorted(results.glob("*/*.json")):
        doc = load(path)
        source = path.relative_to(results).as_posix()
        title = f"### {environment.device_label(doc['env'])}, {doc['env']['date'][:10]}"
        sections.append(f"{title}\n\nFrom `bench/results/{source}`.\n\n{markdown(doc)}")
    body = "\n".join(sections or [NO_RESULTS + "\n"])
    if not BLOCK.search(page):
        raise ValueError("the page has no block between <!-- results --> and <!-- end of results -->")
    return BLOCK.sub(lambda match: f"{match[1]}\n{body}\n{match[2]}", page)


def excerpt(readme: str, results: Path = RESULTS) -> str:
    """README with its block replaced by each op's largest case: a table for each device and day."""
    largest: dict[str, list[dict]] = {}
    for path in sorted(results.glob("*/*.json")):
        doc = load(path)
        rows = [max(rows, key=lambda row: (row["bytes"], row["cache"] == "cold")) for _, rows in by_op(doc)]
        label = f"{environment.device_label(doc['env'])}, {doc['env']['date'][:10]}"
        largest.setdefault(label, []).extend(row for row in rows if row["pct_of_limit"] is not None)
    sections = []
    for label, rows in largest.items():
        if not rows:
            continue
        names = [name for name in EXCERPT_BASELINES if name in baseline_names(rows)]
        titles = ["op", *headings([])[:-1], "of limit", *(f"vs {name}" for name in names)]
        lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * 4 + "---:|" * (len(titles) - 4)]
        lines += ["| " + " | ".join([f"`{row['op']}`", *cells(row, names)]) + " |" for row in rows]
        sections.append(f"{label}:\n\n" + "\n".join(lines))
    body = "\n\n".join(sections or [NO_RESULTS]) + "\n"
    return EXCERPT.sub(lambda match: f"{match[1]}\n{body}\n{match[2]}", readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    options = parser.parse_args()
    pages = [(options.page, render)]
    if options.page == PAGE:
        pages.append((README, excerpt))
    stale = 0
    for path, update in pages:
        old = path.read_text()
        new = update(old, options.results)
        if options.check:
            print(f"{path.name} is {'up to date' if old == new else 'out of date: run python bench/report.py'}")
            stale |= old != new
        else:
            path.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
