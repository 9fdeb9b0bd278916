"""Gauss-Legendre panels on a logarithmic axis, with the integrals from each node to the end of the axis.

Measures of path loss and power are smooth on logarithmic axes but for known corners (breakpoints), so panels that end
there converge like the order of the rule; and what lies beyond each node, needed again and again in Poisson fields, is
integrated to the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy import special

_ORDER = 12


@dataclass(frozen=True, eq=False)
class LogPanels:
    """Nodes x > 0 in ascending order and weights of an integral dx.

    ``log_x``, ``weights``: float64 ``[nodes]``; ``low``, ``high``: logarithms of the ends of the axis.
    """

    log_x: np.ndarray
    weights: np.ndarray
    low: float
    high: float

    @classmethod
    def between(cls, low: float, high: float, width: float, corners: Iterable[float] = ()) -> LogPanels:
        """Panels of at most ``width`` from ``low`` to ``high``, that end at the ``corners``; all in log x."""
        if not low < high:
            raise ValueError(f"panels must run from low to a higher end, got {low} to {high}")
        ends = np.unique([low, *(corner for corner in corners if low < corner < high), high])
        edges = np.concatenate(
            [np.linspace(a, b, int(np.ceil((b - a) / width)) + 1)[:-1] for a, b in pairwise(ends)] + [[high]]
        )
        places, weights, _ = _rule()
        half = np.diff(edges)[:, None] / 2
        log_x = edges[:-1, None] + half * (1 + places)
        return cls(log_x.ravel(), (half * weights * np.exp(log_x)).ravel(), low, high)

    @property
    def x(self) -> np.ndarray:
        return np.exp(self.log_x)

    def integral(self, values: np.ndarray) -> np.ndarray:
        """Of ``values [..., nodes]`` over the axis: ``[...]``."""
        return values @ self.weights

    def from_each(self, values: np.ndarray) -> np.ndarray:
        """The integrals of ``values [..., nodes]`` from each node to the end of the axis: ``[..., nodes]``."""
        _, weights, onward = _rule()
        panels = (values * self.weights).reshape(*values.shape[:-1], -1, _ORDER)
        sums = panels.sum(axis=-1)
        beyond = np.flip(np.cumsum(np.flip(sums, -1), -1), -1) - sums
        # Weights hold the panel's half-width and x; per unit of the rule's own weight they give back the integrand.
        within = (panels / weights) @ onward.T
        return (within + beyond[..., None]).reshape(values.shape)


@lru_cache(maxsize=1)
def _rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and weights on (-1, 1), and the matrix that takes values to their integrals from each place to 1."""
    places, weights = special.roots_legendre(_ORDER)
    powers = np.arange(_ORDER)
    # Legendre coefficients of a function from its values, and the integral of P_n from x to 1.
    values = np.polynomial.legendre.legvander(places, _ORDER)
    coefficients = (powers[:, None] + 0.5) * values[:, :_ORDER].T * weights
    primitive = np.empty((_ORDER, _ORDER))
    primitive[:, 0] = 1 - places
    primitive[:, 1:] = (values[:, : _ORDER - 1] - values[:, 2 : _ORDER + 1]) / (2 * powers[1:] + 1)
    return places, weights, primitive @ coefficients
