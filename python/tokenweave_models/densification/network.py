"""A network: path loss, fading, who serves the user, noise and load. Everything that cannot be is refused here.

Base stations form a homogeneous Poisson process and all transmit with the same power; the user is at the origin.
Densities come in per km^2 and leave, like noise, in the unit of length of the path loss and relative to its gain there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite, nan

import numpy as np

from tokenweave_models.densification.fading import Fading
from tokenweave_models.densification.path_loss import PathLoss
from tokenweave_models.densification.power_measure import PowerMeasure, geometry_table
from tokenweave_models.densification.regime import Regime, classify
from tokenweave_ops import GeometryTable, PowerTable, SinrGrid

ASSOCIATIONS = ("strongest", "nearest")
M2_PER_KM2 = 1e6


@dataclass(frozen=True, eq=False)
class Network:
    """What a sweep is made of.

    Attributes:
        path_loss: how the received power falls with distance.
        fading: the law of the marks: shadowing, fading and antenna gain in one factor per base station.
        association: "strongest" (by received power, fading included) or "nearest" (by distance).
        noise: its power relative to the transmit power, linear.
        activity: probability that a base station which does not serve the user transmits.

    Raises:
        ValueError: a value is outside its range, or the interference of all base stations is infinite.
    """

    path_loss: PathLoss
    fading: Fading
    association: str = "strongest"
    noise: float = 0.0
    activity: float = 1.0

    def __post_init__(self):
        _check("association", self.association in ASSOCIATIONS, "strongest or nearest", repr(self.association))
        _check("noise", self.noise >= 0 and isfinite(self.noise), "a finite power of at least 0", self.noise)
        _check("activity", 0 < self.activity <= 1, "above 0 and at most 1", self.activity)
        if self.path_loss.r_inf == inf:
            self._check_plane()

    def _check_plane(self) -> None:
        """Whether the sum of all received powers is finite. The path loss has seen to its own part of that."""
        far, alpha = self.path_loss.far_exponent, self.fading.tail_index
        least = 2 / far
        needs = (
            f"of a tail index above 2 / (last exponent) = {least:g} on the infinite plane, or interference is "
            "infinite; or give the path loss a radius, r_inf_m"
        )
        exists = alpha > least and (far == inf or isfinite(self.fading.moment(least)))
        _check("fading", exists, needs, f"{alpha:g} ({self.fading.describe()})")

    @cached_property
    def power_measure(self) -> PowerMeasure:
        return PowerMeasure(self.path_loss, self.fading)

    @cached_property
    def _regime(self) -> Regime:
        regime = classify(self.path_loss, self.fading)
        if self.association == "strongest" or regime.rho == regime.delta_0 < inf:
            return regime
        # The nearest cell gains nothing from large marks: where they decide, its exponents are others.
        note = "the regime is that of the strongest cell; no exponents are predicted for the nearest one here"
        return replace(regime, exponents=dict.fromkeys(regime.exponents, nan), warnings=[*regime.warnings, note])

    @cached_property
    def _tables(self) -> dict:
        return {}

    def regime(self) -> Regime:
        """What theory says of dense networks like this one."""
        return self._regime

    @property
    def rate_exists(self) -> bool:
        """Whether E ln(1 + mark) is finite. If not, so is no mean rate, at any density."""
        return self.fading.log_mean_exists

    def scaled_density(self, densities_per_km2) -> np.ndarray:
        """Per square of the path loss's unit of length.

        Raises:
            ValueError: a density is not positive, or beyond 1e-25 to 1e25 per square of that unit.
        """
        densities = np.asarray(densities_per_km2, dtype=np.float64)
        wrong = densities[~((densities > 0) & (densities < inf))]
        _check("densities_per_km2", wrong.size == 0, "positive and finite", wrong[:1])
        scaled = densities / M2_PER_KM2 * self.path_loss.unit_m**2
        most = SinrGrid.LARGEST_DENSITY
        wrong = densities[~((scaled >= 1 / most) & (scaled <= most))]
        unit = f"such that a square of {self.path_loss.unit_m:g} m, the path loss's unit of length, has "
        words = unit + f"{1 / most:g} to {most:g} base stations"
        _check("densities_per_km2", wrong.size == 0, words, wrong[:1])
        return scaled

    def fingerprint(self) -> str:
        """Of the values of path loss and fading: what is read from a file may change under the same description."""
        loss = self.path_loss.log_loss(np.linspace(-20.0, 20.0, 401))
        marks = self.fading.log_quantile(np.geomspace(1e-9, 20.0, 401))
        values = np.clip(np.concatenate([loss, marks]), -1e9, 1e9)
        return hashlib.sha256(" ".join(f"{value:.6f}" for value in values).encode()).hexdigest()[:16]

    def scaled_noise(self) -> float:
        """Relative to the power received at the unit of length, without height and fading."""
        return self.noise / self.path_loss.gain_at_unit

    def empty_probability(self, densities_per_km2) -> np.ndarray:
        """That no base station is there (a finite radius), so that the SINR is 0."""
        return np.exp(-self.scaled_density(densities_per_km2) * self.power_measure.total)

    def power_table(self, densities_per_km2, device="cpu") -> PowerTable:
        """For :func:`tokenweave_ops.sample_power_domain` at these densities; built once for each range of them."""
        return self._power_table(densities_per_km2)[0].to(device)

    def table_error(self, densities_per_km2) -> float:
        """The largest error of a power in that table, in log2."""
        return self._power_table(densities_per_km2)[1]

    def _power_table(self, densities_per_km2) -> tuple[PowerTable, float]:
        densities = self.scaled_density(densities_per_km2)
        key = float(densities.min()), float(densities.max())
        if key not in self._tables:
            # Neither a wider table that happens to be there nor the curves of a measure that was asked before: the bits
            # of a sweep must not depend on what went before it.
            measure = PowerMeasure(self.path_loss, self.fading)
            self._tables[key] = measure.power_table(key), measure.table_error
        return self._tables[key]

    def geometry_table(self, device="cpu") -> GeometryTable:
        """For :func:`tokenweave_ops.sample_geometry` and :func:`tokenweave_ops.rayleigh_conditional`."""
        if "geometry" not in self._tables:
            self._tables["geometry"] = geometry_table(self.path_loss, self.fading)
        return self._tables["geometry"].to(device)

    def describe(self) -> dict[str, object]:
        """Plain values that say which network this is."""
        return {
            "path_loss": self.path_loss.describe(),
            "fading": self.fading.describe(),
            "association": self.association,
            "noise": self.noise,
            "activity": self.activity,
        }


def _check(name: str, is_good: bool, words: str, value: object) -> None:
    if not is_good:
        raise ValueError(f"Network: {name} must be {words}, got {value}")
