"""Laws with the tail of a power, or heavier: these decide how a dense network behaves."""

from __future__ import annotations

from math import inf

import numpy as np

from tokenweave_models.densification.fading.base import Fading, check_shape


class Pareto(Fading):
    """P(m > x) = x^-alpha for x >= 1: the smallest mark is 1.

    Raises:
        ValueError: alpha is not 0.001 to 100.
    """

    log_kinks = (0.0,)
    log_min = 0.0
    tail_constant = 1.0

    def __init__(self, alpha: float) -> None:
        self.tail_index = check_shape("Pareto", "alpha", alpha, 1e-3, 100)

    def log_survival(self, log_m):
        return -self.tail_index * np.maximum(log_m, 0.0)

    def log_quantile(self, e):
        return np.asarray(e, dtype=np.float64) / self.tail_index

    def moment(self, power):
        return self.tail_index / (self.tail_index - power) if power < self.tail_index else inf

    def describe(self):
        return f"pareto:{self.tail_index:g}"


class LogPareto(Fading):
    """P(m > x) = (1 + ln x)^-g for x >= 1: slowly varying, no moment is finite. E ln(1 + m) is finite for g > 1.

    Raises:
        ValueError: g is not 0.1 to 100.
    """

    log_kinks = (0.0,)
    log_min = 0.0
    tail_index = 0.0

    def __init__(self, g: float) -> None:
        self.g = check_shape("LogPareto", "g", g, 0.1, 100)

    def log_survival(self, log_m):
        return -self.g * np.log1p(np.maximum(log_m, 0.0))

    def log_quantile(self, e):
        with np.errstate(over="ignore"):
            return np.expm1(np.asarray(e, dtype=np.float64) / self.g)

    def moment(self, power):
        return inf if power > 0 else 1.0

    @property
    def log_mean_exists(self):
        return self.g > 1

    def describe(self):
        return f"logpareto:{self.g:g}"
