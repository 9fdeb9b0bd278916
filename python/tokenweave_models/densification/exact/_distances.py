"""Distances to cells and the interference of Rayleigh fading beyond them, for any path loss."""

from __future__ import annotations

from functools import cached_property
from math import inf, log, pi
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from tokenweave_models.densification.exact._panels import LogPanels

if TYPE_CHECKING:
    from tokenweave_models.densification.path_loss import PathLoss

_NEAR = 18.0  # ln r begins this far below the scale of the network: the mass left out is exp(-36)


def interference_factor_of(thresholds: np.ndarray, exponent: float) -> np.ndarray:
    """T^(2/beta) * integral from T^(-2/beta) of du / (1 + u^(beta/2)), unchecked; see :mod:`exact.nearest`."""
    ratio = 2 / exponent
    return thresholds * ratio / (1 - ratio) * special.hyp2f1(1.0, 1 - ratio, 2 - ratio, -thresholds)


class Distances:
    """Quadrature over the distance r of the serving cell, and over those of interferers.

    ``panels``, ``r``, ``loss``: nodes in ln r, in panels of at most ``width`` that end at the breakpoints; r and l(r)
    there, in units of the path loss.
    """

    def __init__(self, path_loss: PathLoss, densities: np.ndarray, thresholds: np.ndarray, width: float = 0.5):
        corners = path_loss.log_edges()
        # Coverage comes from distances density^(-1/2), and where interference is dense from (density T)^(-1/beta_0).
        low = min(0.0, corners.min(initial=0.0), -0.5 * log(densities.max()))
        if 0 < path_loss.near_exponent < 2:
            low = min(low, -log(densities.max() * max(thresholds.max(), 1.0)) / path_loss.near_exponent)
        if path_loss.r_inf < inf:
            high = log(path_loss.r_inf)
        else:  # beyond all serving cells, and where the loss is one power of the distance (a height bends it for long)
            high = max(0.0, corners.max(initial=0.0), 0.5 * log(50 / (pi * densities.min()))) + log(1e4)
        self.panels = LogPanels.between(min(low, high) - _NEAR, high, width, corners)
        self.r = self.panels.x
        self._log_loss = path_loss.log_loss(self.panels.log_x)
        with np.errstate(over="ignore"):
            self.loss = np.exp(self._log_loss)
        self._far_exponent = path_loss.far_exponent if path_loss.r_inf == inf else inf
        self._loss_at_end = float(path_loss.log_loss(np.array([high]))[0])

    def interference_beyond(self, threshold: float) -> np.ndarray:
        """J(r) at every node r: the integral over v from r of v / (1 + l(v) / (T l(r)))."""
        return (self._weights_beyond * self._shares(threshold)).sum(axis=1) + self._far(threshold)

    def interference(self, threshold: float) -> np.ndarray:
        """The same integral over the whole plane or disc."""
        return self._shares(threshold) @ (self.panels.weights * self.r) + self._far(threshold)

    def _shares(self, threshold: float) -> np.ndarray:
        """1 / (1 + l(v) / (T l(r))), rows r."""
        with np.errstate(over="ignore"):
            return 1 / (1 + self._loss_ratio / threshold)

    @cached_property
    def _loss_ratio(self) -> np.ndarray:
        """l(v) / l(r), rows r; inf counts nothing."""
        with np.errstate(over="ignore"):
            return np.exp(self._log_loss - self._log_loss[:, None])

    @cached_property
    def _weights_beyond(self) -> np.ndarray:
        """Of v dv from r on, rows r."""
        return (self.panels.from_each(np.eye(len(self.r))) * self.r[:, None]).T

    def _far(self, threshold: float) -> np.ndarray | float:
        """Beyond the last panel, where the loss is a power of the distance."""
        if self._far_exponent == inf:
            return 0.0
        at_end = threshold * np.exp(self._log_loss - self._loss_at_end)
        return np.exp(2 * self.panels.high) / 2 * interference_factor_of(at_end, self._far_exponent)
