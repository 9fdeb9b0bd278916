"""Exact laws of the nearest cell under Rayleigh fading.

All lengths are in one unit u, densities per u^2, ``noise`` relative to the received power at distance u, thresholds T
linear, rates in nats. Functions of thresholds broadcast and keep shapes.

- Single slope r^beta: coverage 1 / (1 + F(T)) with the interference factor F (Andrews, Baccelli and Ganti 2011); noise
  and the height of the transmitters enter as one more factor.
- Any path loss l: given that the nearest cell is at distance r,

    P(SINR > T | r) = exp(-T l(r) W - 2 pi density J(r)),  J(r) = integral from r of v / (1 + l(v) / (T l(r))) dv,

  averaged over r of density 2 pi density r exp(-pi density r^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gamma, inf, log, pi
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from tokenweave_models.densification.exact._distances import Distances, interference_factor_of
from tokenweave_models.densification.exact._panels import LogPanels

if TYPE_CHECKING:
    from tokenweave_models.densification.path_loss import PathLoss


# ------------------------------------------------------------------------------------------------------- single slope


def interference_factor(thresholds: ArrayLike, exponent: float) -> np.ndarray:
    """F(T) = T^(2/beta) * integral from T^(-2/beta) of du / (1 + u^(beta/2)); sqrt(T) atan(sqrt(T)) for beta = 4."""
    _check_exponent(exponent)
    return interference_factor_of(_positive(thresholds), exponent)


def coverage_single_slope(
    thresholds: ArrayLike, exponent: float, *, density: float = 1.0, noise: float = 0.0, height: float = 0.0
) -> np.ndarray:
    """P(SINR > T) on the infinite plane with path loss (r^2 + height^2)^(beta/2).

    Without noise and height the density does not matter; with height alone the factor is
    exp(-pi density height^2 F(T)), derived here.
    """
    _check_exponent(exponent)
    thresholds = _positive(thresholds)
    _check_density([density])
    if noise < 0 or height < 0:
        raise ValueError(f"coverage_single_slope: noise and height must not be negative, got {noise}, {height}")
    factor = interference_factor_of(thresholds, exponent)
    # With v = r^2 + height^2: pi density * integral from height^2 of exp(pi density height^2 - a v - b v^(beta/2)) dv.
    a, b = pi * density * (1 + factor), thresholds * noise
    start = height**2
    without_noise = np.exp(-pi * density * start * factor) / (1 + factor)
    if noise == 0:
        return without_noise
    if exponent == 4 and height == 0:
        root = np.sqrt(b)
        return pi * density * np.sqrt(pi) / (2 * root) * special.erfcx(a / (2 * root))
    places, weights = special.roots_legendre(32)
    # x = a (v - start) runs to 40 in panels that shrink towards 0, where a strong noise ends the integral early.
    edges = np.concatenate([[0.0], np.geomspace(1e-14, 40.0, 48)])
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + places)).ravel()
    v = start + x / a[..., None]
    return without_noise * (np.exp(-x - b[..., None] * v ** (exponent / 2)) @ (half * weights).ravel())


def rate_single_slope(exponent: float) -> float:
    """E ln(1 + SIR) without noise: the integral over t of 1 / (1 + F(e^t - 1))."""
    _check_exponent(exponent)
    # The integrand bends like t^(2/beta) at 0 and falls like exp(-2 t / beta): panels in ln t suit both.
    panels = LogPanels.between(log(1e-16), log(40.0 * exponent / 2), 0.5)
    return float(panels.integral(1 / (1 + interference_factor_of(np.expm1(panels.x), exponent)))) + 1e-16


def ase_limit_with_height(exponent: float, height: float) -> float:
    """density * rate as the density grows, nats per u^2: (beta - 2) / (2 pi height^2)."""
    _check_exponent(exponent)
    if not height > 0:
        raise ValueError(f"ase_limit_with_height: height must be positive, got {height}")
    return (exponent - 2) / (2 * pi * height**2)


# -------------------------------------------------------------------------------------------------------- any path loss


def coverage(
    path_loss: PathLoss,
    densities: Sequence[float],
    thresholds: Sequence[float],
    *,
    noise: float = 0.0,
    activity: float = 1.0,
) -> np.ndarray:
    """P(SINR > T) for any path loss: float64 ``[densities, thresholds]``.

    ``activity``: probability that another cell transmits. On a finite disc the user without any cell is not covered.
    Relative error below 1e-6.
    """
    densities, thresholds = _check_density(densities), _positive(thresholds)
    if not noise >= 0:
        raise ValueError(f"coverage: noise must not be negative, got {noise}")
    return _coverage(Distances(path_loss, densities, thresholds), densities, thresholds, noise, activity)


def _coverage(
    distances: Distances, densities: np.ndarray, thresholds: np.ndarray, noise: float, activity: float
) -> np.ndarray:
    result = np.empty((len(densities), len(thresholds)))
    for column, threshold in enumerate(thresholds):
        beyond = 2 * pi * activity * distances.interference_beyond(threshold) + pi * distances.r**2
        signal = threshold * noise * distances.loss if noise > 0 else 0.0
        for row, density in enumerate(densities):
            ring = 2 * pi * density * distances.r
            result[row, column] = distances.panels.integral(ring * np.exp(-density * beyond - signal))
    return result


def rate(path_loss: PathLoss, densities: Sequence[float], *, noise: float = 0.0, activity: float = 1.0) -> np.ndarray:
    """E ln(1 + SINR) for any path loss, in nats: float64 ``[densities]``; the integral over t of coverage at e^t - 1.

    Relative error below 1e-4.
    """
    # In a deep deficit coverage ends at small t, near its limit it falls as slowly as exp(-2 t / far exponent).
    panels = LogPanels.between(log(1e-12), log(100.0), 2.5)
    densities, thresholds = _check_density(densities), np.expm1(panels.x)
    if not noise >= 0:
        raise ValueError(f"rate: noise must not be negative, got {noise}")
    distances = Distances(path_loss, densities, thresholds, width=1.0)  # a quarter of the nodes' pairs: 1e-5 or better
    return panels.integral(_coverage(distances, densities, thresholds, noise, activity))


def low_density_limit(path_loss: PathLoss, threshold: float) -> float:
    """Coverage without noise as the density falls: that of the far exponent alone (needs an infinite plane)."""
    if path_loss.r_inf < inf:
        raise ValueError("low_density_limit: the plane must be infinite; in a disc coverage falls to 0")
    if path_loss.far_exponent == inf:
        return 1.0
    return float(coverage_single_slope(threshold, path_loss.far_exponent))


def high_density_slope(path_loss: PathLoss) -> float:
    """d ln coverage / d ln density as the density grows: 0, or 1 - 2 / beta_0, or -inf in a flat near field.

    For beta_0 = 2 the slope tends to 0 while coverage falls, logarithmically.
    """
    near = path_loss.near_exponent
    return 0.0 if near >= 2 else (1 - 2 / near if near > 0 else -inf)


def high_density_coverage(path_loss: PathLoss, mean_power: float, density: float, threshold: float) -> float:
    """The asymptote of coverage at high density, for 0 < beta_0 and beta_0 != 2.

    beta_0 > 2: that of the single slope beta_0. beta_0 < 2: the interference concentrates on density * ``mean_power``
    (the integral of 2 pi r / l(r), for fading of unit mean), and P = pi Gamma(1 + 2/beta_0) (T mean_power)^(-2/beta_0)
    density^(1 - 2/beta_0), derived here.
    """
    near = path_loss.near_exponent
    if near > 2:
        return float(coverage_single_slope(threshold, near))
    if not 0 < near < 2:
        raise ValueError(f"high_density_coverage: the near exponent must be positive and not 2, got {near}")
    delta = 2 / near
    return pi * gamma(1 + delta) * (threshold * mean_power) ** -delta * density ** (1 - delta)


def bounded_ase_limit(path_loss: PathLoss, mean_power: float) -> float:
    """density * rate as the density grows, where l(0) > 0: (1 / l(0)) / mean_power, nats per u^2.

    ``mean_power`` as in :func:`high_density_coverage`. AlAmmouri, Andrews and Baccelli show that it saturates.
    """
    if not path_loss.is_bounded:
        raise ValueError("bounded_ase_limit: the path gain must be bounded (flat near field, height or min distance)")
    return float(np.exp(-path_loss.log_loss(np.array([-40.0]))[0])) / mean_power


# ------------------------------------------------------------------------------------------------------------- pieces


def _check_exponent(exponent: float) -> None:
    if not 2 < exponent < inf:
        raise ValueError(f"nearest cell: exponent must be above 2, or interference is infinite; got {exponent}")


def _check_density(densities: Sequence[float]) -> np.ndarray:
    densities = np.asarray(densities, dtype=np.float64)
    if not ((densities > 0) & (densities < inf)).all():
        raise ValueError(f"nearest cell: densities must be positive and finite, got {densities}")
    return densities


def _positive(thresholds: ArrayLike) -> np.ndarray:
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if not (thresholds > 0).all():
        raise ValueError(f"nearest cell: thresholds must be positive (linear, not dB), got {thresholds.min()}")
    return thresholds
