"""What a check of a law is, and the simulations that checks are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np

from tokenweave_models.densification import units
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.samplers import Settings, make_sampler
from tokenweave_models.densification.sweep import sweep
from tokenweave_ops import SinrGrid, sample_geometry, sample_power_domain
from tokenweave_ops.sinr_field import BATCH

FEWEST_EVENTS = 10  # expected, of outage: with fewer a standard error means nothing
KEPT_BATCHES = 16  # of realisations that are kept at a time


@dataclass(frozen=True)
class Check:
    """Of one number.

    Attributes:
        name: which number.
        value: by the law.
        estimate, error: by simulation, with its standard error.
        tolerance: None for an exact law; else how far the estimate may be from the value, relative to it.
        law: which law, said by the table of laws.
    """

    name: str
    value: float
    estimate: float
    error: float
    tolerance: float | None = None
    law: str = ""

    @property
    def z(self) -> float:
        """How many standard errors apart. What is exact to rounding has none, and must then be equal to 1e-9."""
        gap = self.estimate - self.value
        if self.error > 0:
            return gap / self.error
        return 0.0 if abs(gap) <= 1e-9 * abs(self.value) else inf

    @property
    def distance(self) -> float:
        return abs(self.estimate / self.value - 1)

    @property
    def is_within_tolerance(self) -> bool:
        """A limit is not held against the noise of the simulation: 3 standard errors are added."""
        return self.distance <= self.tolerance + 3 * self.error / abs(self.value)

    def within(self, law: str) -> Check:
        return replace(self, law=law)


def network(path_loss: str, fading: str = "rayleigh", noise: float = 0.0, association: str = "strongest") -> Network:
    """In units where noise is relative to the power received at 1 m on the near slope."""
    return Network(units.parse_path_loss(path_loss), units.parse_fading(fading), association, noise)


def per_km2(density_per_m2: float | Sequence[float]) -> np.ndarray:
    return np.atleast_1d(np.asarray(density_per_m2, dtype=np.float64)) * 1e6


@dataclass(frozen=True)
class Sampling:
    """How much and where. Every simulation of ``verify`` has the same seed."""

    num_realisations: int
    seed: int
    device: str

    def sweep(self, network: Network, densities_per_km2, thresholds=(), *, method: str = "auto", rate: bool = False,
              **settings) -> Result:  # fmt: skip
        """Thresholds are linear."""
        return sweep(
            network, densities_per_km2, 10 * np.log10(np.asarray(thresholds, dtype=np.float64)),
            num_realisations=self.num_realisations, method=method, rate=rate, settings=Settings(**settings),
            seed=self.seed, device=self.device,
        )  # fmt: skip

    def coverages(self, name: str, network: Network, density: float, thresholds, values, **given) -> list[Check]:
        """Of each threshold at one density per km^2; ``name`` has {} for the threshold. Left out is coverage so close
        to 1 that hardly a realisation would be in outage."""
        found = self.sweep(network, [density], thresholds, **given)
        return [
            Check(name.format(f"{threshold:g}"), float(value), float(estimate), float(error))
            for threshold, value, estimate, error in zip(
                thresholds, values, found.coverage[0], found.coverage_se[0], strict=True
            )
            if (1 - value) * self.num_realisations >= FEWEST_EVENTS
        ]

    def rate(self, name: str, network: Network, density: float, value: float, **given) -> Check:
        found = self.sweep(network, [density], rate=True, **given)
        return Check(name, float(value), float(found.rate_nats[0]), float(found.rate_se[0]))

    def mean_inverse_sir(self, network: Network, density: float) -> tuple[float, float]:
        """E[1 / SIR] and its standard error."""
        options = {"rate": False, "settings": Settings(), "seed": self.seed, "device": self.device}
        sampler = make_sampler(network, "power", [density], np.zeros(0), **options)
        found = sampler.run(first_realisation=0, num_realisations=self.num_realisations).inverse_sinr
        return float(found.mean[0]), float(found.standard_error[0])

    def log_powers(self, network: Network, density: float, method: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """In pieces: ln of signal and of interference, float64 ``[realisations]`` each, without noise."""
        grid = SinrGrid.make(network.scaled_density([density]).tolist(), (), self.device)
        if method == "power":
            table, sample = network.power_table([density], self.device), sample_power_domain
        else:
            table, sample = network.geometry_table(self.device), sample_geometry
        for first in range(0, self.num_realisations, KEPT_BATCHES * BATCH):
            count = min(KEPT_BATCHES * BATCH, self.num_realisations - first)
            which = {"seed": self.seed, "first_realisation": first, "num_realisations": count}
            found = sample(table, grid, keep_samples=True, **which)
            yield tuple(found.samples[0].cpu().numpy().astype(np.float64).T * np.log(2))

    def shares(self, names: Sequence[str], values: Sequence[float], conditions, pieces) -> list[Check]:
        """Of realisations that meet each condition, a function of the pieces of :meth:`log_powers`."""
        counts = sum(np.array([condition(*piece).sum() for condition in conditions]) for piece in pieces)
        shares = counts / self.num_realisations
        return [
            Check(name, float(value), float(share), sqrt(value * (1 - value) / self.num_realisations))
            for name, value, share in zip(names, values, shares, strict=True)
        ]
