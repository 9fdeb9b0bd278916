"""Time to equal error: P(SIR > threshold) by the usual simulation in a window and by the power domain, each run until
its standard error is what was asked for, and the bias that no number of realisations removes.

The network is one that every simulation knows, and whose answer is exact: one slope, Rayleigh fading, strongest cell,
no noise. `python -m tokenweave_models.densification.benchmark` prints the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2, pi, sqrt
from statistics import median

import numpy as np

from tokenweave_models.common import console
from tokenweave_models.densification.exact import saturation
from tokenweave_ops import GeometryTable, PowerTable, SinrGrid, SinrSums, sample_geometry, sample_power_domain
from tokenweave_ops.sinr_field import BATCH

PAIRS = 16 * BATCH  # realisations of a bias
PILOT = 2 * BATCH  # realisations that tell how many are needed
MOST_TERMS = 64  # of the power domain: what 16 of them are compared with
REPEATS = 9  # of a short run, whose median is reported


@dataclass(frozen=True)
class Row:
    """One way to P(SIR > threshold).

    Attributes:
        method: its name.
        realisations: how many its error took.
        wall_s: time of the run, tables not included.
        build_s: time to build its tables.
        coverage, standard_error: what it found.
        bias, bias_standard_error: what more realisations would not remove, found apart from the run by pairs of
            realisations of the same random numbers.
    """

    method: str
    realisations: int
    wall_s: float
    build_s: float
    coverage: float
    standard_error: float
    bias: float
    bias_standard_error: float


def window_loop(
    exponent: float,
    stations: float,
    thresholds: np.ndarray,
    num_realisations: int,
    rng: np.random.Generator,
    *,
    nearest: bool = False,
) -> np.ndarray:
    """As published simulations do it, one realisation after the other: a Poisson number of base stations, ``stations``
    on average, uniform in a disc around the user, Rayleigh fading, and nothing beyond the disc.

    Returns:
        Sums of value and of value squared over the realisations, float64 ``[1 + thresholds, 2]``: the rate in nats,
        then whether the SIR is above each of ``thresholds`` (linear, ``[thresholds]``). Without a station the SIR is 0;
        a single one has no interference, and takes a SIR of 1e30.
    """
    totals = np.zeros((1 + thresholds.size, 2))
    for _ in range(num_realisations):
        count = rng.poisson(stations)
        if count == 0:
            continue
        r = np.sqrt(rng.random(count))  # in radii of the disc: without noise only ratios matter
        power = rng.exponential(size=count) * r**-exponent
        signal = power[r.argmin()] if nearest else power.max()
        interference = power.sum() - signal
        sir = signal / interference if interference > 0 else 1e30
        rate = np.log1p(sir)
        totals[0] += rate, rate * rate
        totals[1:] += (sir > thresholds)[:, None]
    return totals


def time_to_equal_error(
    *,
    exponent: float = 4.0,
    threshold: float = 1.0,
    target: float = 1e-3,
    stations: float = 256.0,
    num_terms: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> list[Row]:
    """Both ways to P(SIR > threshold) with a standard error of ``target``.

    Args:
        exponent: of the path loss, above 2.
        threshold: linear SIR.
        target: standard error to reach, above 0 and below 0.1.
        stations: mean number of base stations in the window of the usual simulation, 16 to 100,000.
        num_terms: powers that the power domain takes one by one, a multiple of 4 from 4 to 60.
        seed: of all random numbers.
        device: of the power domain and of both biases.

    Raises:
        ValueError: an argument is outside its range.
    """
    for name, value, is_good, words in (
        ("target", target, 0 < target < 0.1, "above 0 and below 0.1"),
        ("stations", stations, 16 <= stations <= 1e5, "16 to 100,000"),
        ("num_terms", num_terms, 4 <= num_terms < MOST_TERMS, f"4 to {MOST_TERMS - 4}"),
    ):
        if not is_good:
            raise ValueError(f"time_to_equal_error: {name} must be {words}, got {value}")
    rows = [
        _window(exponent, threshold, target, stations, seed, device),
        _power_domain(exponent, threshold, target, num_terms, seed, device),
    ]
    return sorted(rows, key=lambda row: -row.wall_s)


def _window(exponent, threshold, target, stations, seed, device) -> Row:
    exact = float(saturation.coverage(2 / exponent, threshold))
    needed = max(2, ceil(exact * (1 - exact) / target**2))
    rng, thresholds = np.random.default_rng(seed), np.array([threshold])
    window_loop(exponent, stations, thresholds, 16, rng)
    start = time.perf_counter()
    totals = window_loop(exponent, stations, thresholds, needed, rng)
    wall_s = time.perf_counter() - start
    coverage = totals[1, 0] / needed
    error = sqrt(coverage * (1 - coverage) / (needed - 1))
    bias = _window_bias(exponent, threshold, stations, seed, device)
    return Row(f"window of {stations:g} stations, loop in numpy", needed, wall_s, 0.0, coverage, error, *bias)


def _window_bias(exponent, threshold, stations, seed, device) -> tuple[float, float]:
    """The same realisations of the plane with and without what lies beyond the window."""
    table, grid = GeometryTable.single_slope(exponent, device=device), SinrGrid.make([1.0], [threshold], device)
    num_points = ceil((stations + 12 * sqrt(stations)) / 4) * 4  # more stations are never in the window
    window = GeometryTable(table.gain, table.fading, table.far, r_inf=sqrt(stations / pi))

    def covered(network: GeometryTable, residual: str) -> np.ndarray:
        found = sample_geometry(
            network, grid, num_realisations=PAIRS, num_points=num_points, residual=residual, seed=seed,
            keep_samples=True,
        )  # fmt: skip
        log2_signal, log2_interference = found.samples[0].double().cpu().numpy().T
        return (log2_signal > log2_interference + log2(threshold)).astype(np.float64)

    return _mean_and_error(covered(window, "none") - covered(table, "gauss"))


def _power_domain(exponent, threshold, target, num_terms, seed, device) -> Row:
    start = time.perf_counter()
    table = PowerTable.single_slope(exponent, densities=(1.0, 1.0), device=device)
    build_s = time.perf_counter() - start
    grid = SinrGrid.make([1.0], [threshold], device)

    def run(num_realisations: int, terms: int = num_terms, first_realisation: int = 0) -> SinrSums:
        return sample_power_domain(
            table, grid, num_realisations=num_realisations, num_terms=terms, rate_nodes=0, seed=seed,
            first_realisation=first_realisation,
        )  # fmt: skip

    def estimate(num_realisations: int) -> tuple[float, float]:
        coverage = run(num_realisations).coverage
        return coverage.mean.item(), coverage.standard_error.item()  # .item() waits for a GPU

    needed = max(2, ceil(PILOT * (estimate(PILOT)[1] / target) ** 2))
    estimate(needed)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = estimate(needed)
        times.append(time.perf_counter() - start)
    # Sums of batches, of the same arrivals: their differences are all that the terms left out do.
    few, many = (run(PAIRS, terms).sums[:, 0, -1, 0].cpu().numpy() / BATCH for terms in (num_terms, MOST_TERMS))
    bias = _mean_and_error(few - many)
    return Row(f"power domain, {num_terms} powers", needed, median(times), build_s, *found, *bias)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / sqrt(values.size))


COLUMNS = ("method", "realisations", "wall ms", "tables ms", "P(SIR > y)", "s.e.", "off exact", "bias", "s.e. of bias")


def print_rows(rows: Sequence[Row], exact: float) -> None:
    """The table, and how many times longer the slowest took than the others."""

    def cells(row: Row) -> list[str]:
        return [
            row.method, f"{row.realisations:,}", f"{1e3 * row.wall_s:.2f}", f"{1e3 * row.build_s:.1f}",
            f"{row.coverage:.5f}", f"{row.standard_error:.1e}", f"{row.coverage - exact:+.1e}", f"{row.bias:+.1e}",
            f"{row.bias_standard_error:.0e}",
        ]  # fmt: skip

    console.print_table(f"Time to equal error; exact: {exact:.5f}", COLUMNS, [cells(row) for row in rows])
    slowest = max(rows, key=lambda row: row.wall_s)
    for row in rows:
        if row is not slowest:
            console.print_text(f"{row.method}: {slowest.wall_s / row.wall_s:.0f} times faster than {slowest.method}")


def main(measure: Callable[..., list[Row]] = time_to_equal_error) -> list[Row]:
    """Measures, prints and returns the rows for exponent 4, threshold 0 dB and an error of 1e-3."""
    rows = measure()
    print_rows(rows, float(saturation.coverage(0.5, 1.0)))
    return rows


if __name__ == "__main__":
    main()
