"""Pictures of what the benches measured."""

from __future__ import annotations

from pathlib import Path

from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.runner.session import NO_LINK

# A palette told apart by colour-blind readers too (Okabe and Ito).
COLOURS = {"reference": "#999999", "fused": "#0072B2", "weave": "#D55E00", NO_LINK: "#009E73"}
INK, GRID = "#333333", "#DDDDDD"


def _figure(num_axes: int, width: float):
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run: pip install 'tokenweave-ops[models]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, num_axes, figsize=(width, 4.2), squeeze=False, layout="constrained")
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=GRID)
        one.set_axisbelow(True)
    return figure, axes[0]


def _bars(axes, groups: list[str], series: dict[str, list[float]], number: str = "{:.0f}") -> None:
    """A group of bars for each of ``groups``, one bar of it for each of ``series``."""
    width = 0.84 / len(series)
    for index, (name, heights) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, heights, width * 0.94, color=COLOURS[name], label=name)
        axes.bar_label(bars, [number.format(height) for height in heights], fontsize=7, color=INK, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.1)


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)


def _number_for(values: list[float]) -> str:
    return "{:.0f}" if max(values) >= 100 else "{:.1f}" if max(values) >= 1 else "{:.2f}"


def draw_prefill(report: dict, setting: str, path: Path) -> None:
    """Latency by number of tokens and mode."""
    rows = report["rows"]
    figure, (axes,) = _figure(1, max(6.5, 2.2 * len(rows)))
    series = {mode: [row["modes"][mode]["ms"] for row in rows] for mode in rows[0]["modes"]}
    groups = [f"{row['tokens']} tokens\n{_plan(row['plan'])}" for row in rows]
    _bars(axes, groups, series, _number_for(series[next(iter(series))]))
    axes.set_ylabel("prefill latency, ms (median)")
    _legend(figure, axes)
    figure.suptitle(f"Prefill latency by mode\n{setting}", fontsize=10)
    _save(figure, path)


def _plan(plan: dict) -> str:
    return f"weave splits at {plan['split']}" if plan["kind"] == "split" else "weave does not split"


def draw_serving(report: dict, setting: str, path: Path) -> None:
    """Throughput, and the percentiles of the three latencies, by mode."""
    figure, axes = _figure(4, 15)
    modes = report["modes"]
    throughput = {mode: [found["output_tokens_per_s"]] for mode, found in modes.items()}
    _bars(axes[0], [""], throughput, _number_for([heights[0] for heights in throughput.values()]))
    axes[0].set_title("output tokens per second", fontsize=9)
    titles = {
        "first_token": "ms to the first token",
        "per_output_token": "ms per output token",
        "whole_request": "ms per request",
    }
    for one, (name, title) in zip(axes[1:], titles.items(), strict=True):
        series = {mode: list(found["ms"][name].values()) for mode, found in modes.items() if name in found["ms"]}
        one.set_title(title, fontsize=9)
        if series:
            _bars(one, ["p50", "p90", "p99"], series, _number_for([max(heights) for heights in series.values()]))
    _legend(figure, axes[0])
    rate = "all at once" if report["rate"] is None else f"{report['rate']:g} per second"
    figure.suptitle(f"Serving {len(report['requests'])} requests, {rate}\n{setting}", fontsize=10)
    _save(figure, path)
