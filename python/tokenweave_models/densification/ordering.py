"""Which of two networks serves better, in every realisation or on average: both see the same random numbers.

With the strongest cell and no noise the SIR of a realisation is M / I, and I / M the sum over i > 1 of P_i / P_1, where
P_i = L1^-1(arrival_i / density). So where L1_a^-1 falls faster than L1_b^-1, relative to itself, at every arrival (a is
larger in the star order), the SIR of a is larger in every realisation, at any density. Derived here; it follows that
coverage at every threshold and the rate are ordered alike. Two samplers that share a seed share the arrivals, and must
then not have a single realisation the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from tokenweave_models.densification.accumulate import Accumulator, Groups, Interval, jackknife
from tokenweave_models.densification.fading import (
    Fading,
    Gamma,
    LogNormal,
    LogPareto,
    NoFading,
    Pareto,
    Rayleigh,
    Weibull,
)
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.result import DB_PER_OCTAVE
from tokenweave_models.densification.samplers import Sampler, Settings, choose_method, make_sampler
from tokenweave_ops.sinr_field import BATCH

ROUNDING_DB = 1e-3  # of a SINR in fp32: less is no violation
ROUNDING_LOG = 1e-6  # of ln L1^-1, between two arrivals
SAMPLE_BATCHES = 8  # whose realisations are kept at a time
LEAST_ARRIVAL, MOST_ARRIVAL, NUM_ARRIVALS = 1e-9, 1e6, 3001  # where L1^-1 is compared


@dataclass(frozen=True)
class Comparison:
    """Of network a with network b. D densities, T thresholds.

    Attributes:
        theorem: why SINR_a >= SINR_b in every realisation, or "" where that is not known.
        star_ordered: whether L1_a^-1 / L1_b^-1 never rises with the arrival, computed at each density, ``[D]``; False
            where that decides nothing: with noise, with activities that differ, and for the nearest cell.
        violations: realisations where SINR_a < SINR_b by more than ``tolerance_db``, int64 ``[D]``.
        worst_db: the most by which it was, ``[D]``; 0 where it never was.
        coverage: the difference of coverages, a less b, ``[D, T]``, with its interval.
        rate_nats: the difference of rates, ``[D]``; nan where it was not asked for.
        num_realisations: how many were compared.
        tolerance_db: 1e-3 dB for rounding, and what the errors of the tables can add up to.
    """

    theorem: str
    star_ordered: np.ndarray
    violations: np.ndarray
    worst_db: np.ndarray
    coverage: Interval
    rate_nats: Interval
    num_realisations: int
    tolerance_db: float

    @property
    def words(self) -> str:
        """The verdict."""
        count, total = int(self.violations.sum()), self.num_realisations * len(self.violations)
        seen = f"{count} of {total} realisations are the other way round"
        if self.theorem:
            contradiction = "" if count == 0 else "; this contradicts the theorem"
            return f"a is better in every realisation: {self.theorem}; {seen}{contradiction}"
        if self.star_ordered.all():
            return f"a is better in every realisation, by its computed L1^-1 (no theorem is known here); {seen}"
        if count == 0:
            return f"a was better in every realisation; no theorem says that it must be; {seen}"
        if count == total:
            return f"b is better in every realisation; {seen}"
        return f"neither is better in every realisation; {seen}"


def compare(
    a: Network,
    b: Network,
    densities_per_km2,
    thresholds_db,
    *,
    num_realisations: int,
    rate: bool = True,
    method: str = "auto",
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda num_realisations: None,
) -> Comparison:
    """Samples both networks with common random numbers.

    Args:
        a, b: the networks; they must be answered by the same method.
        densities_per_km2, thresholds_db, method, seed, device: as in :func:`sweep`.
        num_realisations: how many. Intervals need at least two batches of 16,384.
        settings: of the samplers; by default the residual is "mean", which keeps the order where a normal deviate, of
            another size in either network, need not.
        progress: called with the number of realisations done.

    Raises:
        ValueError: an argument is outside its range, or the methods differ.
    """
    if num_realisations < 1:
        raise ValueError(f"compare: num_realisations must be at least 1, got {num_realisations}")
    settings = settings or Settings(residual="mean")
    methods = [choose_method(network, method, rate) for network in (a, b)]
    if methods[0] != methods[1] or methods[0] not in ("power", "geometry"):
        raise ValueError(f"compare: method must be power or geometry, the same for both, got {methods}")
    thresholds = 10 ** (np.atleast_1d(np.asarray(thresholds_db, dtype=np.float64)) / 10)
    densities = np.atleast_1d(np.asarray(densities_per_km2, dtype=np.float64))
    options = {"rate": rate, "settings": settings, "seed": seed, "device": device}
    samplers = [make_sampler(one, methods[0], densities, thresholds, **options) for one in (a, b)]
    noises = [one.scaled_noise() for one in (a, b)]
    sums = [Accumulator((len(densities), one.items), one.histogram_shape) for one in samplers]
    tolerance_db = ROUNDING_DB
    if methods[0] == "power":  # signal and interference of either may be off by its table's error
        tolerance_db += 2 * DB_PER_OCTAVE * (a.table_error(densities) + b.table_error(densities))
    violations, worst = np.zeros(len(densities), dtype=np.int64), np.zeros(len(densities))
    for first, count in _portions(num_realisations):
        log_sinr = [
            _sample(sampler, total, noise, first, count)
            for sampler, total, noise in zip(samplers, sums, noises, strict=True)
        ]
        with np.errstate(invalid="ignore"):
            short_db = (log_sinr[1] - log_sinr[0]) * DB_PER_OCTAVE
        short_db[np.isnan(short_db)] = 0.0  # both infinite, or both without any base station
        violations += (~(short_db <= tolerance_db)).sum(axis=1)  # an error that is not a number excuses nothing
        worst = np.maximum(worst, short_db.max(axis=1))
        progress(first + count)
    coverage, rate_nats = _differences(sums, samplers[0], rate)
    decides = all(one.association == "strongest" and one.noise == 0 for one in (a, b)) and a.activity == b.activity
    ordered = np.array([decides and star_ordered(a, b, density) for density in densities])
    worst = np.where(worst > tolerance_db, worst, 0.0)
    return Comparison(
        proven_order(a, b), ordered, violations, worst, coverage, rate_nats, num_realisations, tolerance_db
    )


def _portions(num_realisations: int) -> list[tuple[int, int]]:
    """(first, count) of calls: whole batches, then what is left."""
    whole, rest = divmod(num_realisations, BATCH)
    step = SAMPLE_BATCHES
    calls = [(first * BATCH, min(step, whole - first) * BATCH) for first in range(0, whole, step)]
    return calls + ([(whole * BATCH, rest)] if rest else [])


def _sample(sampler: Sampler, total: Accumulator, noise: float, first: int, count: int) -> np.ndarray:
    """log2 SINR, ``[densities, count]``; the sums go into the total."""
    found = sampler.run(first_realisation=first, num_realisations=count, keep_samples=True)
    sums, histogram = found.sums.cpu().numpy(), found.histogram.cpu().numpy()
    if count % BATCH:
        total.add_last(sums, histogram, count)
    else:
        total.add(sums, histogram)
    signal, interference = found.samples.cpu().numpy().astype(np.float64).transpose(2, 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_sinr = signal - np.logaddexp2(interference, np.log2(noise))
    return np.where(np.isnan(log_sinr), -inf, log_sinr)  # no base station: no SINR


def _differences(sums: list[Accumulator], sampler: Sampler, rate: bool) -> tuple[Interval, Interval]:
    groups = [one.groups() for one in sums]
    with np.errstate(invalid="ignore"):  # inverse SINR is infinite where a disc may hold no cell
        gaps = Groups(groups[0].sums - groups[1].sums, groups[0].sizes)
    coverage = jackknife(lambda means: means[:, sampler.num_moments :], gaps)
    if not rate:
        return coverage, Interval(*[np.full(gaps.sums.shape[1], np.nan)] * 4)
    return coverage, jackknife(lambda means: means[:, 0], gaps)


# --------------------------------------------------------------------------------------------------- the star order


def star_ordered(a: Network, b: Network, density_per_km2: float) -> bool:
    """Whether ln L1_a^-1 - ln L1_b^-1 never rises with the arrival, up to the rounding of the inversion, 1e-6."""
    arrivals = np.geomspace(LEAST_ARRIVAL, MOST_ARRIVAL, NUM_ARRIVALS)
    powers = []
    for network in (a, b):
        log_g = np.log(arrivals / network.scaled_density(density_per_km2))
        is_there = np.exp(log_g) < network.power_measure.total
        with np.errstate(invalid="ignore", divide="ignore"):
            powers.append(np.where(is_there, network.power_measure.log_power(log_g), -inf))
    ends = np.isneginf(powers)
    if (ends[1] & ~ends[0]).any():  # b has no such power where a still has one
        return False
    both = ~ends.any(axis=0)
    return bool((np.diff(powers[0][both] - powers[1][both]) <= ROUNDING_LOG).all())


def proven_order(a: Network, b: Network) -> str:
    """Why the SIR of a is at least that of b in every realisation, in words; "" where no theorem here says so.

    Two cases, derived here:

    - single slopes on the infinite plane, whose L1^-1 is a power, whatever the fading: the larger exponent is better;
    - the same single slope, with the same height and in the same disc (or plane), and marks in the star order: the
      logarithm of the gain then has a log-concave density, and adding such a variable keeps the dispersive order of
      ln m (Lewis and Thompson 1981).
    """
    if not all(_is_plain(network) for network in (a, b)) or a.activity != b.activity:
        return ""
    laws = a.path_loss, b.path_loss
    if all(law.r_inf == inf and law.height == 0 for law in laws):
        better, worse = (law.far_exponent for law in laws)
        return f"single slopes, and exponent {better:g} is at least {worse:g}" if better >= worse else ""
    names = ("far_exponent", "unit_m", "r_inf", "height")
    if all(getattr(laws[0], name) == getattr(laws[1], name) for name in names):
        return _star_order_of_marks(a.fading, b.fading)
    return ""


def _is_plain(network: Network) -> bool:
    """Strongest cell, no noise, one slope, no atom of distances."""
    law = network.path_loss
    single = isinstance(law, MultiSlope) and len(law.breakpoints) == 0 and law.min_distance == 0
    return single and law.far_exponent > 0 and network.association == "strongest" and network.noise == 0


def _star_order_of_marks(a: Fading, b: Fading) -> str:
    """Where a is the larger: families whose ln quantiles differ by a function that never falls."""
    if isinstance(b, NoFading):
        return "any law is at least a constant in the star order"
    families: list[tuple[type | tuple[type, ...], Callable[[Fading], float], str]] = [
        ((Gamma, Rayleigh), lambda law: law.k if isinstance(law, Gamma) else 1.0, "gamma shapes"),
        (Weibull, lambda law: law.k, "Weibull shapes"),
        (Pareto, lambda law: law.tail_index, "Pareto indices"),
        (LogPareto, lambda law: law.g, "log-Pareto indices"),
        (LogNormal, lambda law: -law.sigma, "standard deviations (negated)"),
    ]
    for family, parameter, name in families:
        if isinstance(a, family) and isinstance(b, family) and parameter(a) <= parameter(b):
            return f"marks in the star order: {name} {parameter(a):g} and {parameter(b):g}"
    return ""
