"""What every law of marks can do."""

from __future__ import annotations

from functools import cached_property
from math import inf, isfinite, log

import numpy as np

from tokenweave_models.densification.log_domain import LogCurve, log_integral

SMALLEST_E = 1e-40  # of a quantile: no integral and no sample feels what is below
_LEAST_E = 1e-120  # that a quantile is told from another; products of marks feel their factors so far
_LOW_EDGES = np.exp(np.arange(-37.0, 0.1, 1.25))  # of e below 1
_STEEPEST = 1e300  # ln of marks beyond is not told from infinity


class Fading:
    """Base of all laws of a mark m >= 0. In logarithms throughout: marks of heavy tails overflow any float.

    A subclass sets the attributes and defines :meth:`log_survival` and :meth:`describe`; quantiles and moments are
    then computed, or defined where they have a closed form.

    Attributes:
        tail_index: alpha, where P(m > x) varies regularly with index -alpha; 0 if it varies slowly, inf if it falls
            faster than any power (log-normal too).
        tail_constant: c of P(m > x) ~ c x^-alpha; nan where the law has no such tail, or its c is not known.
        log_kinks: ln m where the survival function has a kink or a jump.
        log_min, log_max: ln of the ends of the support; -inf and inf if unbounded.
    """

    tail_index: float = inf
    tail_constant: float = np.nan
    log_kinks: tuple[float, ...] = ()
    log_min: float = -inf
    log_max: float = inf

    def log_survival(self, log_m: np.ndarray) -> np.ndarray:
        """ln P(mark > exp(log_m)), any shape; 0 at -inf. Relative to itself exact, also where it is close to 0."""
        raise NotImplementedError

    def describe(self) -> str:
        """The law in the words of the command line."""
        raise NotImplementedError

    @cached_property
    def _log_hazard(self) -> LogCurve:
        """ln of e = -ln P(mark > exp(log_m)) over log_m."""

        def log_hazard(log_m):
            return np.log(np.maximum(-self.log_survival(log_m), 5e-324))

        ends = {"low": self.log_min, "high": self.log_max}
        return LogCurve(log_hazard, kinks=self.log_kinks, tolerance=1e-13, **ends)

    def log_quantile(self, e: np.ndarray) -> np.ndarray:
        """ln m with P(mark > m) = exp(-e), e > 0, any shape."""
        return self._log_hazard.inverse(np.log(np.maximum(e, _LEAST_E)), 1)

    def moment(self, power: float) -> float:
        """E[mark^power], power >= 0; inf where it does not exist. (At the tail index itself taken as inf.)"""
        _check_power(power)
        if power == 0:
            return 1.0
        if power >= self.tail_index:
            return inf
        # Integrand exp(power Q(e) - e): where the tail is heavy it falls slowly, so panels end at 80 / (1 - q / alpha).
        far = 80.0 / (1 - power / self.tail_index) if isfinite(self.tail_index) else 80.0
        roots = np.arange(1.0, 120.0) ** 2
        edges = np.concatenate([[0.0], _LOW_EDGES, roots, far * 2.0 ** np.arange(-16.0, 1.0)])
        edges = np.unique(np.concatenate([edges, -self.log_survival(np.array(self.log_kinks, dtype=np.float64))]))
        edges = edges[np.isfinite(edges)]

        def log_integrand(rows, e):
            return power * self.log_quantile(np.maximum(e, SMALLEST_E)) - e

        return float(np.exp(log_integral(log_integrand, edges[None, :])[0]))

    @property
    def log_mean_exists(self) -> bool:
        """Whether E ln(1 + mark) is finite."""
        return self.tail_index > 0

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
        """Marks, float64; inf where one is beyond the range of floats."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_sample(rng, size))

    def log_sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
        """ln of marks, float64."""
        return self.log_quantile(np.maximum(rng.exponential(size=size), SMALLEST_E))

    def log_edges(self, most: float) -> np.ndarray:
        """ln m between which a panel of an integral should not reach, float64 ascending: kinks, and quantiles as far
        as e = ``most``, spaced as a peak where the hazard is e is wide: by 2 sqrt(e). A tail of power laws goes on."""
        e = np.concatenate([_LOW_EDGES, np.arange(2.0, np.sqrt(most) + 1) ** 2])
        if 0 < self.tail_index < inf:
            e = np.append(e, e[-1] * 2.0 ** np.arange(1, 50))
        v = np.concatenate([self.log_quantile(e), self.log_kinks, [self.log_min, self.log_max]])
        return np.unique(v[np.abs(v) < _STEEPEST])

    def __mul__(self, other: Fading) -> Fading:
        """The law of the product of two independent marks."""
        if not isinstance(other, Fading):
            return NotImplemented
        from tokenweave_models.densification.fading.composite import product  # which knows this module

        return product(self, other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


class LookedUp(Fading):
    """A law whose survival function is costly: computed once as a curve, ln of the hazard e over ln m, and looked up.

    A subclass defines :meth:`_log_hazard_exact`. Beyond ``largest_e`` ln e of a light tail goes on as a straight line.
    """

    smallest_e = SMALLEST_E  # below, P(mark > m) counts as 1
    largest_e = 1e6

    def _log_hazard_exact(self, log_m: np.ndarray) -> np.ndarray:
        """ln of -ln P(mark > exp(log_m)), float64 ``[n]``."""
        raise NotImplementedError

    @cached_property
    def _log_hazard(self) -> LogCurve:
        low, high = self._looked_up
        return LogCurve(self._log_hazard_exact, kinks=self.log_kinks, low=low, high=high, tolerance=1e-10)

    @cached_property
    def _looked_up(self) -> tuple[float, float]:
        """ln m below which P(mark > m) counts as 1, and above which the curve of a light tail is not followed."""
        highest = self._place_of(log(self.largest_e)) if self.tail_index == inf else inf
        return self._place_of(log(self.smallest_e)), highest

    def _place_of(self, log_e: float) -> float:
        """ln m of a hazard, from the law itself, which need not be finite far beyond."""
        middle = float(np.clip(0.0, self.log_min, self.log_max))
        ends = np.clip(middle + np.array([-800.0, 800.0]), self.log_min, self.log_max)
        for _ in range(12):
            places = np.linspace(*ends, 18)[1:-1]
            with np.errstate(all="ignore"):
                found = self._log_hazard_exact(places)
            is_below = np.where(np.isfinite(found), found < log_e, places < middle)
            first = int(np.argmin(is_below)) if not is_below.all() else len(places)
            ends = np.array([ends[0], *places, ends[1]])[[first, first + 1]]
        return float(ends[1] if log_e < 0 else ends[0])

    def log_survival(self, log_m):
        log_m = np.asarray(log_m, dtype=np.float64)
        low, high = self._looked_up
        inside = (log_m > low) & (log_m < self.log_max)
        result = np.where(log_m <= low, 0.0, -inf)
        looked_up = np.minimum(log_m[inside], high)
        log_e = self._log_hazard(looked_up)
        if isfinite(high):
            log_e += self._log_hazard.slope(np.array([high])) * (log_m[inside] - looked_up)
        with np.errstate(over="ignore"):
            result[inside] = -np.exp(log_e)
        return result


def _check_power(power: float) -> None:
    if not 0 <= power < inf:
        raise ValueError(f"moment: power must be 0 or more and finite, got {power}")


def check_shape(owner: str, name: str, value: float, least: float, most: float) -> float:
    """Raises ValueError unless the value is in the range that curves and tables of the law were tried in."""
    if not least <= value <= most:
        raise ValueError(f"{owner}: {name} must be {least:g} to {most:g}, got {value}")
    return float(value)
