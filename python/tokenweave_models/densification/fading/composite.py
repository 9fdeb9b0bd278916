"""Products of independent marks, such as fading times shadowing."""

from __future__ import annotations

from functools import cached_property
from math import hypot, inf

import numpy as np

from tokenweave_models.densification.fading.base import SMALLEST_E, Fading, LookedUp, check_shape
from tokenweave_models.densification.fading.light import LogNormal, NoFading, Rayleigh, db_of
from tokenweave_models.densification.log_domain import log_integral

_TINY = 1e-300
_MOST = 1e4  # quantiles of either factor are looked at closely as far as exp(-1e4)


class Product(LookedUp):
    """The product of two independent marks; its survival function is an integral, computed once and looked up.

    Tail: the heavier factor's index; its constant times the moment of the other of that order where that is finite
    (Breiman's lemma), else not known.
    """

    largest_e = 2e3

    def __init__(self, first: Fading, second: Fading) -> None:
        self.factors = first, second
        # Away from where a factor was cut off, which is a kink here.
        self.smallest_e = 1e4 * max(getattr(law, "smallest_e", SMALLEST_E / 1e4) for law in self.factors)
        # The heavier one is asked for its survival and the lighter for its quantiles, which stay near e = 1.
        self._heavy, self._light = sorted(
            self.factors, key=lambda law: (law.tail_index, -float(law.log_quantile(np.array([1e3]))[0]))
        )
        self.tail_index = self._heavy.tail_index
        if 0 < self.tail_index < inf and self._light.moment(self.tail_index) < inf:
            self.tail_constant = self._heavy.tail_constant * self._light.moment(self.tail_index)
        self.log_min = first.log_min + second.log_min
        self.log_max = first.log_max + second.log_max
        self.log_kinks = tuple(a + b for a in first.log_kinks for b in second.log_kinks)

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        roots = np.arange(1.0, np.sqrt(_MOST) + 1) ** 2
        kinks = -self._light.log_survival(np.array(self._light.log_kinks, dtype=np.float64))
        own = [[0.0], np.exp(np.arange(-97.0, 0.0, 2.0)), roots, _MOST * 2.0 ** np.arange(1, 20), kinks[kinks < inf]]
        own = np.concatenate(own)
        return own, self._heavy.log_edges(_MOST)

    def _mixture(self, log_probability, log_m: np.ndarray) -> np.ndarray:
        """ln E exp(log_probability(log_m - ln light)), over e of the light factor: its mark is that of exp(-e)."""
        own, heavy_edges = self._edges
        crossing = -self._light.log_survival(log_m[:, None] - heavy_edges)
        edges = np.concatenate(
            [np.broadcast_to(own, (len(log_m), len(own))), np.clip(crossing, 0.0, own.max())], axis=1
        )

        def log_integrand(rows, e):
            return log_probability(log_m[rows] - self._light.log_quantile(np.maximum(e, _TINY))) - e

        return log_integral(log_integrand, np.sort(edges, axis=1))

    def _log_hazard_exact(self, log_m: np.ndarray) -> np.ndarray:
        above = self._mixture(self._heavy.log_survival, log_m)
        result = np.log(np.maximum(-above, _TINY))
        is_low = above > -0.1  # then the complement is the exact one
        if is_low.any():
            below = self._mixture(_log_cdf(self._heavy), log_m[is_low])
            with np.errstate(divide="ignore"):
                result[is_low] = np.where(below < -30, below, np.log(-np.log1p(-np.exp(below))))
        return result

    def moment(self, power):
        first, second = (law.moment(power) for law in self.factors)
        return first * second

    def log_sample(self, rng, size):
        return self.factors[0].log_sample(rng, size) + self.factors[1].log_sample(rng, size)

    @property
    def log_mean_exists(self):
        return all(law.log_mean_exists for law in self.factors)

    def describe(self):
        return "*".join(law.describe() for law in self.factors)


class Suzuki(Product):
    """Rayleigh fading times log-normal shadowing of ``db`` dB: mean of the first 1, median of the second 1.

    Raises:
        ValueError: db is not 0.01 to 300.
    """

    def __init__(self, db: float) -> None:
        super().__init__(Rayleigh(), LogNormal(check_shape("Suzuki", "db", db, 0.01, 300)))


def product(first: Fading, second: Fading) -> Fading:
    """The law of the product, in closed form where there is one."""
    if isinstance(first, NoFading) or (isinstance(first, LogNormal) and first.sigma == 0):
        return second
    if isinstance(second, NoFading) or (isinstance(second, LogNormal) and second.sigma == 0):
        return first
    if isinstance(first, LogNormal) and isinstance(second, LogNormal):
        return LogNormal(db_of(hypot(first.sigma, second.sigma)))
    if isinstance(second, LogNormal) and type(first) is Rayleigh:
        return Suzuki(second.db)
    if isinstance(first, LogNormal) and type(second) is Rayleigh:
        return Suzuki(first.db)
    return Product(first, second)


def _log_cdf(law: Fading):
    def log_cdf(log_m):
        with np.errstate(divide="ignore"):
            return np.log(-np.expm1(law.log_survival(log_m)))

    return log_cdf
