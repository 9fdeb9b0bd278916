"""Plots of results: lines with their 95 % bands, and what theory predicts as dashed lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokenweave_models.common.errors import UserError
from tokenweave_models.densification.optimum import Optimum
from tokenweave_models.densification.ordering import Comparison
from tokenweave_models.densification.result import QUANTITIES, Result
from tokenweave_models.densification.runner.reporting import shown_columns

if TYPE_CHECKING:
    from tokenweave_models.densification.runner.phase import Cell

# Okabe and Ito's palette, which colour-blind readers tell apart; markers for those who print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
DENSITY = "base stations per km$^2$"
LABELS = {
    "coverage": "P(SINR > {})",
    "rate": "rate, nats/s/Hz",
    "coverage_density": "coverage density at {}, per km$^2$",
    "ase": "ASE, nats/s/Hz/km$^2$",
}
Z95 = 1.96
SMALLEST = 1e-12  # of a coverage that a plot shows


def canvas(rows: int, columns: int, size: tuple[float, float], **options):
    """(figure, axes [rows, columns]), with all that plots here have in common."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run: pip install 'tokenweave-ops[models]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(figure, path: Path, *, legend_of=None, columns: int = 2) -> None:
    """Writes the PNG; a legend below all panels, of the lines of one axis, covers no data."""
    from matplotlib import pyplot as plt

    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)


def values_of(result: Result, quantity: str, column: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The quantity over density and its standard error, each ``[D]``; column is of the threshold."""
    if quantity == "rate":
        return result.rate_nats, result.rate_se
    if quantity == "ase":
        return result.ase, result.ase_se
    values = getattr(result, quantity)[:, column]
    return values, getattr(result, f"{quantity}_se")[:, column]


def draw_line(axis, x, values, errors, colour: str, marker: str, label: str, every: int = 1) -> None:
    """With its 95 % band, which is narrower than the line where the sampling was long enough."""
    values, errors = np.asarray(values), np.nan_to_num(np.asarray(errors))
    shown = np.where(values > 0, values, np.nan)
    axis.plot(x, shown, color=colour, marker=marker, markersize=4, markevery=every, linewidth=1.5, label=label)
    low, high = shown - Z95 * errors, shown + Z95 * errors
    axis.fill_between(x, np.maximum(low, 1e-3 * shown), high, color=colour, alpha=0.25, linewidth=0)


def draw_slope(axis, x: np.ndarray, values: np.ndarray, exponent: float) -> None:
    """A dashed line of the predicted power over the last two decades, through the curve's end."""
    if not isfinite(exponent):
        return
    last = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(last) == 0:
        return
    end = last[-1]
    span = x[(x >= x[end] / 100) & (x <= x[end])]
    axis.plot(span, values[end] * (span / x[end]) ** exponent, color="black", linestyle="--", linewidth=1.1, zorder=3)


def logarithmic(axis, quantity: str, name: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(DENSITY)
    axis.set_ylabel(LABELS[quantity].format(name))


def draw_sweeps(path: Path, results: Mapping[str, Result], quantities: Sequence[str] = QUANTITIES) -> None:
    """A panel for each quantity; a line for each result and, where there is one result, for some of its thresholds."""
    first = next(iter(results.values()))
    quantities = [name for name in quantities if has_values(first, name)]
    columns = min(2, len(quantities))
    rows = -(-len(quantities) // columns)
    figure, axes = canvas(rows, columns, (5.2 * columns, 3.9 * rows + 0.6))
    for axis, quantity in zip(axes.flat, quantities, strict=False):
        draw_quantity(axis, results, quantity)
    for axis in axes.flat[len(quantities) :]:
        axis.set_visible(False)
    widest = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    finish(figure, path, legend_of=widest)


def has_values(result: Result, quantity: str) -> bool:
    """Not the rate where it was not asked for, nor a coverage without thresholds."""
    if quantity in ("coverage", "coverage_density"):
        return len(result.thresholds_db) > 0
    return not np.isnan(result.rate_nats).all()


def draw_quantity(axis, results: Mapping[str, Result], quantity: str, every: int = 1) -> None:
    of_threshold = quantity in ("coverage", "coverage_density")
    style = 0
    names = set()
    for label, result in results.items():
        columns = shown_columns(result.thresholds_db) if of_threshold and len(results) == 1 else [0]
        order = np.argsort(result.densities_per_km2)
        x = result.densities_per_km2[order]
        for column in columns:
            values, errors = (part[order] for part in values_of(result, quantity, column))
            values = np.where(values >= SMALLEST, values, np.nan)
            name = f"{result.thresholds_db[column]:g} dB" if of_threshold else ""
            names.add(name)
            words = label or name or "rate"
            colour = COLOURS[style % len(COLOURS)]
            draw_line(axis, x, values, errors, colour, MARKERS[style % len(MARKERS)], words, every)
            draw_slope(axis, x, values, result.regime.exponents[quantity])
            style += 1
    axis.plot([], [], color="black", linestyle="--", linewidth=1.1, label="predicted slope of the limit")
    logarithmic(axis, quantity, names.pop() if len(names) == 1 else "threshold")


def draw_times(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]]) -> None:
    """A panel for each title: by method (seconds, standard error, bias) of runs of growing length."""
    figure, axes = canvas(1, len(panels), (5.2 * len(panels) + 0.6, 4.8), sharey=True)
    for axis, (title, runs) in zip(axes.flat, panels.items(), strict=True):
        for style, (method, points) in enumerate(runs.items()):
            seconds, error, bias = np.array(points).T
            colour, marker = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
            axis.plot(seconds, np.hypot(error, bias), color=colour, marker=marker, linewidth=1.5, label=method)
            axis.plot(seconds, error, color=colour, linestyle=":", linewidth=1.2)
        axis.plot([], [], color="black", linestyle=":", linewidth=1.2, label="standard error alone, without the bias")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("wall time, s (tables built before)")
    axes[0, 0].set_ylabel("error of P(SIR > threshold), bias included")
    finish(figure, path, legend_of=axes[0, 0], columns=3)


def draw_ccdf(path: Path, result: Result, limit: np.ndarray | None) -> None:
    figure, axes = canvas(1, 1, (6.4, 4.6))
    axis = axes[0, 0]
    order = np.argsort(result.thresholds_db)
    for row, density in enumerate(result.densities_per_km2):
        colour, marker = COLOURS[row % len(COLOURS)], MARKERS[row % len(MARKERS)]
        values, errors = result.coverage[row, order], result.coverage_se[row, order]
        every = max(1, len(order) // 12)
        draw_line(axis, result.thresholds_db[order], values, errors, colour, marker, f"{density:.4g} /km$^2$", every)
    if limit is not None:
        label = f"limit of high density, rho = {result.regime.rho:.3g}"
        axis.plot(result.thresholds_db[order], limit[order], "k--", linewidth=1.2, label=label)
    axis.set_xlabel("SINR threshold, dB")
    axis.set_ylabel("P(SINR > threshold)")
    axis.set_ylim(0, 1.02)
    finish(figure, path, legend_of=axis)


def draw_meta(path: Path, result: Result) -> None:
    """The meta-distribution: for each reliability the share of geometries in which coverage exceeds it."""
    bins = result.histogram.shape[-1]
    reliability = np.arange(bins + 1) / bins
    columns = shown_columns(result.thresholds_db)
    count = len(result.densities_per_km2)
    figure, axes = canvas(1, min(count, 3), (4.6 * min(count, 3), 4.4), sharey=True)
    for axis, row in zip(axes.flat, shown_columns(result.densities_per_km2)[:3], strict=False):
        for style, column in enumerate(columns):
            counts = result.histogram[row, column]
            share = np.append(counts[::-1].cumsum()[::-1], 0) / counts.sum()
            error = np.sqrt(share * (1 - share) / counts.sum())
            label = f"{result.thresholds_db[column]:g} dB"
            draw_line(axis, reliability, share, error, COLOURS[style], MARKERS[style], label, bins // 8)
        axis.set_title(f"{result.densities_per_km2[row]:.4g} /km$^2$", fontsize=10, loc="left")
        axis.set_xlabel("coverage of a user, given the geometry")
    axes[0, 0].set_ylabel("share of geometries above it")
    axes[0, 0].set_ylim(0, 1.02)
    finish(figure, path, legend_of=axes[0, 0], columns=4)


def draw_optimum(path: Path, found: Optimum, curve: Result) -> None:
    """``curve`` is a sweep over the whole range."""
    figure, axes = canvas(1, 1, (6.4, 4.4))
    axis = axes[0, 0]
    values, errors = values_of(curve, found.quantity)
    name = found.quantity.replace("_", " ")
    draw_line(axis, curve.densities_per_km2, values, errors, COLOURS[0], "o", name, every=4)
    if found.kind == "interior":
        low, best, high = found.density_low, found.density_per_km2, found.density_high
        axis.axvspan(low, high, color=COLOURS[1], alpha=0.25, linewidth=0, label="its 95 % interval")
        axis.axvline(best, color=COLOURS[1], linewidth=1.2, label=f"best: {best:.4g} /km$^2$")
    axis.set_xscale("log")
    axis.set_xlabel(DENSITY)
    threshold = "" if found.threshold_db is None else f"{found.threshold_db:g} dB"
    axis.set_ylabel(LABELS[found.quantity].format(threshold))
    finish(figure, path, legend_of=axis, columns=3)


def draw_order(path: Path, densities: np.ndarray, thresholds_db: np.ndarray, found: Comparison) -> None:
    figure, axes = canvas(1, 1, (6.4, 4.6))
    axis = axes[0, 0]
    for style, column in enumerate(shown_columns(thresholds_db)):
        values, error = found.coverage.value[:, column], found.coverage.standard_error[:, column]
        colour, marker = COLOURS[style], MARKERS[style]
        axis.errorbar(
            densities, values, Z95 * np.nan_to_num(error), color=colour, marker=marker, markersize=4, capsize=2,
            label=f"{thresholds_db[column]:g} dB",
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel(DENSITY)
    axis.set_ylabel("P(SINR$_a$ > threshold) - P(SINR$_b$ > threshold)")
    finish(figure, path, legend_of=axis, columns=4)


def draw_phase(path: Path, cells: Sequence[Cell]) -> None:
    near = sorted({cell.near_exponent for cell in cells})
    tails = sorted({cell.tail_index for cell in cells})
    figure, axes = canvas(1, 1, (0.95 * len(near) + 2.4, 0.6 * len(tails) + 1.9))
    axis = axes[0, 0]
    axis.grid(visible=False)
    slopes = np.full((len(tails), len(near)), np.nan)
    for cell in cells:
        slopes[tails.index(cell.tail_index), near.index(cell.near_exponent)] = cell.slope.value
    steepest = max(-2.0, float(np.nanmin(slopes)))
    picture = axis.imshow(slopes, origin="lower", aspect="auto", cmap="viridis", vmin=steepest, vmax=0.0)
    for corner in (1.0, 2.0):  # where the law changes: d / 2 and d of the near field, 1 and 2 of the tail
        for values, line in ((near, axis.axvline), (tails, axis.axhline)):
            if values[0] < corner < values[-1]:
                place = np.interp(corner, np.minimum(values, 1e3), range(len(values)))
                line(place, color="red", linestyle="--", linewidth=1.2, zorder=1)
    for cell in cells:
        place = near.index(cell.near_exponent), tails.index(cell.tail_index)
        value = cell.slope.value
        shade = picture.cmap(picture.norm(value)) if not np.isnan(value) else (1.0, 1.0, 1.0, 1.0)
        axis.text(
            *place, words_of_cell(cell), ha="center", va="center", fontsize=8, zorder=2,
            color="black" if sum(shade[:3]) > 1.4 else "white",
            bbox={"facecolor": shade, "edgecolor": "none", "boxstyle": "round,pad=0.15"},
        )  # fmt: skip
    axis.set_xticks(range(len(near)), [f"{value:g}" for value in near])
    axis.set_yticks(range(len(tails)), ["light" if value == inf else f"{value:g}" for value in tails])
    axis.set_xlabel(r"near-field exponent $\beta_0$ (dashed: 1 and 2)")
    axis.set_ylabel(r"tail index $\alpha$ of the fading (dashed: 1 and 2)")
    name = "P(SIR > threshold)" if cells[0].slope.quantity == "coverage" else "rate"
    axis.set_title(f"d ln {name} / d ln density: fitted (predicted)", fontsize=10, loc="left")
    figure.colorbar(picture, ax=axis, label="fitted slope", extend="min" if np.nanmin(slopes) < steepest else "neither")
    finish(figure, path)


def words_of_cell(cell: Cell) -> str:
    """What was fitted, and below it the prediction."""
    fitted = "too small" if np.isnan(cell.slope.value) else f"{cell.slope.value + 0.0:.2f}".replace("-0.00", "0.00")
    predicted = "log" if np.isnan(cell.slope.predicted) else f"{cell.slope.predicted:.2f}".replace("-0.00", "0.00")
    return f"{fitted}\n({predicted})"
