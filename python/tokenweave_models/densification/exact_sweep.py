"""A sweep by formulas instead of samples: which exact law answers which question, and what none of them does."""

from __future__ import annotations

from math import inf

import numpy as np

from tokenweave_models.densification.exact import nearest, saturation, strongest
from tokenweave_models.densification.fading import Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope


def exact_means(
    network: Network, densities_per_km2: np.ndarray, thresholds: np.ndarray, rate: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage ``[D, T]`` at linear thresholds and rate ``[D]`` in nats, nan if not asked for.

    Raises:
        ValueError: no exact law is known for the question.
    """
    densities, noise = network.scaled_density(densities_per_km2), network.scaled_noise()
    if network.association == "nearest":
        return _nearest(network, densities, thresholds, noise, rate)
    if _is_scale_free(network) and noise == 0:  # the same at every density
        delta = 2 / network.path_loss.far_exponent
        coverage = np.tile(saturation.coverage(delta, thresholds), (len(densities), 1))
        return coverage, np.full(len(densities), saturation.rate(delta) if rate else np.nan)
    coverage = _strongest_coverage(network, densities, thresholds, noise)
    if not rate:
        return coverage, np.full(len(densities), np.nan)
    options = {"noise": noise, "activity": network.activity}
    return coverage, np.array([strongest.rate(network.power_measure, density, **options) for density in densities])


def _nearest(network, densities, thresholds, noise, rate) -> tuple[np.ndarray, np.ndarray]:
    if type(network.fading) is not Rayleigh:
        raise ValueError(
            "sweep: method exact knows the nearest cell under Rayleigh fading only, got "
            f"{network.fading.describe()}; use method geometry"
        )
    options = {"noise": noise, "activity": network.activity}
    coverage = np.zeros((len(densities), 0))
    if len(thresholds):
        coverage = nearest.coverage(network.path_loss, densities, thresholds, **options)
    if not rate:
        return coverage, np.full(len(densities), np.nan)
    return coverage, nearest.rate(network.path_loss, densities, **options)


def _strongest_coverage(network, densities, thresholds, noise) -> np.ndarray:
    if (thresholds < 1).any():
        raise ValueError(
            "sweep: thresholds_db must be at least 0 for method exact, but on a single slope without noise and with "
            f"all cells active; got {10 * np.log10(thresholds.min()):g}; use method power"
        )
    if not len(thresholds):
        return np.zeros((len(densities), 0))
    if _is_scale_free(network):
        exponent = network.path_loss.far_exponent
        moment = network.fading.moment(2 / exponent)
        options = {"moment": moment, "noise": noise}
        rows = [strongest.coverage_single_slope(thresholds, exponent, density=one, **options) for one in densities]
        return np.stack(rows)
    if type(network.fading) is Rayleigh and network.activity == 1:
        return strongest.coverage_rayleigh(network.path_loss, densities, thresholds, noise=noise)
    options = {"noise": noise, "activity": network.activity}
    return np.stack([strongest.coverage(network.power_measure, one, thresholds, **options) for one in densities])


def _is_scale_free(network: Network) -> bool:
    """One slope on the infinite plane and all cells active, so that L1 is a power."""
    law = network.path_loss
    is_power = isinstance(law, MultiSlope) and len(law.breakpoints) == 0 and law.near_exponent > 0 and law.r_inf == inf
    return is_power and network.activity == 1
