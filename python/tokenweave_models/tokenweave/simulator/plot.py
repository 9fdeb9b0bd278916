"""Draws a simulated pass: the two lanes of a few layers, and latencies by mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.simulator.replay import COLLECTIVE, COMPUTE, Span

MODE_LABELS = {
    "reference": "all-reduce, then add and norm",
    "fused": "fused, no split",
    "weave": "weave",
    "no_communication": "all-reduce left out",
}
MODE_COLOURS = {"reference": "#9aa0a6", "fused": "#6aa5d8", "weave": "#1b7f5c", "no_communication": "#d9c7a0"}
# By half; attention is darker than the MLP.
BLOCK_COLOURS = {("attention", 0): "#2b6cb0", ("MLP", 0): "#7fb0e0", ("attention", 1): "#b7472a", ("MLP", 1): "#eba37c"}
COLLECTIVE_COLOURS = {0: "#bcd6f0", 1: "#f6d3c0"}


def draw(
    path: Path,
    title: str,
    spans: Sequence[Span] | None,
    layers: range,
    latency_ms: Mapping[int, Mapping[str, float]],
    published_ms: Mapping[int, Mapping[str, float]],
) -> None:
    """Writes a PNG. ``latency_ms``: by tokens and mode; ``published_ms``: the same, as far as there is any."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run: pip install 'tokenweave-ops[models]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [1.0, 1.5] if spans else [1.5]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(14, 3.6 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(f"Simulation, not a measurement: {title}", fontsize=13, fontweight="bold")
    if spans:
        _draw_lanes(axes[0, 0], spans, layers)
    _draw_latency(axes[-1, 0], latency_ms, published_ms)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_lanes(axis, spans: Sequence[Span], layers: range) -> None:
    shown = [span for span in spans if span.task.layer in layers]
    begin_us = min(span.begin_us for span in shown if span.task.lane == COMPUTE)
    end_us = max(span.end_us for span in shown if span.task.lane == COMPUTE)
    rows = {COMPUTE: 1.0, COLLECTIVE: 0.0}
    for span in spans:
        left, right = max(span.begin_us, begin_us) - begin_us, min(span.end_us, end_us) - begin_us
        if right <= left:
            continue
        task = span.task
        is_compute = task.lane == COMPUTE
        colour = BLOCK_COLOURS[task.label, task.half] if is_compute else COLLECTIVE_COLOURS[task.half]
        axis.barh(rows[task.lane], right - left, left=left, height=0.8, color=colour, edgecolor="white", linewidth=1.5)
        share = (right - left) / (end_us - begin_us)
        if share < 0.025:
            continue  # too narrow for its name
        name = (
            f"{task.label.replace(' + ', ' +' + chr(10))}\nhalf {task.half}"
            if share < 0.07
            else (f"{task.label}\nhalf {task.half}")
        )
        dark = is_compute and task.label == "attention"
        axis.text(
            left + (right - left) / 2,
            rows[task.lane],
            name,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
            clip_on=True,
        )
    for layer in layers:
        first = min(s.begin_us for s in shown if s.task.layer == layer and s.task.lane == COMPUTE) - begin_us
        axis.axvline(first, color="black", linewidth=0.8, linestyle=":")
        axis.text(first, 1.5, f" layer {layer}", fontsize=9, va="bottom")
    axis.set_xlim(0, end_us - begin_us)
    axis.set_ylim(-0.5, 1.75)
    axis.set_yticks([0, 1], ["collective\nlane", "compute\nlane"])
    axis.set_xlabel("microseconds (simulated)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_latency(axis, latency_ms: Mapping[int, Mapping[str, float]], published_ms) -> None:
    # Latency grows with tokens; per 1024 of them all bars are of one size.
    sizes, modes = list(latency_ms), list(MODE_LABELS)
    width = 0.8 / len(modes)
    labelled = False
    for column, mode in enumerate(modes):
        places = [i - 0.4 + (column + 0.5) * width for i in range(len(sizes))]
        values = [latency_ms[tokens].get(mode, 0.0) * 1024 / tokens for tokens in sizes]
        axis.bar(places, values, width * 0.92, color=MODE_COLOURS[mode], label=MODE_LABELS[mode])
        for place, value, tokens in zip(places, values, sizes, strict=True):
            if not value:
                continue
            true = published_ms.get(tokens, {}).get(mode, 0.0) * 1024 / tokens
            if true:
                ends = [place - width * 0.46, place + width * 0.46]
                label = None if labelled else "published by TokenWeave's authors (eager, their splits)"
                axis.plot(ends, [true, true], color="black", linewidth=2, label=label)
                labelled = True
            top = max(value, true)
            axis.annotate(
                f"{latency_ms[tokens][mode]:.1f}",
                (place, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.set_xticks(range(len(sizes)), [f"{tokens} tokens" for tokens in sizes])
    axis.set_ylabel("ms per 1024 tokens (simulated)\nfigures: ms of the pass")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    axis.legend(loc="upper center", ncols=5, fontsize=9, frameon=False, bbox_to_anchor=(0.5, -0.08))
