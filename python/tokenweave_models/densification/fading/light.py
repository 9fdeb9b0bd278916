"""Laws whose tail falls faster than any power: all moments are finite."""

from __future__ import annotations

from math import ceil, inf, lgamma, log, log10, sqrt

import numpy as np
from scipy import special

from tokenweave_models.densification.fading.base import Fading, LookedUp, check_shape

_LN10_OVER_10 = log(10.0) / 10.0  # nepers of power in a decibel
_RICE_FAR = 1e5  # times the mean: there ln P(m > x) is beyond -1e4


class NoFading(Fading):
    """Every mark is 1."""

    log_kinks = (0.0,)
    log_min = log_max = 0.0

    def log_survival(self, log_m):
        return np.where(np.asarray(log_m) < 0, 0.0, -inf)

    def log_quantile(self, e):
        return np.zeros(np.shape(e))

    def moment(self, power):
        return 1.0

    def describe(self):
        return "none"


class Rayleigh(Fading):
    """Power under Rayleigh fading: exponential, mean 1."""

    def log_survival(self, log_m):
        with np.errstate(over="ignore"):
            return -np.exp(log_m)

    def log_quantile(self, e):
        return np.log(e)

    def moment(self, power):
        return special.gamma(1 + power)

    def describe(self):
        return "rayleigh"


class Gamma(Fading):
    """Gamma with shape k, mean 1.

    Raises:
        ValueError: k is not 0.01 to 1000. There the mark is 1 within 3 %; more would be a jump to any quadrature.
    """

    def __init__(self, k: float) -> None:
        self.k = check_shape(type(self).__name__, self._shape_name, k, 0.01, 1000)

    _shape_name = "k"

    def log_survival(self, log_m):
        return log_gamma_survival(self.k, log(self.k) + np.asarray(log_m, dtype=np.float64))

    def moment(self, power):
        return float(np.exp(lgamma(self.k + power) - lgamma(self.k) - power * log(self.k)))

    def describe(self):
        return f"gamma:{self.k:g}"


class Nakagami(Gamma):
    """Power under Nakagami-m fading: gamma with shape m, mean 1.

    Raises:
        ValueError: m is not positive and finite.
    """

    _shape_name = "m"

    def describe(self):
        return f"nakagami:{self.k:g}"


class Rice(LookedUp):
    """Power under Rice fading: a constant path, of ``k_db`` dB relative to the scattered ones; mean 1.

    Raises:
        ValueError: k_db is not a number from -300 to 40 dB.
    """

    def __init__(self, k_db: float) -> None:
        self.k_db = check_shape("Rice", "k_db", k_db, -300, 40)
        self._k = 10 ** (self.k_db / 10)

    def _log_hazard_exact(self, log_m):
        y = (1 + self._k) * np.exp(np.clip(log_m, -700.0, 80.0))
        # Far out, b = sqrt(2 y): the integral over x > b of x exp(-(x^2 + a^2) / 2) I0(a x), to leading order.
        a, b = sqrt(2 * self._k), np.sqrt(2 * y)
        is_near = y < _RICE_FAR * (1 + self._k)
        b = np.where(is_near, 2 * a + 1, b)
        result = np.log(b / (b - a) * special.i0e(a * b)) - (b - a) ** 2 / 2
        near = y[is_near]
        parts = [self._mixture(part) for part in np.array_split(near, 1 + len(near) // 256)]
        result[is_near] = np.concatenate(parts)
        return np.log(-result)

    def _mixture(self, y: np.ndarray) -> np.ndarray:
        """A Poisson mixture, n ~ Poisson(K), of gamma laws of shape n + 1."""
        y = y[:, None]
        peak = max(self._k, sqrt(self._k * y.max(initial=0.0)))
        n = np.arange(ceil(peak + 12 * sqrt(peak) + 40))
        log_mixing = n * log(self._k) - self._k - special.gammaln(n + 1)
        with np.errstate(divide="ignore"):
            log_steps = n * np.log(y) - y - special.gammaln(n + 1)  # ln of y^n exp(-y) / n!
        log_above = special.logsumexp(log_mixing + np.logaddexp.accumulate(log_steps, axis=1), axis=1)
        steps = np.exp(log_steps)
        below = np.cumsum(steps[:, :0:-1], axis=1)[:, ::-1]  # P(gamma(n + 1) < y), where y is small
        log_below = np.log1p(-np.minimum((np.exp(log_mixing[:-1]) * below).sum(axis=1), 0.5))
        return np.where(log_above > -0.01, log_below, log_above)

    def moment(self, power):
        # Kummer's transformation of exp(-K) 1F1(1 + q; 1; K), which would overflow
        return float(special.gamma(1 + power) * special.hyp1f1(-power, 1, -self._k) / (1 + self._k) ** power)

    def describe(self):
        return f"rice:{self.k_db:g}dB"


class Weibull(Fading):
    """Weibull with shape k, mean 1: P(m > x) = exp(-(Gamma(1 + 1/k) x)^k).

    Raises:
        ValueError: k is not 0.01 to 30.
    """

    def __init__(self, k: float) -> None:
        self.k = check_shape("Weibull", "k", k, 0.01, 30)
        self._log_scale = -lgamma(1 + 1 / self.k)

    def log_survival(self, log_m):
        with np.errstate(over="ignore"):
            return -np.exp(self.k * (np.asarray(log_m) - self._log_scale))

    def log_quantile(self, e):
        return self._log_scale + np.log(e) / self.k

    def moment(self, power):
        return float(np.exp(lgamma(1 + power / self.k) + power * self._log_scale))

    def describe(self):
        return f"weibull:{self.k:g}"


class LogNormal(Fading):
    """Log-normal shadowing of standard deviation ``db`` dB, median 1.

    Light: it has all moments, though limits that depend on the tail are reached late.

    Raises:
        ValueError: db is not 0 to 300.
    """

    def __init__(self, db: float) -> None:
        self.db = check_shape("LogNormal", "db", db, 0, 300)
        self.sigma = self.db * _LN10_OVER_10
        if self.sigma == 0:
            self.log_kinks, self.log_min, self.log_max = (0.0,), 0.0, 0.0

    def log_survival(self, log_m):
        if self.sigma == 0:
            return NoFading().log_survival(log_m)
        return special.log_ndtr(-np.asarray(log_m, dtype=np.float64) / self.sigma)

    def log_quantile(self, e):
        return -self.sigma * special.ndtri_exp(-np.asarray(e, dtype=np.float64))

    def moment(self, power):
        return float(np.exp(min((power * self.sigma) ** 2 / 2, 709.0)))

    def describe(self):
        return f"lognormal:{self.db:g}dB"


def log_gamma_survival(k: float, log_y: np.ndarray) -> np.ndarray:
    """ln of the regularised upper incomplete gamma function of shape k at exp(log_y), without underflow."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        y = np.exp(np.minimum(log_y, 600.0))
        near = np.where(y < k, np.log1p(-special.gammainc(k, y)), np.log(special.gammaincc(k, y)))
        # Below the range of floats of P, its leading term.
        tiny = -np.exp(k * log_y - lgamma(k + 1))
        near = np.where(k * log_y - lgamma(k + 1) < -600, tiny, near)
        is_far = y > max(2 * k + 50.0, 100.0)
        if not is_far.any():
            return near
        far = np.where(is_far, y, 1e3 + 4 * k)
        # The continued fraction (DLMF 8.9.2) from below; at y > 2 k + 50 it needs few terms.
        fraction = far
        for n in range(60, 0, -1):
            fraction = far + (n - k) / (1 + n / fraction)
        return np.where(is_far, (k * np.log(far) - far) - lgamma(k) - np.log(fraction), near)


def db_of(sigma: float) -> float:
    """The standard deviation in dB of a log-normal factor whose logarithm has standard deviation sigma."""
    return sigma * 10 * log10(np.e)
