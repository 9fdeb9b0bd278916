"""Draws right words against passes of the model, one panel for each set of prompts, one line for each number varied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenweave_models.common.errors import UserError
from tokenweave_models.localleap.demo.evaluation import Result, Setting, local_leap, threshold
from tokenweave_models.localleap.demo.lexicon import ANSWER_LENGTH, PROMPT_SETS

# Okabe and Ito's palette, which colour-blind readers tell apart; markers for those who print.
STYLES = {
    "topk": ("#999999", "s", "top-k: k from 1 (right) to 24"),
    "threshold": ("#D55E00", "o", r"threshold: $\theta$ from 0.95 (right) to 0"),
    "local_leap, kappa": ("#CC79A7", "D", r"LocalLeap: $\kappa$ from 0.99 (right) to 0.75 ($\tau$ 0.75, W 4)"),
    "local_leap, tau": ("#0072B2", "^", r"LocalLeap: $\tau$ from 0.9 (right) to 0 ($\kappa$ 0.9, W 4)"),
    "local_leap, W": ("#009E73", "v", r"LocalLeap: W from 0 (right) to 8 ($\kappa$ 0.9, $\tau$ 0.75)"),
}
# Ringed in black, since several lines go through them.
NAMED = {
    threshold(0.9): ("o", r"threshold 0.9"),
    threshold(0.75): ("s", r"threshold 0.75"),
    local_leap(): ("*", r"LocalLeap 0.9 / 0.75 / W 4"),
}


def draw(path: Path, results: Mapping[tuple[str, Setting], Result], sweeps: Mapping[str, Sequence[Setting]]) -> None:
    """Writes a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run: pip install 'tokenweave-ops[models]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), sharex=True, sharey=True, layout="constrained")
    for axis, (name, prompt_set) in zip(axes.flat, PROMPT_SETS.items(), strict=True):
        _draw_set(axis, {s: r for (found, s), r in results.items() if found == name}, sweeps)
        axis.set_title(f"{name}: {prompt_set.words}", fontsize=11, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("passes of the model per answer of 48 tokens", fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("words right, %", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_set(axis, results: Mapping[Setting, Result], sweeps: Mapping[str, Sequence[Setting]]) -> None:
    for sweep, settings in sweeps.items():
        colour, marker, label = STYLES[sweep]
        found = [results[setting] for setting in settings]
        axis.plot(
            [result.passes for result in found],
            [100 * result.words_right for result in found],
            color=colour, marker=marker, markersize=5, linewidth=1.5, label=label, alpha=0.9, clip_on=False,
        )  # fmt: skip
    for setting, (marker, label) in NAMED.items():
        axis.plot(
            results[setting].passes, 100 * results[setting].words_right, marker,
            markersize=18 if marker == "*" else 12, markerfacecolor="none", markeredgecolor="black",
            markeredgewidth=1.4, label=label, clip_on=False, zorder=5,
        )  # fmt: skip
    axis.set_xlim(0, ANSWER_LENGTH + 2)
    axis.set_ylim(0, 104)
    axis.set_xticks(range(0, ANSWER_LENGTH + 1, 6))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
