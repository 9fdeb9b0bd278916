"""The measure of received powers, and the tables that the samplers read.

Powers received from a Poisson field of base stations are themselves a Poisson process on (0, inf), with
``density * L1(x)`` of them above x on average, ``L1(x) = integral of 2 pi r P(mark > x l(r)) dr``: the mapping and
marking theorems for Poisson processes. All that the strongest cell's SINR depends on is density * L1.

L1 is computed as an integral over panels in ln r, whose edges are where the path loss breaks and where the survival
function turns, and then looked up on a smooth curve of ln L1 over ln x. Agreement with closed forms and with adaptive
quadrature is 1e-9 or better; see the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from math import exp, inf, isfinite, log, nan, pi
from typing import TypeVar

import numpy as np
import torch

from tokenweave_models.densification.fading import Fading
from tokenweave_models.densification.log_domain import LogCurve, log_integral
from tokenweave_models.densification.path_loss import PathLoss
from tokenweave_ops import GeometryTable, LogTable, PowerTable, TwoSidedTable, mark_table

SMALLEST_ARRIVAL = 2.0**-33  # no arrival that a sampler draws is earlier
MOST_TERMS = 64
_WHERE_IT_MATTERS = 200.0  # arrivals beyond this are not among the terms of any sampler
_WEAKEST = 1 / 16
_END_STEP = 140.0  # of ln L1: exp(-140) stands for 0 beyond the largest power there can be
_TABLE_ERROR = 1e-5  # of a power, in log2
# log2 of a power. Neighbours are 16 apart there, and only tails that leave one power above all others come so far.
# Beyond it the width of a panel is lost in rounding.
_LARGEST = 2.0**56
_LN2 = log(2.0)
Table = TypeVar("Table", LogTable, TwoSidedTable)
_BELOW = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 24.0])  # the weight r^2 falls by exp(-48)
_NEXT_TO_TOTAL = 1e-9  # relative: closer to the total, powers are taken as constant
_DEEPEST = -1e5  # of ln L1 where marks are light; below, L1 is 0
_DISTANCES_SQUARED = 1e-20, 1e22  # in u^2, of the tables of the geometry


class PowerMeasure:
    """L1 of a path loss and a law of marks. Lengths are in u, powers relative to the gain at u (see :class:`PathLoss`).

    All methods take and give float64 arrays of any shape. Curves grow as they are asked.

    Raises:
        ValueError: interference would be infinite.
    """

    def __init__(self, path_loss: PathLoss, fading: Fading) -> None:
        if path_loss.r_inf == inf:
            least = 2 / path_loss.far_exponent
            is_finite = fading.tail_index > least or (least == 0 and fading.tail_index > 0)
            if not is_finite:
                raise ValueError(
                    f"PowerMeasure: fading must have a tail index above 2 / far exponent = {least:g} on the infinite "
                    f"plane, or interference is infinite; got {fading.tail_index:g} ({fading.describe()}); or give the "
                    "path loss a finite r_inf_m"
                )
        self.path_loss, self.fading = path_loss, fading
        self.table_error = nan  # of the last power_table, see there
        near = path_loss.near_exponent
        # With beta_0 = 0.1 the integrand peaks where -ln P(mark > m) is 20: panels must be close at least so far.
        self._fading_edges = fading.log_edges(max(144.0, 6.0 / near + 100.0 if near else 0.0))
        self._path_edges = path_loss.log_edges()
        self.log_loss_at_0 = float(path_loss.log_loss(np.array([-inf]))[0])
        self._log_highest = fading.log_max - self.log_loss_at_0 if path_loss.is_bounded else inf

    # ---------------------------------------------------------------------------------------------------- the measure

    def _exact(self, log_x: np.ndarray) -> np.ndarray:
        """ln L1 by quadrature, float64 ``[n]``."""
        reach = self.path_loss.log_distance(self._fading_edges - log_x[:, None])
        own = self._path_edges
        if len(own):
            reach = np.where(np.isfinite(reach), reach, own[0])
        lowest = np.minimum(reach.min(axis=1), own.min(initial=inf))[:, None]
        own = np.broadcast_to(own, (len(log_x), len(own)))
        edges = np.sort(np.concatenate([reach, own, lowest - _BELOW], axis=1), axis=1)

        def log_integrand(rows, log_r):
            return 2 * log_r + self.fading.log_survival(log_x[rows] + self.path_loss.log_loss(log_r))

        return log(2 * pi) + log_integral(log_integrand, edges)

    @cached_property
    def _kinks(self) -> np.ndarray:
        breaks, marks = (
            self.path_loss.log_loss(self.path_loss.log_corners()),
            np.array(self.fading.log_kinks, dtype=np.float64),
        )
        if self.path_loss.is_bounded:
            breaks = np.append(breaks, self.log_loss_at_0)
        return np.unique((marks[:, None] - breaks).ravel())

    @cached_property
    def _curve(self) -> LogCurve:
        return LogCurve(self._exact, kinks=self._kinks, high=self._log_highest, tolerance=1e-11)

    @cached_property
    def _log_end(self) -> float:
        """ln x above which L1 counts as 0."""
        if isfinite(self.fading.tail_index) or not self.path_loss.is_bounded:
            return self._log_highest
        return float(self._curve.inverse(np.array([_DEEPEST]), -1)[0])

    @property
    def total(self) -> float:
        """L1(0+): how many powers there are at all, per unit of density; inf on the plane."""
        return pi * self.path_loss.r_inf**2

    @cached_property
    def _log_cut(self) -> float:
        """ln g beyond which powers are taken as constant."""
        return log(self.total) - _NEXT_TO_TOTAL if isfinite(self.total) else inf

    def log_measure(self, log_x: np.ndarray) -> np.ndarray:
        """ln L1 at power exp(log_x); -inf where no power is so large."""
        log_x = np.asarray(log_x, dtype=np.float64)
        result = np.where(log_x == -inf, log(self.total) if isfinite(self.total) else inf, -inf)
        inside = (log_x > -inf) & (log_x < self._log_end)
        result[inside] = self._curve(log_x[inside])
        return result

    def log_power(self, log_g: np.ndarray) -> np.ndarray:
        """ln P with L1(P) = exp(log_g), the largest where there are many; -inf for g of at least ``total``."""
        log_g = np.asarray(log_g, dtype=np.float64)
        power = self._curve.inverse(np.minimum(log_g, self._log_cut), -1)
        return np.where(log_g >= log(self.total), -inf, power) if isfinite(self.total) else power

    @cached_property
    def mean_power(self) -> float:
        """mu1, the integral of x dL1: mean interference per unit of density; inf where there is none."""
        integral = exp(min(self.path_loss.log_gain_integral(1.0, np.array([-inf]))[0], 709.0))
        is_finite = self.path_loss.near_exponent < 2 and (self.path_loss.far_exponent > 2 or self.path_loss.r_inf < inf)
        return float(self.fading.moment(1.0)) * float(integral) if is_finite else inf

    @cached_property
    def kappa(self) -> float:
        """The limit of x^rho L1(x), rho = min(tail index, 2 / near exponent); inf where a logarithm comes in (both are
        equal), nan where rho is 0 or inf, or the law's tail constant is not known."""
        alpha, near = self.fading.tail_index, self.path_loss.near_exponent
        delta = 2 / near if near else inf
        if alpha == 0 or min(alpha, delta) == inf:
            return nan
        if alpha == delta:
            return inf
        if delta < alpha:
            far_in = -40.0 * max(1.0, 1.0 / near)
            log_constant = float(self.path_loss.log_loss(np.array([far_in]))[0]) - near * far_in
            return pi * self.fading.moment(delta) * exp(-delta * log_constant)
        return self.fading.tail_constant * exp(self.path_loss.log_gain_integral(alpha, np.array([-inf]))[0])

    # ------------------------------------------------------------------------------------------------- what lies below

    def tail_mean(self, g: np.ndarray) -> np.ndarray:
        """The integral of P from g on: the mean sum of all powers beyond arrival g, per unit of density."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_tail(np.log(np.asarray(g, dtype=np.float64)), 1))

    def tail_variance(self, g: np.ndarray) -> np.ndarray:
        """The integral of P^2 from g on: the variance of that sum, per unit of density."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_tail(np.log(np.asarray(g, dtype=np.float64)), 2))

    def log_tail(self, log_g: np.ndarray, order: int) -> np.ndarray:
        """ln of the integral of P^order from exp(log_g) on, order 1 or 2."""
        log_g = np.minimum(np.asarray(log_g, dtype=np.float64), self._log_cut)
        return self._log_tail(self.log_power(log_g), log_g, order)

    def _log_tail(self, log_x: np.ndarray, log_g: np.ndarray, order: int) -> np.ndarray:
        """The same, where log_x is already the power at log_g."""
        below = self._tail_curve(order)(np.nextafter(log_x, -inf))  # from the left, should it jump there
        # Where L1 jumps at x, g may lie inside the jump: what is left of it belongs to the tail.
        panel = np.clip(np.searchsorted(self._curve.edges, log_x, side="left") - 1, 0, None)
        right = self._curve.edge_values()[1]
        is_edge = self._curve.edges[np.minimum(panel + 1, len(right))] == log_x
        rest = np.expm1(np.where(is_edge, right[np.minimum(panel, len(right) - 1)] - log_g, 0.0))
        with np.errstate(divide="ignore"):
            return np.logaddexp(below, np.where(rest > 1e-9, order * log_x + log_g + np.log(np.maximum(rest, 0)), -inf))

    def _tail_curve(self, order: int) -> LogCurve:
        if order not in self._tails:
            high = self._log_highest
            self._tails[order] = LogCurve(
                lambda v: self._log_below(v, order), kinks=self._kinks, high=high, tolerance=1e-10
            )
        return self._tails[order]

    @cached_property
    def _tails(self) -> dict[int, LogCurve]:
        return {}

    def _log_density(self, log_x: np.ndarray) -> np.ndarray:
        """ln of -dL1 / d ln x."""
        return self._curve(log_x) + np.log(np.maximum(-self._curve.slope(log_x), 1e-300))

    def _log_below(self, log_x: np.ndarray, order: int) -> np.ndarray:
        """ln of the integral of y^order |dL1(y)| over y < exp(log_x), jumps at log_x itself left out."""
        lowest = float(log_x.min())
        # Far below, L1 is a power law: 400 lower, or 20 decades of the slowest decay, the rest has its closed form.
        start = min(lowest, 0.0) - 400.0
        self._curve.cover(start, float(log_x.max()))
        edges = self._curve.edges
        edges = edges[edges < log_x.max()]
        panel_ends = np.append(edges[1:], log_x.max())

        def integral(low, high):
            steps = np.array([inf, 128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.0])
            places = np.maximum(high[:, None] - steps, low[:, None])
            inward = np.nextafter(places, (low + high)[:, None] / 2)  # stays off the neighbour's side of a jump
            return log_integral(lambda rows, v: order * v + self._log_density(v), inward)

        first = edges[0]
        slope = float(np.diff(self._log_density(np.array([first + 1e-3, first + 1.001])))[0])
        rest = order * first + float(self._log_density(np.array([first + 1e-3]))[0]) - log(max(order + slope, 1e-3))
        parts = np.concatenate([[rest], integral(edges, panel_ends)])
        left, right = self._curve.edge_values()
        jumps = np.full(len(parts), -inf)
        size = -np.expm1(left[1:] - right[:-1])  # of L1 at the inner edges, relative
        atoms = np.where(
            size > 1e-9, right[:-1] + np.log(np.maximum(size, 1e-300)) + order * self._curve.edges[1:-1], -inf
        )
        count = min(len(atoms), len(edges) - 1)
        jumps[1 : 1 + count] = atoms[:count]  # the jump at edge k + 1 comes after panel k
        total = np.logaddexp.accumulate(np.stack([parts, jumps], axis=1).ravel())[1::2]
        panel = np.clip(np.searchsorted(edges, log_x, side="right") - 1, 0, None)
        return np.logaddexp(total[panel], integral(edges[panel], log_x))

    # ----------------------------------------------------------------------------------------------------- the tables

    def power_table(self, densities: tuple[float, float], device: torch.device | str = "cpu") -> PowerTable:
        """The table for :func:`tokenweave_ops.sample_power_domain`, for densities per u^2 from the first to the second.

        As many intervals are taken as bring the error of log2 P and of log2 L1, measured between the knots, below 1e-5,
        or as there may be. The largest error found is kept as ``table_error`` (where a log2 is beyond 64, relative to a
        64th of it): a kink of the law, as without fading, leaves more. What does not matter is not counted: arrivals
        beyond 200, L1 below 1e-300, and in a disc the weakest sixteenth of all powers, where log P may fall to -inf.

        Raises:
            ValueError: the densities are not a positive, finite, ascending pair, or powers are so large that their
                logarithms are not told apart.
        """
        least, most = densities
        if not 0 < least <= most < inf:
            raise ValueError(f"power_table: densities must be a positive, finite, ascending pair, got {densities}")
        low, high = max(SMALLEST_ARRIVAL / most, 2e-38), min(4.0 * MOST_TERMS / least, 1e38)
        powers = self.log_power(np.minimum(np.log([low, high]), self._log_cut)) / _LN2
        if not powers.max() < _LARGEST:
            raise ValueError(
                f"power_table: fading must have a lighter tail at {most:g} base stations per square of the unit of "
                f"length: the largest power is 2^{powers.max():.3g}, got {self.fading.describe()}"
            )
        self._check_falls()

        # Next to the total log P falls to -inf or has its last kink; no cubic follows it there.
        cut = log(self.total) - 1 / 256 if isfinite(self.total) else inf

        def planes(g):
            log_g = np.minimum(np.log(g), cut)
            log_x = self.log_power(log_g)
            return np.stack([log_x, self._log_tail(log_x, log_g, 1), self._log_tail(log_x, log_g, 2) / 2]) / _LN2

        # Where marks and gains are bounded L1 ends in a jump or a root; a cubic swings less before a lower step.
        end = self._log_highest
        last = float(self._curve(np.nextafter([end], -inf))[0]) if isfinite(end) else -inf

        def measure(z):
            left_of_0 = np.where((z == 0) & np.signbit(z), np.nextafter(0.0, -1.0), z)  # there it jumps without fading
            return np.maximum(self.log_measure(left_of_0 * _LN2) / _LN2, (last - _END_STEP) / _LN2)

        reach = min(powers[1], -1.0) - 40.0, max(powers[0], 1.0) + 80.0
        inverse, inverse_error = _refine(
            lambda steps: LogTable.fit(planes, low, high, steps),
            lambda table: self._inverse_error(table, _WHERE_IT_MATTERS / least),
        )
        measure_table, measure_error = _refine(
            lambda steps: TwoSidedTable.fit(measure, *reach, steps),
            lambda table: self._measure_error(table, log(_WHERE_IT_MATTERS / least)),
        )
        self.table_error = max(inverse_error, measure_error)
        return PowerTable(inverse, measure_table, self.total).to(device)

    def _check_falls(self) -> None:
        left, right = self._curve.edge_values()
        falls = np.ravel(np.stack([left, right], axis=1))
        if not (np.diff(falls) <= 1e-9 * np.maximum(np.abs(falls[1:]), 1)).all():
            raise ValueError(
                "PowerMeasure: L1 must fall with the power; the path loss or the law of marks is not monotone"
            )

    def _inverse_error(self, table: LogTable, most: float) -> float:
        """The largest error of log2 P between the knots, where arrivals matter."""
        g = _between(table.first_key, table.coefficients.shape[1], table.log2_steps)
        g = g[(g <= min(most, self.total * (1 - _WEAKEST))) & (g > 1e-300)]
        return _largest_error(table.evaluate(torch.from_numpy(g)), self.log_power(np.log(g)) / _LN2)

    def _measure_error(self, table: TwoSidedTable, log_most: float) -> float:
        """The largest error of log2 L1 between the knots, where L1 is neither beyond all arrivals nor below 1e-300."""
        first = _key(1.0, table.log2_steps)
        positive = len(table.coefficients) - table.negative
        sides = [sign * (_between(first, n, table.log2_steps) - 1) for sign, n in ((-1, table.negative), (1, positive))]
        z = np.concatenate(sides).astype(np.float32).astype(np.float64)
        exact = self.log_measure(z * _LN2)
        matters = (exact < min(log_most, log(self.total) - _WEAKEST)) & (exact > log(1e-300))
        return _largest_error(table.evaluate(torch.from_numpy(z[matters])), exact[matters] / _LN2)


def _refine(fit: Callable[[int], Table], error_of: Callable[[Table], float]) -> tuple[Table, float]:
    """The coarsest table whose error is below 1e-5, or the finest there may be; its error."""
    best = None
    for log2_steps in range(4, 11):
        try:
            table = fit(log2_steps)
        except ValueError as error:
            if best is None or "intervals" not in str(error):
                raise
            break
        best = table, error_of(table)
        if best[1] < _TABLE_ERROR:
            break
    return best


def _key(value: float, log2_steps: int) -> int:
    return int(np.float32(value).view(np.int32)) >> (23 - log2_steps)


def _between(first_key: int, count: int, log2_steps: int) -> np.ndarray:
    """Three places inside each of the intervals of a table, off those where it is exact; fp32 numbers as float64."""
    keys = np.arange(first_key, first_key + count + 1, dtype=np.int32)
    knots = (keys << (23 - log2_steps)).view(np.float32).astype(np.float64)
    places = knots[:-1, None] + np.diff(knots)[:, None] * np.array([1.0, 3.0, 5.0]) / 6
    return places.ravel().astype(np.float32).astype(np.float64)


def _largest_error(found: torch.Tensor, exact: np.ndarray) -> float:
    errors = np.abs(found.numpy() - exact) / np.maximum(1.0, np.abs(exact) / 64)
    return float(errors.max(initial=0.0))


def geometry_table(path_loss: PathLoss, fading: Fading, device: torch.device | str = "cpu") -> GeometryTable:
    """The table for :func:`tokenweave_ops.sample_geometry` and :func:`tokenweave_ops.rayleigh_conditional`."""
    lines = path_loss.lines()
    if lines is None:
        gain = LogTable.fit(
            lambda s: -path_loss.slant_log_loss(np.log(s) / 2) / _LN2, *_DISTANCES_SQUARED, log2_steps=4
        )
    else:
        gain = torch.tensor(lines, dtype=torch.float32)
    # Next to the rim nothing is left, whose logarithm no cubic follows.
    rim = (path_loss.r_inf * (1 - 1e-6)) ** 2

    high = log(rim) / 2 if isfinite(rim) else inf
    curves = [
        LogCurve(partial(path_loss.log_gain_integral, k), kinks=path_loss.log_corners(), high=high) for k in (1.0, 2.0)
    ]

    def far(s):
        log_r = np.minimum(np.log(s) / 2, high)
        return np.stack([curves[0](log_r), curves[1](log_r) / 2]) / _LN2

    return GeometryTable(
        gain=gain,
        fading=mark_table(lambda e: np.minimum(fading.log_quantile(e) / _LN2, 1e37)),
        far=LogTable.fit(far, *_DISTANCES_SQUARED, log2_steps=4),
        mark_mean=float(fading.moment(1.0)),
        mark_second_moment=float(fading.moment(2.0)),
        height=path_loss.height,
        min_distance=path_loss.min_distance,
        r_inf=path_loss.r_inf,
    ).to(device)
