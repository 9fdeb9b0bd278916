"""Exact laws of the strongest cell at any density, and their asymptotes in a deep deficit.

Densities are per u^2, powers and ``noise`` relative to the received power at distance u without fading, thresholds y
linear, rates in nats. The network enters through its power measure L1 (:class:`PowerMeasure`): received powers are a
Poisson process with density * L1(x) of them above x.

Coverage at y >= 1 rests on one fact: only one cell can have more power than all others together, so with S the sum of
all powers P(SINR > y) = E[density * L1(y (S + W))]. Below 1 several cells can, and these functions refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import gamma, inf, log, pi
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import interpolate, special

from tokenweave_models.densification.exact._distances import Distances
from tokenweave_models.densification.exact._panels import LogPanels
from tokenweave_models.densification.exact._received import ReceivedPower, small_powers

if TYPE_CHECKING:
    from tokenweave_models.densification.path_loss import PathLoss
    from tokenweave_models.densification.power_measure import PowerMeasure
    from tokenweave_models.densification.regime import Regime

_NEGLIGIBLE = 36.0  # exp(-36) of a maximum is left out
_INVERSION_ERROR = 1e-9
_SMALLEST = -740.0  # logarithm of the smallest float


# ------------------------------------------------------------------------------------------------- powers and their sum


def max_cdf(measure: PowerMeasure, density: float, powers: ArrayLike) -> np.ndarray:
    """P(strongest power <= x) = exp(-density L1(x)), for ``powers`` x > 0 of any shape."""
    _check(density=density)
    return np.exp(-density * np.exp(measure.log_measure(np.log(np.asarray(powers, dtype=np.float64)))))


def sum_laplace(measure: PowerMeasure, density: float, s: ArrayLike) -> np.ndarray:
    """E exp(-s S) for real ``s`` >= 0 of any shape."""
    _check(density=density)
    s = np.asarray(s, dtype=np.float64)
    return np.exp(-density * ReceivedPower(measure, density).exponent(s.ravel())).reshape(s.shape)


def sum_cdf_exponent_4(powers: ArrayLike, density: float, root_moment: float) -> np.ndarray:
    """P(S <= x) on a single slope of exponent 4, a Levy law; ``root_moment`` is E[sqrt(m)] of the marks."""
    _check(density=density)
    return special.erfc(density * pi**1.5 * root_moment / (2 * np.sqrt(np.asarray(powers, dtype=np.float64))))


# ----------------------------------------------------------------------------------------------- coverage, y at least 1


def coverage_single_slope(
    thresholds: ArrayLike, exponent: float, *, density: float = 1.0, moment: float = 1.0, noise: float = 0.0
) -> np.ndarray:
    """P(SINR > y), y >= 1, on the infinite plane with path loss r^beta and any fading with ``moment`` = E[m^(2/beta)].

    With delta = 2/beta and a = pi density E[m^delta]: a y^-delta / Gamma(delta) times the integral over s of
    s^(delta - 1) exp(-s W - a Gamma(1 - delta) s^delta) (derived here; without noise it is that of :mod:`saturation`).
    """
    y = _check(density=density, noise=noise, thresholds=thresholds)
    if not exponent > 2:
        raise ValueError(
            f"coverage_single_slope: exponent must be above 2, or interference is infinite; got {exponent}"
        )
    if not 0 < moment < inf:
        raise ValueError(f"coverage_single_slope: moment must be positive and finite, got {moment}")
    delta = 2 / exponent
    a = pi * density * moment
    # In v = a Gamma(1 - delta) s^delta the integral is over exp(-v - W s(v)), times 1 / (delta a Gamma(1 - delta)).
    scale = a * gamma(1 - delta)
    panels = LogPanels.between(-60.0, log(2 * _NEGLIGIBLE), 0.5)
    total = panels.integral(np.exp(-panels.x - noise * (panels.x / scale) ** (1 / delta)))
    return y**-delta * total / (gamma(delta) * delta * gamma(1 - delta))


def coverage_rayleigh(
    path_loss: PathLoss, densities: Sequence[float], thresholds: Sequence[float], *, noise: float = 0.0
) -> np.ndarray:
    """P(SINR > y), y >= 1, under Rayleigh fading and any path loss l: float64 ``[densities, thresholds]``.

    density times the integral over r of 2 pi r exp(-y l(r) W - 2 pi density J), where J is the integral over all v of
    v / (1 + l(v) / (y l(r))): the sum over cells of their own coverage. Relative error below 1e-6, however small.
    """
    densities = np.asarray(densities, dtype=np.float64)
    for density in densities:
        _check(density=density)
    y = _check(noise=noise, thresholds=thresholds)
    distances = Distances(path_loss, densities, y)
    result = np.empty((len(densities), len(y)))
    for column, threshold in enumerate(y):
        interference = 2 * pi * distances.interference(threshold)
        signal = threshold * noise * distances.loss if noise > 0 else 0.0
        for row, density in enumerate(densities):
            ring = 2 * pi * density * distances.r
            result[row, column] = distances.panels.integral(ring * np.exp(-density * interference - signal))
    return result


def coverage(
    measure: PowerMeasure, density: float, thresholds: Sequence[float], *, noise: float = 0.0, activity: float = 1.0
) -> np.ndarray:
    """P(SINR > y), y >= 1, for any path loss and fading: float64 ``[thresholds]``.

    ``activity``: probability that a cell which does not serve transmits. The law of S comes from its Laplace transform
    by inversion, tilted towards small S where coverage needs it there. Relative error against the formulas above: below
    1e-4 on a single slope of 2.1 to 20; below 1e-5 on two slopes under Rayleigh fading, at densities of 0.01 to 1e6 and
    down to a coverage of 1e-173; but 2e-3, without noise, in a disc that has no cell at all 8 % of the time.

    Raises:
        ValueError: a threshold is below 1, or marks are so heavy that powers leave the range of floats.
    """
    y = _check(density=density, noise=noise, activity=activity, thresholds=thresholds)
    inversion = _Inversion(measure, density, noise, activity)
    return np.array([inversion.coverage(threshold) for threshold in y])


class _Inversion:
    """Coverage as the integral over t of P(t < S < t + dt) * signals(y (t + W)), S the power of active cells."""

    def __init__(self, measure: PowerMeasure, density: float, noise: float, activity: float):
        self._measure, self._noise, self._density = measure, noise, density
        self._active, self._idle = activity * density, (1 - activity) * density
        self._log_jump = float(measure.log_power(np.array([log(1e-6 / self._active)]))[0])
        if self._log_jump > 600:
            raise ValueError(
                "strongest cell: fading must have powers within the range of floats for this inversion, got "
                f"{measure.fading.describe()}, whose powers exceed exp({self._log_jump:.3g}) once in 1e6 realisations"
            )
        self._received = ReceivedPower(measure, density)
        # Each tilt s has a place t, the mean of S under it; ln P(S <= t) is below log_cdf.
        self._tilts = self._received.scales(0.1)
        self._log_laplace = -self._active * self._received.exponent(self._tilts)
        self._places = self._active * self._received.mean(self._tilts)
        self._log_cdf = self._tilts * self._places + self._log_laplace
        with np.errstate(over="ignore"):
            self._jumps = np.exp(-measure.path_loss.log_loss(np.append(np.log(measure.path_loss.breakpoints), -300.0)))

    def coverage(self, threshold: float) -> float:
        log_terms = self._log_cdf + self._log_signals(threshold, self._places)
        if log_terms.max() < _SMALLEST:
            return 0.0
        edge = int(np.searchsorted(-self._log_cdf, _NEGLIGIBLE))  # S below is of probability exp(-36)
        if edge == len(self._tilts):  # even no cell at all is likelier
            return self._integral(threshold, *self._untilted)
        error = log(_INVERSION_ERROR) + self._log_signals(threshold, self._places[edge : edge + 1])[0]
        if max(error, log_terms[edge:].max()) < log_terms.max() + log(1e-6):
            return self._integral(threshold, *self._untilted)
        peak = int(log_terms.argmax())
        t = self._places[peak] * np.exp(np.linspace(0, 10, 401))
        is_seen = self._log_signals(threshold, t) > log_terms[peak] - 0.7 * _NEGLIGIBLE
        return self._integral(threshold, *self._curve(peak, log_terms, t[is_seen][-1]))

    def _log_signals(self, threshold: float, t: np.ndarray) -> np.ndarray:
        """ln of the mean number of cells that could serve at S = t: above y (t + W), and no idle one stronger still."""
        with np.errstate(divide="ignore"):
            log_measure = self._measure.log_measure(np.log(threshold * (t + self._noise)))
            if self._idle == 0:
                return log(self._density) + log_measure
            return log(self._density / self._idle) + np.log(-np.expm1(-self._idle * np.exp(log_measure)))

    @cached_property
    def _untilted(self) -> tuple:
        return self._curve(None, self._log_cdf)

    def _curve(self, peak: int | None, log_terms: np.ndarray, last: float = inf) -> tuple:
        """The distribution of S where ``log_terms`` is within exp(-36) of its maximum, tilted to its ``peak``:
        a spline over ln(t - shift), its knots, and tilt, shift and ln of the scale that undo the tilt."""
        tilt, log_laplace = (0.0, 0.0) if peak is None else (self._tilts[peak], self._log_laplace[peak])
        best = 0.0 if peak is None else log_terms.max()
        after = np.arange(len(log_terms)) > (0 if peak is None else peak)
        # In a disc without any cell S = 0: then its law begins there, where log_terms ends flat.
        depths = [_NEGLIGIBLE, 0.7 * _NEGLIGIBLE, 0.7]
        is_flat = log_terms < log_terms[-1] + 1e-6
        below = [np.flatnonzero(after & ((log_terms < best - depth) | is_flat))[0] for depth in depths]
        first, start, middle = self._places[below]
        if is_flat[below[0]]:
            first = 0.0
        jump = np.exp(self._log_jump)
        bulk = 20 * (middle - first)
        if peak is not None:  # beyond, a falling curve drowns in the rounding of its peak
            gone = np.flatnonzero(~after & (log_terms < best - 0.7 * _NEGLIGIBLE))
            bulk = min(bulk, (min(last, self._places[gone[-1]]) if len(gone) else last) - first)
        places = np.linspace(log(start - first), log(bulk), 120)
        if peak is None:  # a tail as long as that of single powers, in ever wider steps
            steps = (places[1] - places[0]) * 1.08 ** np.arange(1, 200)
            places = np.append(places, places[-1] + np.cumsum(np.minimum(steps, 1.0)))
            places = places[: np.searchsorted(places, log(bulk + jump)) + 1]
        cdf = self._received.tilted_cdf(first + np.exp(places), tilt, first, self._active)
        return interpolate.make_interp_spline(places, cdf, k=5), places, tilt, first, tilt * first + log_laplace

    def _integral(self, threshold: float, curve, knots, tilt: float, shift: float, log_scale: float) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            jumps = np.log(self._jumps / threshold - self._noise - shift)  # places where the signals may jump
        edges = np.unique(np.concatenate([knots, jumps[(jumps > knots[0]) & (jumps < knots[-1])]]))
        nodes, weights = special.roots_legendre(4)
        half = np.diff(edges)[:, None] / 2
        places = edges[:-1, None] + half * (1 + nodes)
        span = np.exp(places)
        cdf_slope = curve(places, 1) + tilt * span * curve(places)
        log_signals = self._log_signals(threshold, shift + span.ravel()).reshape(span.shape)
        total = (half * weights * cdf_slope * np.exp(log_signals + tilt * span + log_scale)).sum()
        first = np.exp(knots[0])
        lump = self._log_signals(threshold, np.array([shift + first]))[0] + tilt * first + log_scale
        return float(total + curve(knots[0]) * np.exp(lump))


# ----------------------------------------------------------------------------------------------------------------- rate


def rate(measure: PowerMeasure, density: float, *, noise: float = 0.0, activity: float = 1.0) -> float:
    """E ln(1 + SINR) in nats, for any path loss and fading with E ln(1 + m) finite.

    The integral over z of exp(-z W) / z * E[exp(-z I) (1 - exp(-z M))], with M = P(g) the strongest power, I the sum of
    the others and density g exponential: every term is positive, so small rates keep their relative accuracy, 1e-6.
    """
    _check(density=density, noise=noise, activity=activity)
    if not measure.fading.log_mean_exists:
        raise ValueError(f"rate: fading must have a finite E ln(1 + m), got {measure.fading.describe()}")
    received = ReceivedPower(measure, density)
    panels, log_power = received.panels, received.log_power
    # tau = -ln z runs from where all cells count to where the strongest cannot, in panels as wide as the powers are
    # spread there: under a slowly varying law of marks the last ones are 1e30 wide.
    spread = np.abs(np.gradient(log_power, panels.log_x))
    edges = [log_power.min() - 4.0]
    while edges[-1] < log_power.max() + 40.0:
        edges.append(edges[-1] + max(1.0, 0.3 * np.interp(edges[-1], log_power[::-1], spread[::-1])))
    places, weights = special.roots_legendre(10)
    total = 0.0
    strongest = panels.weights * density * np.exp(-density * panels.x)
    for low, high in pairwise(edges):
        tau = low + (high - low) * (1 + places[:, None]) / 2
        z = np.exp(-tau)
        counts = -np.expm1(-np.exp(np.minimum(log_power - tau, 700.0)))
        weaker = panels.from_each(counts) + small_powers(z, received.far_mean, received.far_variance)
        values = (counts * np.exp(-activity * density * weaker)) @ strongest
        total += (high - low) / 2 * float(weights @ (values * np.exp(-noise * z[:, 0])))
    return total


# ----------------------------------------------------------------------------------------------------------- asymptotes


def mean_strongest_power(measure: PowerMeasure, density: float) -> float:
    """E[M]; inf where rho <= 1. In a bounded, light-tailed network it grows slower than any power of the density."""
    _check(density=density)
    received = ReceivedPower(measure, density)
    with np.errstate(over="ignore"):
        powers = np.exp(received.log_power)
    return float(received.panels.integral(density * np.exp(-density * received.panels.x) * powers))


def deficit_coverage(regime: Regime, densities: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """kappa (y mean_power)^-rho density^(1 - rho): the limit of coverage for 1 < rho < inf; arguments broadcast.

    S concentrates on density * mean_power, and L1(x) ~ kappa x^-rho is asked there. For any y > 0; derived here.
    """
    _check_deficit(regime, "deficit_coverage")
    y, densities = (np.asarray(values, dtype=np.float64) for values in (thresholds, densities))
    return regime.kappa * (y * regime.mean_power) ** -regime.rho * densities ** (1 - regime.rho)


def deficit_rate(regime: Regime, densities: ArrayLike) -> np.ndarray:
    """Gamma(1 - 1/rho) (kappa density)^(1/rho) / (density mean_power): E[M] / E[S] for 1 < rho < inf, in nats.

    Reached slowly for rho near 1. Derived here.
    """
    _check_deficit(regime, "deficit_rate")
    densities = np.asarray(densities, dtype=np.float64)
    scale = (regime.kappa * densities) ** (1 / regime.rho)
    return gamma(1 - 1 / regime.rho) * scale / (densities * regime.mean_power)


def mean_share(measure: PowerMeasure, density: float) -> float:
    """E[M] / E[S] at this density: the limit of the rate wherever rho > 1, also for bounded gain and light tails."""
    return mean_strongest_power(measure, density) / (density * float(measure.mean_power))


# --------------------------------------------------------------------------------------------------------------- checks


def _check_deficit(regime: Regime, name: str) -> None:
    if not 1 < regime.rho < inf:
        raise ValueError(f"{name}: rho must be above 1 and finite, got {regime.rho:g} ({regime.name})")
    if not 0 < regime.kappa < inf:
        raise ValueError(f"{name}: the constant kappa of the power measure must be known, got {regime.kappa}")


def _check(
    density: float = 1.0, noise: float = 0.0, activity: float = 1.0, thresholds: ArrayLike | None = None
) -> np.ndarray | None:
    """The thresholds, if given, as float64."""
    if not 0 < density < inf:
        raise ValueError(f"strongest cell: density must be positive and finite, got {density}")
    if not 0 <= noise < inf:
        raise ValueError(f"strongest cell: noise must be finite and not negative, got {noise}")
    if not 0 < activity <= 1:
        raise ValueError(f"strongest cell: activity must be above 0 and at most 1, got {activity}")
    if thresholds is None:
        return None
    y = np.asarray(thresholds, dtype=np.float64)
    if not (y >= 1).all():
        raise ValueError(
            f"strongest cell: thresholds must be at least 1 (0 dB) for this formula, got {y.min():g}; "
            "below, several cells can pass at once and it would count them all"
        )
    return y
