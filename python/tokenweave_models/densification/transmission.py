"""Several antennas per base station, nearest cell: signal and interference have gamma marks, each of its own shape.

With Rayleigh fading between each antenna and the user, the power of the signal is gamma with as many degrees as there
are antennas left to strengthen it, and that of an interferer gamma with as many as it sends streams. Given the serving
cell at r, with s = T l(r) / (scale of the signal), coverage is the sum over k below the signal's shape of the
coefficients of x^k in

    exp(-s (1 - x) W - 2 pi density * integral from r of (1 - E exp(-s (1 - x) m / l(v))) v dv),

all of which are positive, so that no digits are lost (derived here).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, pi

import numpy as np
from scipy import special

from tokenweave_models.densification.exact._panels import LogPanels
from tokenweave_models.densification.fading import Rayleigh
from tokenweave_models.densification.network import Network

MOST_ANTENNAS = 64


@dataclass(frozen=True)
class Transmission:
    """How a base station uses its antennas: laws of the two marks, in units of one antenna's mean power.

    Attributes:
        name: of the scheme.
        signal_shape, signal_scale: of the gamma law of the serving cell's mark; the shape is a whole number.
        interferer_shape, interferer_scale: of all others'; the mean of their product is the power sent, 1.
        streams: users served at a time, by which the rate and coverage per area are multiplied.
    """

    name: str
    signal_shape: int
    signal_scale: float
    interferer_shape: float
    interferer_scale: float
    streams: int = 1


def single_antenna() -> Transmission:
    """Rayleigh fading of signal and interference."""
    return Transmission("siso", 1, 1.0, 1.0, 1.0)


def maximum_ratio(antennas: int) -> Transmission:
    """One user, towards whom all antennas add up (MRT): signal gamma(antennas), interference as of one antenna."""
    return Transmission("mrt", _checked("antennas", antennas, 1, MOST_ANTENNAS), 1.0, 1.0, 1.0)


def space_time_code(antennas: int) -> Transmission:
    """One user, an orthogonal code that spreads the power over all antennas (OSTBC); its loss of rate is not counted.

    An interferer is taken as ``antennas`` independent streams of equal power.
    """
    _checked("antennas", antennas, 1, MOST_ANTENNAS)
    return Transmission("ostbc", antennas, 1 / antennas, antennas, 1 / antennas)


def zero_forcing(antennas: int, users: int) -> Transmission:
    """``users`` at a time that do not hear each other (SDMA): signal gamma(antennas - users + 1), the power shared."""
    _checked("users", users, 1, _checked("antennas", antennas, 1, MOST_ANTENNAS))
    return Transmission("sdma", antennas - users + 1, 1 / users, users, 1 / users, streams=users)


def coverage(network: Network, transmission: Transmission, densities_per_km2, thresholds_db) -> np.ndarray:
    """P(SINR of a user > threshold): float64 ``[densities, thresholds]``. Relative error below 1e-5.

    Raises:
        ValueError: the network's association is not nearest, or its fading not Rayleigh.
    """
    if network.association != "nearest" or type(network.fading) is not Rayleigh:
        raise ValueError(
            "transmission: the network must be of association nearest and Rayleigh fading, got "
            f"{network.association}, {network.fading.describe()}"
        )
    densities = network.scaled_density(np.atleast_1d(densities_per_km2))
    thresholds = 10 ** (np.atleast_1d(np.asarray(thresholds_db, dtype=np.float64)) / 10)
    noise = network.scaled_noise()
    field = _Field(network, densities, thresholds)
    result = np.empty((len(densities), len(thresholds)))
    for column, threshold in enumerate(thresholds):
        interference = field.coefficients(threshold, transmission)
        signal = threshold * noise * field.loss / transmission.signal_scale
        for row, density in enumerate(densities):
            terms = 2 * pi * network.activity * density * interference
            terms[:2] += signal  # of exp(-s (1 - x) W)
            ring = 2 * pi * density * field.r * np.exp(-pi * density * field.r**2)
            result[row, column] = field.panels.integral(ring * _sum_of_exponential(terms))
    return result


def _sum_of_exponential(terms: np.ndarray) -> np.ndarray:
    """The sum of the coefficients of exp(-terms[0] + terms[1] x + ... + terms[n-1] x^(n-1)), up to x^(n-1)."""
    powers = [np.exp(-terms[0])]
    for n in range(1, len(terms)):
        powers.append(sum(k * terms[k] * powers[n - k] for k in range(1, n + 1)) / n)
    return sum(powers)


class _Field:
    """Nodes of the distance of the serving cell, and integrals over the interferers beyond."""

    def __init__(self, network: Network, densities: np.ndarray, thresholds: np.ndarray):
        law = network.path_loss
        corners = law.log_corners()
        scales = [0.0, -0.5 * log(densities.max()), *corners]
        if 0 < law.near_exponent < 2:
            scales.append(-log(densities.max() * max(thresholds.max(), 1.0)) / law.near_exponent)
        if law.r_inf < inf:
            high = log(law.r_inf)
        else:
            high = max(*scales, 0.5 * log(50 / (pi * densities.min()))) + log(1e4)
        self.panels = LogPanels.between(min(*scales, high) - 18.0, high, 0.5, corners)
        self.r = self.panels.x
        log_loss = law.log_loss(self.panels.log_x)
        with np.errstate(over="ignore"):
            self.loss = np.exp(log_loss)
            self._loss_ratio = np.exp(log_loss - log_loss[:, None])  # l(v) / l(r), rows r
        self._weights = (self.panels.from_each(np.eye(len(self.r))) * self.r[:, None]).T
        self._far = np.zeros(len(self.r))
        if law.r_inf == inf and law.far_exponent < inf:  # l(r) times the integral of v / l(v) beyond the last panel
            at_end = float(law.log_loss(np.array([high]))[0])
            self._far = np.exp(log_loss - at_end + 2 * high) / (law.far_exponent - 2)

    def coefficients(self, threshold: float, transmission: Transmission) -> np.ndarray:
        """Per 2 pi density, of x^0 (negated), x^1 and so on in the exponent: ``[signal_shape, nodes]``."""
        shape = transmission.interferer_shape
        strength = threshold * transmission.interferer_scale / transmission.signal_scale
        a = strength / self._loss_ratio
        log_silence = -shape * np.log1p(a)
        found = np.empty((transmission.signal_shape, len(self.r)))
        found[0] = (self._weights * -np.expm1(log_silence)).sum(axis=1)
        q, weights = a / (1 + a), self._weights * np.exp(log_silence)
        for k in range(1, transmission.signal_shape):
            weights = weights * q
            found[k] = special.binom(shape + k - 1, k) * weights.sum(axis=1)
        found[:2] += shape * strength * self._far  # so weak that all but the first power is nothing
        return found


def _checked(name: str, value: int, least: int, most: int) -> int:
    if not (value == int(value) and least <= value <= most):
        raise ValueError(f"transmission: {name} must be a whole number from {least} to {most}, got {value}")
    return value
