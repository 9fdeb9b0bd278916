"""The density that serves best: where coverage, coverage per area or spectral efficiency per area has its maximum.

All densities share their realisations, so the curve is as smooth as the expectation it estimates and its maximum can be
bracketed and refined like that of a function; leaving out groups of realisations gives its interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log
from typing import Any

import numpy as np

from tokenweave_models.densification.accumulate import Interval, jackknife
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.sweep import sweep

MAXIMISED = ("coverage", "coverage_density", "ase")
COARSE_STEP = log(2.0)  # of ln density, while bracketing
ZOOM_POINTS = 9
SMOOTH_STEP, COUNTING_STEP = 0.05, 0.2  # of ln density, in the last fit: counts need a wider one
FIT_POINTS = 5
SIGNIFICANT = 3.0  # standard errors by which a maximum must exceed both ends of the range
ROUNDING = 1e-5  # of ln quantity: differences below it are those of fp32


@dataclass(frozen=True)
class Optimum:
    """Of one quantity over density.

    Attributes:
        quantity, threshold_db: what was maximised; the threshold is None for "ase".
        kind: "interior"; "rises" or "falls" over the whole range, "flat" within its errors: then no number is given.
        density_per_km2: where the maximum is; nan without an interior maximum.
        density_low, density_high: its 95 % interval; nan where errors are not known.
        value, value_se: the quantity there.
        words: a sentence that says so, and why.
        result: the last sweep, around the maximum or over the range.
    """

    quantity: str
    threshold_db: float | None
    kind: str
    density_per_km2: float
    density_low: float
    density_high: float
    value: float
    value_se: float
    words: str
    result: Result


def optimum(
    network: Network,
    quantity: str,
    threshold_db: float | None = None,
    *,
    range_per_km2: tuple[float, float],
    num_realisations: int = 1 << 18,
    **options: Any,
) -> Optimum:
    """The density between the two ends of the range that maximises the quantity.

    Args:
        network: of the sweeps.
        quantity: "coverage", "coverage_density" (per km^2) or "ase" (area spectral efficiency).
        threshold_db: of a coverage.
        range_per_km2: least and most density.
        num_realisations: of each of the few sweeps; they share them. Not looked at by method exact, which gives no
            intervals.
        options: of :func:`sweep`: method, settings, seed, device, progress, group, command, date.

    Raises:
        ValueError: an argument is outside its range; and what :func:`sweep` raises.
    """
    if quantity not in MAXIMISED:
        raise ValueError(f"optimum: quantity must be {', '.join(MAXIMISED)}, got {quantity!r}")
    if (threshold_db is None) != (quantity == "ase"):
        needs = "left out for ase" if quantity == "ase" else f"given for {quantity}"
        raise ValueError(f"optimum: threshold_db must be {needs}, got {threshold_db}")
    low, high = range_per_km2
    if not 0 < low < high:
        raise ValueError(f"optimum: range_per_km2 must be two ascending densities, got {low}, {high}")

    curve = _Curve(quantity, threshold_db)
    is_exact = options.get("method") == "exact"
    options |= {"num_realisations": None if is_exact else num_realisations, "rate": quantity == "ase"}
    thresholds = [] if quantity == "ase" else [threshold_db]

    def sweep_between(begin: float, end: float, points: int) -> Result:
        return sweep(network, np.exp(np.linspace(begin, end, points)), thresholds, **options)

    points = max(5, ceil(log(high / low) / COARSE_STEP) + 1)
    result = sweep_between(log(low), log(high), points)
    best, kind = _bracket(curve, result)
    if kind != "interior":
        nothing = float("nan")
        words = _why_not(curve, network, kind, low, high)
        return Optimum(quantity, threshold_db, kind, *[nothing] * 5, words, result)

    last_step = COUNTING_STEP if result.provenance["method"] == "geometry" else SMOOTH_STEP
    log_density = np.log(result.densities_per_km2)
    step = log_density[1] - log_density[0]
    while step > last_step:
        centre = log_density[best]
        result = sweep_between(centre - step, centre + step, ZOOM_POINTS)
        log_density = np.log(result.densities_per_km2)
        best, step = int(np.argmax(curve(result, result.groups.means))), log_density[1] - log_density[0]
    begin = min(max(best - FIT_POINTS // 2, 0), ZOOM_POINTS - FIT_POINTS)
    rows = slice(begin, begin + FIT_POINTS)
    place = jackknife(lambda means: _vertex(log_density[rows], curve(result, means)[rows])[0], result.groups)
    value = jackknife(lambda means: _vertex(log_density[rows], curve(result, means)[rows])[1], result.groups)
    return _interior(curve, place, value, result)


@dataclass(frozen=True)
class _Curve:
    quantity: str
    threshold_db: float | None

    @property
    def name(self) -> str:
        if self.quantity == "ase":
            return "area spectral efficiency"
        return f"{self.quantity.replace('_', ' ')} at {self.threshold_db:g} dB"

    def __call__(self, result: Result, means: np.ndarray) -> np.ndarray:
        """ln of the quantity at the result's densities, from means ``[D, 1 + T]``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log(means[:, 0 if self.quantity == "ase" else 1])
        return values if self.quantity == "coverage" else values + np.log(result.densities_per_km2)


def _bracket(curve: _Curve, result: Result) -> tuple[int, str]:
    """The best point of the grid, and whether it is surely above both ends."""
    values = curve(result, result.groups.means)
    best = int(np.argmax(np.where(np.isnan(values), -np.inf, values)))

    def above(end: int) -> bool:
        if not np.isfinite(values[end]):
            return True  # nothing is covered there
        gap = jackknife(lambda means: curve(result, means)[best] - curve(result, means)[end], result.groups)
        error = 0.0 if np.isnan(gap.standard_error) else float(gap.standard_error)
        return bool(gap.value > max(SIGNIFICANT * error, ROUNDING))

    above_first, above_last = above(0), above(-1)
    if above_first and above_last:
        return best, "interior"
    return best, "rises" if above_first else "falls" if above_last else "flat"


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Place and height of the maximum of the parabola through the points, by least squares."""
    centre = x.mean()
    a, b, c = np.polyfit(x - centre, y, 2)
    if not a < 0:  # a replicate without a maximum here: what is known is where it would be nearest
        return float(x[np.argmax(y)]), float(y.max())
    return float(centre - b / (2 * a)), float(c - b * b / (4 * a))


def _interior(curve: _Curve, place: Interval, value: Interval, result: Result) -> Optimum:
    density, low, high = (float(np.exp(one)) for one in (place.value, place.low, place.high))
    words = f"{curve.name} is highest at {density:.4g}/km2"
    if np.isfinite(low):
        words += f", between {low:.4g} and {high:.4g} with 95 % confidence"
    height = float(np.exp(value.value))
    error = height * float(value.standard_error)
    return Optimum(
        curve.quantity, curve.threshold_db, "interior", density, low, high, height, error, words, result
    )  # fmt: skip


def _why_not(curve: _Curve, network: Network, kind: str, low: float, high: float) -> str:
    regime = network.regime()
    how = {"rises": "rises", "falls": "falls", "flat": "does not change beyond its errors"}[kind]
    words = f"{curve.name} {how} from {low:g} to {high:g}/km2: it has no maximum inside. "
    exponent = regime.exponents.get(curve.quantity, float("nan"))
    if kind == "rises" and exponent < 0:
        return words + f"It must fall at higher densities (regime {regime.name}); widen the range."
    if kind == "falls" and curve.quantity == "coverage" and network.noise > 0:
        return words + f"With noise it must rise at lower densities (regime {regime.name}); widen the range."
    if kind == "falls" and curve.quantity != "coverage":
        return words + f"It must rise at lower densities, from 0 (regime {regime.name}); widen the range."
    if kind == "falls" and curve.quantity == "coverage" and network.noise == 0 and network.path_loss.r_inf == inf:
        words += "Without noise, more density never helps the coverage of these laws: interference grows with it. "
    return words + f"Regime {regime.name}: {regime.words}"
