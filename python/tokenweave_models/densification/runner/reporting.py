"""Results as tables, with as many digits as their errors allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor, inf, isfinite, isnan, log10
from pathlib import Path
from typing import Any

import numpy as np

from tokenweave_models.common.console import print_table, print_text
from tokenweave_models.common.output import write_json
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.result import Result, Slope, as_json

MOST_COLUMNS = 5  # of thresholds that a table shows


def with_error(value: float, error: float) -> str:
    """The value with its standard error in units of its last two digits: 0.63651(24), 2.62(13)e-20."""
    if isnan(value):
        return "-"
    if not isfinite(value):
        return "inf" if value > 0 else "-inf"
    if not 0 < error < inf:
        return f"{value:.6g}"
    if value != 0 and error < 1e-9 * abs(value):
        return f"{value:.9g}"
    scale = floor(log10(max(abs(value), error)))
    if -3 <= scale < 6:
        scale = 0
    digits = max(0, 1 - floor(log10(error) - scale))
    last = round(error / 10.0**scale * 10**digits)
    if last >= 100:  # 0.996 rounds to three digits
        digits, last = max(0, digits - 1), 10 if digits else last
    return f"{value / 10.0**scale:.{digits}f}({last})" + (f"e{scale}" if scale else "")


def escaped(text: str) -> str:
    """For a table, which would take [m] for a style."""
    return text.replace("[", "\\[")


def plain(value: float) -> str:
    return "-" if isnan(value) else f"{value:.4g}"


def shown_columns(thresholds_db: np.ndarray) -> list[int]:
    """A few of many thresholds: both ends, and evenly between."""
    count = len(thresholds_db)
    if count <= MOST_COLUMNS:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, MOST_COLUMNS)})


def title_of(network: Network) -> str:
    return f"{network.path_loss.describe()}, {network.fading.describe()}, {network.association} cell"


def print_result(title: str, result: Result) -> None:
    columns = shown_columns(result.thresholds_db)
    has_rate = not np.isnan(result.rate_nats).all()
    heads = ["density, /km2", *(f"P > {result.thresholds_db[column]:g} dB" for column in columns)]
    heads += ["rate", "ASE"] if has_rate else []
    rows = []
    for row, density in enumerate(result.densities_per_km2):
        cells = [f"{density:.4g}"]
        cells += [with_error(result.coverage[row, one], result.coverage_se[row, one]) for one in columns]
        if has_rate:
            cells += [
                with_error(result.rate_nats[row], result.rate_se[row]),
                with_error(result.ase[row], result.ase_se[row]),
            ]
        rows.append(cells)
    print_table(title, heads, rows)
    print_text(
        "P > T is P(SINR > T)"
        + ("; the rate is in nats/s/Hz, ASE = density * rate in nats/s/Hz/km2" if has_rate else "")
        + ". In brackets: the standard error, in units of the last two digits."
    )
    if len(columns) < len(result.thresholds_db):
        print_text(f"{len(columns)} of {len(result.thresholds_db)} thresholds are shown; --out writes all of them.")
    bias = result.truncation_bias_bound
    if np.nanmax(bias, initial=0.0) > 0:
        print_text(f"A coverage may be off by {np.nanmax(bias):.1g} because most stations are taken together.")


def print_slopes(slopes: Iterable[Slope], thresholds_db: Sequence[float]) -> None:
    """Of the thresholds that the table above has shown."""
    shown = [slope for slope in slopes if slope.threshold_db is None or slope.threshold_db in thresholds_db]
    if not any(isfinite(slope.value) for slope in shown):
        return
    print_table(
        "d ln(quantity) / d ln(density) over the last two decades",
        ("quantity", "fitted", "95 % interval", "predicted", "verdict"),
        [
            (
                slope.quantity.replace("_", " ")
                + (f", {slope.threshold_db:g} dB" if slope.threshold_db is not None else ""),
                with_error(slope.value, slope.standard_error),
                f"{slope.low:.4f} to {slope.high:.4f}" if isfinite(slope.low) else "-",
                plain(slope.predicted),
                slope.verdict,
            )
            for slope in shown
            if isfinite(slope.value)
        ],
    )
    if any(slope.verdict == "differs" for slope in shown):
        print_text("Predicted slopes are those of the limit; one that differs has not reached it at these densities.")


def print_regime_words(result: Result) -> None:
    print_text(f"Theory: {result.regime.words}")
    print_warnings(result.warnings)


def print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print_text(f"Warning: {warning}.")


def written(path: object) -> None:
    print_text(f"Written: {path}")


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """As JSON, in which nan is null and infinities are words, as in a result's."""
    write_json(path, as_json(report))
