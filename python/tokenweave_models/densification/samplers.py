"""Which sampler answers a question, with its table and its settings: the choice of a sweep's method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, log10, nan

import numpy as np

from tokenweave_models.densification.fading import Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_ops import (
    ConditionalSums,
    SinrGrid,
    SinrSums,
    rayleigh_conditional,
    sample_geometry,
    sample_power_domain,
)
from tokenweave_ops.sinr_field import HISTOGRAM_BINS, META_BINS, MOMENTS, RESIDUALS

METHODS = ("auto", "power", "geometry", "conditional", "exact")
POINTS = {"geometry": 256, "conditional": 64}
MOST_RESIDUAL_SHARE = 0.01  # of the interference in kernel G, the far field's standard deviation
MOST_DB = 10 * log10(SinrGrid.LARGEST_THRESHOLD)  # of a threshold, and the least is its negative
MOST_BIAS = 0.01  # of a coverage in kernel P, by its bound


@dataclass(frozen=True)
class Settings:
    """Of the samplers.

    Attributes:
        num_terms: powers taken one by one (method power).
        rate_nodes: strongest powers that the rate of a realisation is averaged over (power).
        num_points: base stations taken one by one (geometry, conditional); None is 256 or 64.
        residual: what stands for all others: "gauss", "mean" or "none".
    """

    num_terms: int = 16
    rate_nodes: int = 4
    num_points: int | None = None
    residual: str = "gauss"

    def __post_init__(self):
        if self.residual not in RESIDUALS:
            raise ValueError(f"sweep: residual must be {', '.join(RESIDUALS)}, got {self.residual!r}")
        for name, most in (("num_terms", 64), ("num_points", 1 << 20)):
            value = getattr(self, name)
            if value is not None and not (4 <= value <= most and value % 4 == 0):
                raise ValueError(f"sweep: {name} must be a multiple of 4 from 4 to {most}, got {value}")
        if not 0 <= self.rate_nodes <= 16:
            raise ValueError(f"sweep: rate_nodes must be 0 to 16, got {self.rate_nodes}")


@dataclass(frozen=True)
class Sampler:
    """A sampler bound to a network, densities and thresholds.

    Attributes:
        method: its name.
        run: ``run(first_realisation=..., num_realisations=...)``.
        items: of its sums: moments, then coverages.
        num_moments: how many of the items are moments: 3 or 0.
        histogram_shape: of its histogram.
        counts: whether a coverage is a count of realisations, so that none and all leave it uncertain.
        settings: plain values.
    """

    method: str
    run: Callable[..., SinrSums | ConditionalSums]
    items: int
    num_moments: int
    histogram_shape: tuple[int, ...]
    counts: bool
    settings: dict[str, object] = field(default_factory=dict)

    def bias_bound(self, mean_square_share: np.ndarray | None) -> np.ndarray:
        """On the bias of a coverage, from E[(standard deviation of the residual / interference)^2], ``[densities]``;
        nan unless the residual is "gauss": samplers know no deviation of another.

        Derived here, to leading order, for a coverage that falls with the interference no faster than its inverse. With
        mean and variance right, what is left is a sixth of the third derivative times the third cumulant. In the power
        domain no missing power exceeds the last one taken, which is below interference / (terms - 1), and that bounds
        the cumulant. In the geometry marks may be so uneven that only the second order bounds it.
        """
        if mean_square_share is None or self.settings["residual"] != "gauss":
            return np.full(self.histogram_shape[0], nan)
        if self.method == "geometry":
            return mean_square_share
        active_terms = float(self.settings["activity"]) * (int(self.settings["num_terms"]) - 1)
        return mean_square_share / max(1.0, active_terms)


def choose_method(network: Network, method: str, rate: bool) -> str:
    """The method that "auto" stands for, or the one asked for if it can answer.

    Raises:
        ValueError: it cannot, and what can.
    """
    if method not in METHODS:
        raise ValueError(f"sweep: method must be {', '.join(METHODS)}, got {method!r}")
    if rate and not network.rate_exists:
        raise ValueError(
            "sweep: rate must not be asked for where E ln(1 + mark) is infinite: so is the mean rate, at every density "
            f"(fading is {network.fading.describe()}); coverage exists"
        )
    nearest = network.association == "nearest"
    conditional = _why_not_conditional(network, rate) is None
    if method == "auto":
        method = "power" if not nearest else "conditional" if conditional else "geometry"
    if method == "power" and nearest:
        raise ValueError(
            "sweep: method must be geometry for association nearest: the power domain forgets distances; got power"
        )
    if method == "conditional" and not conditional:
        raise ValueError(f"sweep: method must be geometry: conditional {_why_not_conditional(network, rate)}")
    if method == "geometry" and not isfinite(network.fading.moment(1.0)):
        cure = "nothing samples the nearest cell then" if nearest else "use method power"
        raise ValueError(
            "sweep: method geometry needs marks of finite mean, which its far field is made of, got "
            f"{network.fading.describe()}; {cure}"
        )
    return method


def _why_not_conditional(network: Network, rate: bool) -> str | None:
    if type(network.fading) is not Rayleigh:
        return f"needs Rayleigh fading, got {network.fading.describe()}"
    if network.activity < 1:
        return f"needs activity 1, got {network.activity}"
    return "gives no rate: pass rate=False" if rate else None


def make_sampler(
    network: Network,
    method: str,
    densities_per_km2,
    thresholds: np.ndarray,
    *,
    rate: bool,
    settings: Settings,
    seed: int,
    device: str,
) -> Sampler:
    """``method`` is power, geometry or conditional; thresholds are linear."""
    grid = SinrGrid.make(network.scaled_density(densities_per_km2).tolist(), thresholds.tolist(), device)
    noise, num_densities = network.scaled_noise(), len(grid.densities)
    common = {"noise": noise, "seed": seed}
    if method == "power":
        options = {
            "num_terms": settings.num_terms,
            "rate_nodes": settings.rate_nodes if rate else 0,
            "residual": settings.residual,
            "activity": network.activity,
        }
        table = network.power_table(densities_per_km2, device)
        run = partial(sample_power_domain, table, grid, **common, **options)
    else:
        table = network.geometry_table(device)
        options = {"num_points": settings.num_points or POINTS[method]}
        common["association"] = network.association
        if method == "geometry":
            options |= {"residual": _geometry_residual(network, settings.residual), "activity": network.activity}
            run = partial(sample_geometry, table, grid, **common, **options)
        else:
            run = partial(rayleigh_conditional, table, grid, **common, **options)
    num_moments = 0 if method == "conditional" else len(MOMENTS)
    shape = (len(thresholds), META_BINS) if method == "conditional" else (HISTOGRAM_BINS,)
    return Sampler(
        method=method,
        run=run,
        items=num_moments + len(thresholds),
        num_moments=num_moments,
        histogram_shape=(num_densities, *shape),
        counts=method == "geometry",
        settings=options,
    )


def _geometry_residual(network: Network, residual: str) -> str:
    if residual == "gauss" and not isfinite(network.fading.moment(2.0)):
        cure = "; or use method power" if network.association == "strongest" else ""
        raise ValueError(
            "sweep: residual must be mean or none for method geometry where the marks have no variance, got gauss for "
            f"{network.fading.describe()}{cure}"
        )
    return residual


def check_residual_share(sampler: Sampler, shares: np.ndarray, densities_per_km2: np.ndarray) -> None:
    """Refuses a geometry whose far field matters: shares ``[densities]`` are the means of what the sampler reports.

    Raises:
        ValueError: one is above 1 %.
    """
    worst = int(np.nanargmax(shares)) if not np.isnan(shares).all() else 0
    if sampler.method == "geometry" and sampler.settings["residual"] == "gauss" and shares[worst] > MOST_RESIDUAL_SHARE:
        points = sampler.settings["num_points"]
        raise ValueError(
            "sweep: num_points must leave a far field whose standard deviation is at most 1 % of the interference, got "
            f"{shares[worst]:.1%} with {points} at {densities_per_km2[worst]:g}/km2; take more points or method power"
        )


def check_bias(sampler: Sampler, mean_square_shares: np.ndarray, densities_per_km2: np.ndarray) -> None:
    """Refuses a power domain whose normal residual matters, as where few of its terms are active.

    Raises:
        ValueError: the bound on the bias of a coverage is above 1 %.
    """
    bounds = sampler.bias_bound(mean_square_shares)
    worst = int(np.nanargmax(bounds)) if not np.isnan(bounds).all() else 0
    if sampler.method == "power" and bounds[worst] > MOST_BIAS:
        terms, activity = sampler.settings["num_terms"], sampler.settings["activity"]
        raise ValueError(
            "sweep: num_terms must leave so little that a coverage is off by at most 1 %, got a bound of "
            f"{min(bounds[worst], 1.0):.0%} with {terms} terms and activity {activity:g} at "
            f"{densities_per_km2[worst]:g}/km2; take up to 64 terms, or method geometry"
        )
