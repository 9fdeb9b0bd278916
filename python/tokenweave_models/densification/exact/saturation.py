"""The saturation law: inverse SIR Z = I / M of the strongest cell when the power measure is a pure power x^-delta.

It holds exactly, for every density and any fading with E[m^delta] finite, on a single slope of exponent 2 / delta
without noise; and it is the limit of infinite density of every network whose index rho = delta lies in (0, 1).

With M the strongest power and I the sum of the others,

    E exp(-s Z) = 1 / (1 + c(s)),   c(s) = delta * integral over (0, 1) of (1 - exp(-s u)) u^(-delta - 1) du,

the limit law of the sum over the maximum of heavy-tailed variables (Darling 1952). With y the SIR threshold,
P(SIR > y) = P(Z < 1 / y) comes in three pieces:

- y >= 1: y^-delta sin(pi delta) / (pi delta), since at most one cell exceeds the sum of the others (Dhillon, Ganti,
  Baccelli and Andrews 2012).
- 1/2 <= y < 1: minus a term for pairs of cells (Keeler, Blaszczyszyn and Karray 2013).
- y < 1/2: numerical inversion of the Laplace transform (Abate and Whitt's Euler algorithm), of the outage and with its
  exponential decay divided out, so that an outage of 1e-100 keeps its relative accuracy: it is within 1e-4 of
  60-digit arithmetic for delta 0.02 to 0.98, and the coverage within 3e-8.

All laws are float64, take delta in (0, 1) and raise ValueError for any other.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, gamma, pi

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

_NODES = 96  # of the quadrature over u in (0, 1): the inversion asks for |s| up to about 130
_FAR = 60.0  # from this real s on, 1 + c(s) is Gamma(1 - delta) s^delta, to exp(-60)
_EULER_TERMS = 60
_EULER_AVERAGED = 16
_AT_ONCE = 512
_EULER_DECAY = 23.0  # discretisation error exp(-23) = 1e-10; a larger one loses digits to cancellation


def laplace(delta: float, s: ArrayLike) -> np.ndarray:
    """E exp(-s Z) for real ``s`` >= 0 of any shape, same shape."""
    s = np.asarray(s, dtype=np.float64)
    if not (s >= 0).all():
        raise ValueError(f"saturation law: s must be real and not negative, got {s.min()}")
    near = 1.0 / (1.0 + np.minimum(s, _FAR) * _exponent_over_s(delta, np.minimum(s, _FAR)))
    far = np.maximum(s, _FAR) ** -delta / gamma(1.0 - delta)
    return np.where(s < _FAR, near, far)


def mean_inverse_sir(delta: float) -> float:
    """E[Z] = delta / (1 - delta)."""
    _check(delta)
    return delta / (1.0 - delta)


def coverage(delta: float, thresholds: ArrayLike) -> np.ndarray:
    """P(SIR > y) for linear ``thresholds`` y > 0 of any shape, same shape."""
    return _by_piece(delta, thresholds, lambda y: _coverage_of_one(delta, y), lambda y: 1.0 - _tilted(delta, y))


def outage(delta: float, thresholds: ArrayLike) -> np.ndarray:
    """P(SIR <= y) = 1 - coverage, with small relative error also where it is tiny: y far below 1."""
    return _by_piece(delta, thresholds, lambda y: 1.0 - _coverage_of_one(delta, y), lambda y: _tilted(delta, y))


def rate(delta: float) -> float:
    """E ln(1 + SIR), in nats: the integral over s of (1 - exp(-s)) / s * E exp(-s Z)."""
    _check(delta)
    # Panels that halve towards 0, where for delta near 1 the integrand bends at s about (1 - delta).
    edges = np.concatenate([[0.0], _FAR * 2.0 ** np.arange(-20, 1)])
    places, weights = special.roots_legendre(16)
    half = np.diff(edges)[:, None] / 2
    s = edges[:-1, None] + half * (1 + places)
    near = float((half * weights * -np.expm1(-s) / s * laplace(delta, s)).sum())
    return near + _FAR**-delta / (delta * gamma(1.0 - delta))


def outage_decay(delta: float) -> float:
    """The s0 > 0 of P(Z > z) ~ const * exp(-s0 z): an outage at threshold y falls like exp(-s0 / y)."""
    _check(delta)
    return _decay(delta)


# ------------------------------------------------------------------------------------------------------------- pieces


def _check(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"saturation law: delta must be between 0 and 1, got {delta}")


def _by_piece(delta: float, thresholds: ArrayLike, above, below) -> np.ndarray:
    _check(delta)
    y = np.asarray(thresholds, dtype=np.float64)
    if not (y > 0).all():
        raise ValueError(f"saturation law: thresholds must be positive (linear, not dB), got {y.min()}")
    result = np.empty(y.shape)
    high = y >= 0.5
    result[high], result[~high] = above(y[high]), below(y[~high])
    return result


def _coverage_of_one(delta: float, y: np.ndarray) -> np.ndarray:
    """For y >= 1/2: sum over cells of P(its SIR > y), less the pairs of cells where both exceed y < 1."""
    sinc = np.sinc(delta)  # sin(pi delta) / (pi delta)
    pairs = np.zeros(y.shape)
    below = y < 1
    t = (y[below] / (1 - y[below]))[:, None]
    v, weights = _jacobi(delta, delta)
    integral = (weights / ((t + v) * (t + 1 - v))).sum(axis=-1)
    t = t[:, 0]
    # In the product y is t / (1 + t), so that 1 - y loses no digits; t^-2delta (1 + 2 t) / 2 is the pairs' own scale.
    pairs[below] = t ** (-2 * delta) * delta * sinc**2 * (1 + 2 * t) / 2 * integral
    return y**-delta * sinc - pairs


def _tilted(delta: float, y: np.ndarray) -> np.ndarray:
    """The outage P(Z > z), z = 1 / y > 2, from exp(s0 z) P(Z > z), whose transform is (1 - L(s - s0)) / (s - s0)."""
    if len(y) > _AT_ONCE:  # bounds memory
        return np.concatenate([_tilted(delta, part) for part in np.array_split(y, len(y) // _AT_ONCE + 1)])
    decay = _decay(delta)
    z = 1.0 / np.maximum(y, decay / 800)  # beyond, the outage is 0 in float64
    steps = np.arange(_EULER_TERMS + _EULER_AVERAGED + 1)
    s = (_EULER_DECAY / 2 + 1j * pi * steps) / z[:, None] - decay
    slope = _exponent_over_s(delta, s)
    terms = (slope / (1 + s * slope)).real * (-1.0) ** steps
    terms[:, 0] /= 2
    sums = np.cumsum(terms, axis=1)[:, _EULER_TERMS:]
    average = np.array([comb(_EULER_AVERAGED, k) for k in range(_EULER_AVERAGED + 1)]) / 2.0**_EULER_AVERAGED
    return np.exp(_EULER_DECAY / 2 - decay * z) / z * (sums @ average)


def _exponent_over_s(delta: float, s: np.ndarray) -> np.ndarray:
    """c(s) / s for real or complex s of size up to about 130, s = 0 included."""
    _check(delta)
    u, weights = _jacobi(-delta, 0.0)
    if not np.iscomplexobj(s):
        x = s[..., None] * u
        safe = np.where(x == 0, 1.0, x)
        return delta * (np.where(x == 0, 1.0, -np.expm1(-safe) / safe) @ weights)
    # 1 - exp(-a - ib) without cancellation, from real functions: numpy's complex expm1 is ten times slower.
    a, b = s.real[..., None] * u, s.imag[..., None] * u
    fall = np.expm1(-a)
    real = (2 * np.sin(b / 2) ** 2 - fall * np.cos(b)) @ (weights / u)
    imag = ((1 + fall) * np.sin(b)) @ (weights / u)
    return delta * np.where(s == 0, weights.sum(), (real + 1j * imag) / np.where(s == 0, 1.0, s))


@lru_cache(maxsize=256)
def _jacobi(at_zero: float, at_one: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1) for the weight u^at_zero (1 - u)^at_one: exact where u^-delta is singular."""
    places, weights = special.roots_jacobi(_NODES, at_one, at_zero)
    return (1 + places) / 2, weights / 2 ** (1 + at_zero + at_one)


@lru_cache(maxsize=256)
def _decay(delta: float) -> float:
    """The root s0 of 1 + c(-s0) = 0."""

    def one_plus_c(s0: float) -> float:
        return 1.0 - s0 * float(_exponent_over_s(delta, np.array(-s0)))

    # c(-x) falls from 0 faster than -delta / (1 - delta) x, so the root is below (1 - delta) / delta.
    return optimize.brentq(one_plus_c, 0.0, min((1 - delta) / delta, 40.0), xtol=1e-15, rtol=1e-14)
