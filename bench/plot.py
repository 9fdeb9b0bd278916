#!/usr/bin/env python3
"""Draws a result file: bandwidth against the measured limit, and speed against the baselines.

python bench/plot.py FILE.json [-o out.png]
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

from bench import environment, report  # noqa: E402

# A palette told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
INK, GRID = "#333333", "#DDDDDD"
LIMIT_NAME = {"rmw": "in-place read-modify-write", "copy": "copy", "read": "read"}


def split_case(case: str) -> tuple[int, str] | None:
    """`4096x8192 x2` -> (4096, "8192 x2"): the leading number is the x axis, the rest tells lines apart."""
    match = re.fullmatch(r"(\d+)x([\dx]+( .+)?)", case)
    return (int(match[1]), match[2]) if match else None


def plottable(rows: list[dict]) -> list[dict]:
    """Correct rows with a size to plot over; a row that moves next to nothing measures a call, not the memory."""
    return [row for row in rows if row["ok"] and split_case(row["case"]) and row["bytes"] >= 4096]


def lines_of(rows: list[dict]) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """(inner shape, dtype, cache) -> points (leading size, GB/s), sorted; single points are kept."""
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        size, inner = split_case(row["case"])
        lines.setdefault((inner, row["dtype"], row["cache"]), []).append((size, report.gb_per_s(row)))
    return {key: sorted(points) for key, points in lines.items()}


def draw_bandwidth(axes, op: str, rows: list[dict]) -> None:
    lines = lines_of(rows)
    inner_sizes = list(dict.fromkeys(inner for inner, _, _ in lines))
    markers = dict(zip(dict.fromkeys(d for _, d, _ in lines), "osD^v", strict=False))
    for (inner, dtype, cache), points in lines.items():
        colour = COLOURS[inner_sizes.index(inner) % len(COLOURS)]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=markers[dtype], markersize=6, linewidth=2,
            linestyle="-" if cache == "cold" else ":", markerfacecolor=colour if cache == "cold" else "white",
            label=f"width {inner}, {dtype}, {'cold' if cache == 'cold' else 'hot in cache'}",
        )  # fmt: skip
    for kind in dict.fromkeys(row["limit"]["kind"] for row in rows if row["limit"]):
        rate = statistics.median(r["limit"]["gb_per_s"] for r in rows if r["limit"] and r["limit"]["kind"] == kind)
        axes.axhline(rate, color=INK, linestyle="--", linewidth=1.3, zorder=1)
        axes.annotate(
            f"measured limit: {LIMIT_NAME[kind]}, {rate:.0f} GB/s", (0.015, rate), color=INK, fontsize=9,
            xycoords=("axes fraction", "data"), xytext=(0, 6), textcoords="offset points",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_xlabel("rows (tokens)")
    axes.set_ylabel("bandwidth, GB/s")
    axes.set_title(f"{op}: bytes moved per second", loc="left", fontweight="bold", color=INK)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3)


def draw_speedups(axes, op: str, rows: list[dict]) -> None:
    """Bars of baseline time / our time; cold rows where a case has both."""
    cold = {(row["case"], row["dtype"]) for row in rows if row["cache"] == "cold"}
    chosen = [row for row in rows if row["cache"] == "cold" or (row["case"], row["dtype"]) not in cold]
    names = [name for name in report.baseline_names(chosen) if any(row["baselines"].get(name) for row in chosen)]
    labels = [row["case"] + ("" if row["dtype"] == "bf16" else f" {row['dtype']}") for row in chosen]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        values = [(row["baselines"].get(name) or float("nan")) / row["us"] for row in chosen]
        places = [x + (index - (len(names) - 1) / 2) * width for x in range(len(chosen))]
        # From 1 upwards where ours is faster, downwards where it is slower.
        heights = [value - 1 for value in values]
        colour = COLOURS[(index + 2) % len(COLOURS)]
        bars = axes.bar(places, heights, width * 0.92, bottom=1, color=colour, label=f"vs {name}")
        if len(chosen) * len(names) <= 30:
            labels_of_bars = [f"{value:.1f}x" if value == value else "" for value in values]
            axes.bar_label(bars, labels_of_bars, fontsize=8, color=INK, padding=2)
    axes.axhline(1, color=INK, linewidth=1.3, zorder=3)
    axes.set_yscale("log")
    low, high = min(axes.get_ylim()[0] * 0.9, 0.8), axes.get_ylim()[1] * 1.35
    axes.set_ylim(low, high)
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 300, 1000, 10_000) if low <= t <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}x"))
    crowded = len(chosen) > 6
    axes.set_xticks(range(len(chosen)), labels, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlabel("case (rows x width)" + ("" if crowded else ", bf16 unless noted"))
    axes.set_ylabel("times faster (baseline / ours)")
    axes.set_title(f"{op}: speed against each baseline", loc="left", fontweight="bold", color=INK)
    if names:
        axes.legend(fontsize=9, frameon=False, loc="upper right", ncols=len(names))


def draw(doc: dict, path: Path) -> None:
    groups = [(op, plottable(rows)) for op, rows in report.by_op(doc)]
    groups = [(op, rows) for op, rows in groups if rows]
    if not groups:
        raise SystemExit("plot.py: the file holds no correct row whose case reads <rows>x<width>")
    style = {
        "axes.edgecolor": "#999999", "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.labelcolor": INK,
    }  # fmt: skip
    with plt.rc_context(style):
        size = (15, 5.2 * len(groups) + 0.6)
        figure, grid = plt.subplots(len(groups), 2, figsize=size, squeeze=False, layout="constrained")
        for (left, right), (op, rows) in zip(grid, groups, strict=True):
            draw_bandwidth(left, op, rows)
            draw_speedups(right, op, rows)
            right.grid(axis="x", visible=False)
        env = doc["env"]
        title = f"tokenweave-ops on {environment.device_label(env)}"
        figure.suptitle(title, fontsize=14, fontweight="bold", color=INK)
        caption = (
            f"{env['date'][:10]}, commit {environment.commit_label(env)}, torch {env['torch']}. "
            "Medians of interleaved runs; cold: buffers rotate through more memory than the caches hold."
        )
        figure.supxlabel(caption, fontsize=9, color="#666666")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: beside the file, as .png")
    options = parser.parse_args()
    output = options.output or options.file.with_suffix(".png")
    draw(report.load(options.file), output)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
