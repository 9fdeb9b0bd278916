"""Laplace transform and distribution of the total received power S = sum of a Poisson process of powers.

With P(g) the inverse of the power measure L1, the powers are P(arrival / density), so that

    E exp(-z S) = exp(-density Lambda(z)),   Lambda(z) = integral over g > 0 of (1 - exp(-z P(g))) dg.

In g the integrand stays smooth where L1 jumps (no fading, flat near field).
"""

from __future__ import annotations

from functools import cached_property
from math import comb, exp, inf, log, pi
from typing import TYPE_CHECKING

import numpy as np

from tokenweave_models.densification.exact._panels import LogPanels

if TYPE_CHECKING:
    from tokenweave_models.densification.power_measure import PowerMeasure

_FIRST = -75.0  # ln(density g) of the strongest power looked at: of probability exp(-75)
_LAST = 16.0  # beyond, powers enter by their mean and variance
_EULER_TERMS = 28
_EULER_AVERAGED = 12
_EULER_DECAY = 21.0  # discretisation error exp(-21) = 1e-9
_STEPS = (-1.0) ** np.arange(_EULER_TERMS + _EULER_AVERAGED + 1)
_STEPS[0] = 0.5
_AVERAGE = np.array([comb(_EULER_AVERAGED, k) for k in range(_EULER_AVERAGED + 1)]) / 2.0**_EULER_AVERAGED
_LARGEST = 700.0  # logarithm of the largest power that is told from infinity


class ReceivedPower:
    """The powers of one network at one density, on quadrature nodes g.

    ``panels``: of g; ``log_power``: ln P(g) there, float64 ``[nodes]``, falling; ``power``: P(g), clipped.
    """

    def __init__(self, measure: PowerMeasure, density: float):
        self.density = density
        high = min(_LAST - log(density), log(measure.total) if measure.total < inf else inf)
        corners = 2 * np.log(measure.path_loss.breakpoints) + log(pi)
        low = min(_FIRST - log(density), high - 40.0)
        # Transforms turn over within an e-fold of the power, which steep laws cross in a small step of g.
        steepness = np.abs(np.diff(measure.log_power(np.linspace(low, high - 1e-6, 200)))).max() / ((high - low) / 199)
        self.panels = LogPanels.between(low, high, 0.5 / min(max(steepness, 1.0), 4.0), corners)
        self.log_power = measure.log_power(self.panels.log_x)
        self.power = np.exp(np.clip(self.log_power, -_LARGEST, _LARGEST))
        ends = np.array([exp(high)])
        is_cut = high >= log(measure.total) if measure.total < inf else False
        self.far_mean = 0.0 if is_cut else float(np.ravel(measure.tail_mean(ends))[0])
        self.far_variance = 0.0 if is_cut else float(np.ravel(measure.tail_variance(ends))[0])

    def exponent(self, z: np.ndarray) -> np.ndarray:
        """Lambda(z) for real z >= 0: float64 ``[n]`` -> ``[n]``."""
        with np.errstate(over="ignore"):
            near = self.panels.integral(-np.expm1(-z[:, None] * self.power))
        return near + small_powers(z, self.far_mean, self.far_variance)

    def mean(self, z: np.ndarray) -> np.ndarray:
        """Lambda'(z): the mean of S per density, once tilted by exp(-z S)."""
        with np.errstate(over="ignore", under="ignore"):
            near = self.panels.integral(self.power * np.exp(-z[:, None] * self.power))
        return near + self.far_mean * np.exp(-z * self.far_variance / max(self.far_mean, 1e-300))

    def scales(self, spacing: float) -> np.ndarray:
        """Real z, geometrically spaced, from where all powers hardly matter to where all but the farthest do."""
        is_far = self.log_power < 300
        low, high = -self.log_power[is_far].max() - 10, -self.log_power.min() - 3
        return np.exp(np.arange(max(low, -300.0), min(high, 300.0), spacing))

    @cached_property
    def _beyond(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measure before each node, and mean and variance of the powers from each node on."""
        weights = self.panels.weights
        count = np.concatenate([[0.0], np.cumsum(weights)])
        power = np.minimum(self.power, 1e100)  # larger ones are never asked for
        moments = [weights * power, weights * power**2]
        mean, variance = (np.concatenate([np.cumsum(part[::-1])[::-1], [0.0]]) for part in moments)
        return count, mean + self.far_mean, variance + self.far_variance

    def tilted_cdf(self, t: np.ndarray, tilt: float, shift: float, density: float) -> np.ndarray:
        """exp(-tilt (t - shift)) P(S <= t) / E exp(-tilt (S - shift)), for ascending t > shift: float64 ``[n]``.

        The Euler algorithm of Abate and Whitt on S - shift, which a ``shift`` to the left edge of S spreads over its
        range however narrow it is. Absolute error about 1e-9 of the largest value.
        """
        start = density * (float(self.exponent(np.array([tilt]))[0])) if tilt else 0.0
        count, far_mean, far_variance = self._beyond
        result = np.empty(len(t))
        for place, span in enumerate(t - shift):
            base = _EULER_DECAY / (2 * span)
            s = tilt + base + 1j * pi / span * np.arange(len(_STEPS))
            # Powers so large that exp(-s P) vanishes count 1, those so small that it is linear enter by moments.
            first = np.searchsorted(-self.log_power, log(s[0].real) - log(45.0))
            last = np.searchsorted(-self.log_power, log(abs(s[-1])) + log(2e3))
            middle, weights = self.power[first:last], self.panels.weights[first:last]
            # exp(-s P) at equal steps of s, by multiplication.
            factor, step = np.exp(-s[0] * middle) * weights, np.exp(-1j * pi / span * middle)
            near = np.full(len(s), weights.sum(), dtype=np.complex128)
            for k in range(len(s)):
                near[k] -= factor.sum()
                factor *= step
            exponent = count[first] + near + small_powers(s, far_mean[last], far_variance[last])
            transform = np.exp(s * shift - density * exponent - (tilt * shift - start)) / s
            sums = np.cumsum((transform.real) * _STEPS)[_EULER_TERMS:]
            result[place] = np.exp(_EULER_DECAY / 2) / span * (sums @ _AVERAGE)
        return result


def small_powers(z: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """The integral of 1 - exp(-z P) over powers with z P small, from the integrals of P and P^2: as if all were alike,
    so that it stays between 0 and z * mean where they are not small."""
    if variance == 0:
        return z * mean
    return -(mean**2 / variance) * np.expm1(-z * (variance / mean))
