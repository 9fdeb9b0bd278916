"""What the sinr_field kernels read of a network: piecewise cubics, fitted once in float64, looked up in fp32.

A kernel finds its interval from the bits of the argument alone (exponent and leading bits of the mantissa), so that a
lookup takes no logarithm and gives the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log2, pi
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

MAX_INTERVALS = 4096
MAX_DENSITIES = 1024
MAX_THRESHOLDS = 1024
SMALLEST_LOG2 = -1e4  # of a tabulated value: stands for zero
SMALLEST_ARRIVAL = 2.0**-33  # no arrival of the Poisson process is earlier, and no probability smaller
_ONE = 0x3F800000  # the bits of 1.0f
_PLACES = np.arange(4) / 3.0
_CUBIC = np.linalg.inv(np.vander(_PLACES, 4, increasing=True))  # values at 0, 1/3, 2/3, 1 -> coefficients


def _shift(log2_steps: int) -> int:
    if not 0 <= log2_steps <= 10:
        raise ValueError(f"log2_steps must be 0 to 10, got {log2_steps}")
    return 23 - log2_steps


def _key(value: float, log2_steps: int) -> int:
    return int(np.float32(value).view(np.int32)) >> _shift(log2_steps)


def _knots(first_key: int, count: int, log2_steps: int) -> np.ndarray:
    keys = np.arange(first_key, first_key + count + 1, dtype=np.int32)
    return (keys << _shift(log2_steps)).view(np.float32).astype(np.float64)


def _fit_cubics(function: Callable[[np.ndarray], np.ndarray], places: np.ndarray) -> np.ndarray:
    """``places`` [intervals, 4] -> coefficients [planes, intervals, 4] of 1, t, t^2, t^3, each through four values."""
    values = np.atleast_2d(np.asarray(function(places.ravel()), dtype=np.float64))
    if np.isnan(values).any() or (values == inf).any():
        raise ValueError("a tabulated function must be finite or -inf")
    values = np.maximum(values, SMALLEST_LOG2).reshape(len(values), *places.shape)
    return values @ _CUBIC.T


def _to_tensor(coefficients: np.ndarray, device: torch.device | str) -> Tensor:
    if not (np.abs(coefficients) < 3e38).all():
        raise ValueError("a tabulated function must have values that fp32 can hold")
    return torch.from_numpy(np.ascontiguousarray(coefficients, dtype=np.float32)).to(device)


def _check_count(count: int, what: str) -> None:
    if count > MAX_INTERVALS:
        raise ValueError(f"{what} would need {count} intervals, at most {MAX_INTERVALS} fit; lower log2_steps")


@dataclass(frozen=True, eq=False)
class LogTable:
    """Functions of a positive argument, with ``2**log2_steps`` intervals in every octave of it.

    ``coefficients``: fp32 ``[planes, intervals, 4]``. The first interval begins at the fp32 number whose leading bits
    are ``first_key``. Outside its range the argument is clamped.
    """

    coefficients: Tensor
    first_key: int
    log2_steps: int

    @classmethod
    def fit(
        cls,
        function: Callable[[np.ndarray], np.ndarray],
        low: float,
        high: float,
        log2_steps: int = 4,
        device: torch.device | str = "cpu",
    ) -> LogTable:
        """``function`` takes float64 ``[n]`` and gives ``[n]`` or ``[planes, n]``, in base-2 logarithms where it is to
        be looked up as one; -inf and all below become -1e4. Neighbouring intervals share the value at their border."""
        if not 0 < low < high < 3e38:
            raise ValueError(f"the range must be 0 < low < high < 3e38, got {low}, {high}")
        if high < 1.2e-38:
            raise ValueError(f"the range must end at a normal fp32 number, 1.2e-38 or above, got {high}")
        first = max(_key(low, log2_steps), _key(1.2e-38, log2_steps))
        count = _key(high, log2_steps) - first + 1
        _check_count(count, f"a range of {low:g} to {high:g}")
        knots = _knots(first, count, log2_steps)
        places = knots[:-1, None] + np.diff(knots)[:, None] * _PLACES
        return cls(_to_tensor(_fit_cubics(function, places), device), first, log2_steps)

    def evaluate(self, argument: Tensor, plane: int = 0) -> Tensor:
        """What a kernel looks up, in float64. The argument is rounded to fp32 first."""
        shift, count = _shift(self.log2_steps), self.coefficients.shape[1]
        low = self.first_key << shift
        high = ((self.first_key + count) << shift) - 1
        bits = argument.to(torch.float32).view(torch.int32).to(torch.int64).clamp(low, high)
        place = (bits & ((1 << shift) - 1)).double() / (1 << shift)
        return _horner(self.coefficients[plane], (bits >> shift) - self.first_key, place)

    def to(self, device: torch.device | str) -> LogTable:
        return LogTable(self.coefficients.to(device), self.first_key, self.log2_steps)


@dataclass(frozen=True, eq=False)
class TwoSidedTable:
    """One function of any real z: intervals are narrowest around 0 and grow with 1 + |z|, ``2**log2_steps`` in every
    octave of it.

    ``coefficients``: fp32 ``[negative + positive, 4]``, intervals in ascending z; the place within one runs with |z|.
    """

    coefficients: Tensor
    negative: int
    log2_steps: int

    @classmethod
    def fit(
        cls,
        function: Callable[[np.ndarray], np.ndarray],
        low: float,
        high: float,
        log2_steps: int = 6,
        device: torch.device | str = "cpu",
    ) -> TwoSidedTable:
        """``function`` takes and gives float64 ``[n]``; the range must hold 0."""
        if not -3e38 < low < 0 < high < 3e38:
            raise ValueError(f"the range must be low < 0 < high, got {low}, {high}")
        first = _ONE >> _shift(log2_steps)
        sides = []
        for sign, end in ((-1, -low), (1, high)):
            count = _key(1.0 + end, log2_steps) - first + 1
            knots = _knots(first, count, log2_steps) - 1.0
            places = sign * (knots[:-1, None] + np.diff(knots)[:, None] * _PLACES)
            sides.append(_fit_cubics(function, places)[0])
        _check_count(len(sides[0]) + len(sides[1]), f"a range of {low:g} to {high:g}")
        return cls(_to_tensor(np.concatenate([sides[0][::-1], sides[1]]), device), len(sides[0]), log2_steps)

    def evaluate(self, argument: Tensor) -> Tensor:
        """What a kernel looks up, in float64. The argument is rounded to fp32 first."""
        shift, count = _shift(self.log2_steps), self.coefficients.shape[0]
        argument = argument.to(torch.float32)
        is_negative = argument < 0
        most = torch.where(is_negative, self.negative, count - self.negative)
        bits = (argument.abs() + 1).view(torch.int32).to(torch.int64)
        bits = torch.minimum(bits, _ONE + (most << shift) - 1)
        place = (bits & ((1 << shift) - 1)).double() / (1 << shift)
        step = (bits >> shift) - (_ONE >> shift)
        index = torch.where(is_negative, self.negative - 1 - step, self.negative + step)
        return _horner(self.coefficients, index, place)

    def to(self, device: torch.device | str) -> TwoSidedTable:
        return TwoSidedTable(self.coefficients.to(device), self.negative, self.log2_steps)


def _horner(coefficients: Tensor, index: Tensor, place: Tensor) -> Tensor:
    c = coefficients.double()[index]
    return c[..., 0] + place * (c[..., 1] + place * (c[..., 2] + place * c[..., 3]))


@dataclass(frozen=True, eq=False)
class PowerTable:
    """All that :func:`sample_power_domain` knows of a network: the measure L1(x) of received powers above x, per unit
    of density, and its inverse.

    Lengths are in any one unit u; densities then are per u^2 and powers relative to the gain at distance u (A_0 = 1).

    Attributes:
        inverse: of g = arrival / density; planes: log2 of the power P(g) with L1(P(g)) = g; log2 of the mean
            ``integral of P from g`` and half the log2 of the variance ``integral of P^2 from g`` of what lies beyond.
        measure: log2 of L1 as a function of log2 of the power.
        cut: L1(0+), inf on an infinite plane: powers exist for g < cut only.
    """

    inverse: LogTable
    measure: TwoSidedTable
    cut: float = inf

    @classmethod
    def single_slope(
        cls,
        exponent: float,
        *,
        constant: float = pi,
        densities: tuple[float, float] = (1e-3, 1e3),
        device: torch.device | str = "cpu",
    ) -> PowerTable:
        """Path loss r^exponent on the infinite plane: L1(x) = constant * x^(-2 / exponent), where constant is
        pi * E[m^(2/exponent)] of the fading m: it scales the density, and with no noise nothing depends on it."""
        if not exponent > 2:
            raise ValueError(f"exponent must be above 2, or interference is infinite; got {exponent}")
        if not 0 < constant < inf:
            raise ValueError(f"constant must be positive and finite, got {constant}")
        low, high = measure_range(densities)
        delta = 2.0 / exponent

        def planes(g):
            log_g = np.log2(g / constant)
            power = -log_g / delta
            base = log2(constant)
            mean = base + (1 - 1 / delta) * log_g - log2(1 / delta - 1)
            return np.stack([power, mean, 0.5 * (base + (1 - 2 / delta) * log_g - log2(2 / delta - 1))])

        powers = planes(np.array([low, high]))[0]
        return cls(
            LogTable.fit(planes, low, high, device=device),
            TwoSidedTable.fit(
                lambda z: log2(constant) - delta * z, min(powers[1], -1.0) - 40, max(powers[0], 1.0) + 80, device=device
            ),
        )

    def to(self, device: torch.device | str) -> PowerTable:
        return PowerTable(self.inverse.to(device), self.measure.to(device), self.cut)


def measure_range(densities: tuple[float, float], most_terms: int = 64) -> tuple[float, float]:
    """The g = arrival / density that a table for densities from the first to the second has to cover."""
    least, most = densities
    if not 0 < least <= most < inf:
        raise ValueError(f"densities must be a positive range, got {densities}")
    return max(SMALLEST_ARRIVAL / most, 2e-38), min(4.0 * most_terms / least, 1e38)


def mark_table(
    log2_mark: Callable[[np.ndarray], np.ndarray], log2_steps: int = 4, device: torch.device | str = "cpu"
) -> LogTable:
    """Marks by how likely one further out is. ``log2_mark``: log2 of the mark m as a function of e, P(mark > m) =
    exp(-e). Planes, of y from 2^-33 to 1/2: the mark with P(mark < m) = y, and that with P(mark > m) = y."""

    def planes(y):
        return np.stack([log2_mark(-np.log1p(-y)), log2_mark(-np.log(y))])

    return LogTable.fit(planes, SMALLEST_ARRIVAL, np.nextafter(np.float32(0.5), np.float32(0)), log2_steps, device)


@dataclass(frozen=True, eq=False)
class GeometryTable:
    """All that :func:`sample_geometry` and :func:`rayleigh_conditional` know of a network.

    Lengths are in any one unit u, s = r^2 is a squared distance, and densities are per u^2.

    Attributes:
        gain: log2 of the path gain. Either fp32 ``[slopes, 2]``, rows (a, b) of a path loss
            ``log2 l = max over rows of a + b * log2(max(s, min_distance^2) + height^2)``, or a :class:`LogTable` of
            ``max(s, min_distance^2) + height^2``.
        fading: log2 of the mark m, from :func:`mark_table`; at most 2,048 intervals.
        far: of s; planes: log2 of the ``integral of gain over the plane beyond s`` and half the log2 of that of gain^2.
        mark_mean, mark_second_moment: E[m], E[m^2]; inf where they do not exist.
        height, min_distance: in u.
        r_inf: radius of the disc, in u; inf for the plane.
    """

    gain: Tensor | LogTable
    fading: LogTable
    far: LogTable
    mark_mean: float = 1.0
    mark_second_moment: float = 2.0
    height: float = 0.0
    min_distance: float = 0.0
    r_inf: float = inf

    @classmethod
    def single_slope(
        cls,
        exponent: float,
        *,
        fading: Callable[[np.ndarray], np.ndarray] = np.log2,
        mark_mean: float = 1.0,
        mark_second_moment: float = 2.0,
        device: torch.device | str = "cpu",
    ) -> GeometryTable:
        """Path loss r^exponent on the infinite plane, for all densities there may be. ``fading``: log2 of the mark as a
        function of e, P(mark > m) = exp(-e); the default is Rayleigh fading, whose power is e itself."""
        if not exponent > 2:
            raise ValueError(f"exponent must be above 2, or interference is infinite; got {exponent}")
        half = exponent / 2

        def far(s):
            log_s = np.log2(s)
            mean = log2(pi / (half - 1)) + (1 - half) * log_s
            return np.stack([mean, 0.5 * (log2(pi / (exponent - 1)) + (1 - exponent) * log_s)])

        return cls(
            gain=_to_tensor(np.array([[0.0, half]]), device),
            fading=mark_table(fading, device=device),
            far=LogTable.fit(far, 1e-27, 1e32, device=device),
            mark_mean=mark_mean,
            mark_second_moment=mark_second_moment,
        )

    def to(self, device: torch.device | str) -> GeometryTable:
        return GeometryTable(
            self.gain.to(device), self.fading.to(device), self.far.to(device), self.mark_mean, self.mark_second_moment,
            self.height, self.min_distance, self.r_inf,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SinrGrid:
    """The densities and thresholds of a sweep, checked once and ready on a device. Build it with :meth:`make`."""

    LARGEST_DENSITY: ClassVar[float] = 1e25  # and the smallest is its inverse
    LARGEST_THRESHOLD: ClassVar[float] = 1e18

    densities: tuple[float, ...]  # per u^2
    thresholds: tuple[float, ...]  # linear SINR, not dB
    scales: Tensor  # fp32 [densities, 2]: 1 / density, log2(density)
    log2_thresholds: Tensor  # fp32 [thresholds]

    @classmethod
    def make(
        cls, densities: Sequence[float], thresholds: Sequence[float] = (), device: torch.device | str = "cpu"
    ) -> SinrGrid:
        """Densities from 1e-25 to 1e25, thresholds from 1e-18 to 1e18, at most 1,024 of each; else ValueError."""
        for name, values, most, limit in (
            ("densities", densities, MAX_DENSITIES, cls.LARGEST_DENSITY),
            ("thresholds", thresholds, MAX_THRESHOLDS, cls.LARGEST_THRESHOLD),
        ):
            if len(values) > most:
                raise ValueError(f"SinrGrid: {name} must be at most {most} numbers, got {len(values)}")
            for value in values:
                if not 1 / limit <= value <= limit:
                    unit = ", linear and not in dB" if name == "thresholds" else ""
                    raise ValueError(f"SinrGrid: {name} must be {1 / limit:g} to {limit:g}{unit}, got {value}")
        scales = [[1.0 / density, log2(density)] for density in densities]
        return cls(
            tuple(float(density) for density in densities),
            tuple(float(threshold) for threshold in thresholds),
            torch.tensor(scales, dtype=torch.float32).reshape(-1, 2).to(device),
            torch.tensor([log2(threshold) for threshold in thresholds], dtype=torch.float32).to(device),
        )

    def to(self, device: torch.device | str) -> SinrGrid:
        return SinrGrid(self.densities, self.thresholds, self.scales.to(device), self.log2_thresholds.to(device))
