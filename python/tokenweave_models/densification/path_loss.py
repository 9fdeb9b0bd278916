"""Path loss over distance: multi-slope laws, stretched exponentials, user functions and tables.

A loss l(r) never falls with r. Lengths are in the unit ``unit_m`` = u of each law: the first breakpoint, or where there
is none the antenna height, the shortest distance, or 1 m. The loss at u, with height and shortest distance put to 0,
is 1 (A_0 = 1); ``gain_at_unit`` says what that gain is where the near slope is 1 at 1 m, and so converts noise.

With a height h and a shortest distance d the loss at r is that of ``sqrt(max(r, d)^2 + h^2)``.

Source: the multi-slope form is that of Zhang and Andrews, "Downlink cellular network analysis with multi-slope path
loss models", IEEE Trans. Commun. 2015; the stretched exponential that of AlAmmouri, Andrews and Baccelli, "SINR and
throughput of dense cellular networks with stretched exponential path loss", IEEE Trans. Wireless Commun. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, isfinite, log, pi

import numpy as np

from tokenweave_models.densification.log_domain import log_integral

_LEFT = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 24.0])  # the weight r^2 falls by exp(-48)
_RIGHT = 2.0 ** -np.arange(19)  # of a breakpoint, beyond which a light tail may fall at once
_FLATTEST = 1e-4  # near exponent but 0: the marks of stations seen from r = 0 reach to e = 6 / exponent
_STEEPEST = 100.0  # beyond, a loss would leave the range of floats within three decades of distance
_SHORTEST_M, _LONGEST_M = 1e-9, 1e12  # lengths: a nanometre, and beyond Jupiter's orbit
_OUTWARD = np.concatenate([[0.0], 2.0 ** np.arange(-12.0, 41.0)])


def check(owner: str, name: str, is_good: bool, words: str, value: object) -> None:
    """Raises ValueError ``owner: name must be words, got value``."""
    if not is_good:
        raise ValueError(f"{owner}: {name} must be {words}, got {value}")


def _check_near(owner: str, name: str, exponent: float) -> None:
    check(owner, name, exponent == 0 or exponent >= _FLATTEST, f"0, or {_FLATTEST:g} or more", exponent)


def _check_length(owner: str, name: str, length_m: float, other: float) -> None:
    """Or ``other``: what stands for none."""
    is_good = length_m == other or _SHORTEST_M <= length_m <= _LONGEST_M
    check(owner, name, is_good, f"{other:g}, or {_SHORTEST_M:g} to {_LONGEST_M:g} m", length_m)


def _check_breakpoints(owner: str, breaks_m: list[float], r_inf_m: float) -> None:
    is_rising = all(low < high for low, high in pairwise([0.0, *breaks_m, inf]))
    check(owner, "breakpoints_m", is_rising, "positive, finite and strictly increasing", breaks_m)
    is_good = all(_SHORTEST_M <= r <= _LONGEST_M for r in breaks_m)
    check(owner, "breakpoints_m", is_good, f"{_SHORTEST_M:g} to {_LONGEST_M:g} m", breaks_m)
    last = breaks_m[-1] if breaks_m else 0.0
    check(owner, "r_inf_m", r_inf_m > last, f"above the last breakpoint ({last:g} m)", r_inf_m)


class PathLoss:
    """Base of all laws. A subclass sets the attributes and defines ``slant_log_loss`` and ``slant_log_distance``.

    Attributes:
        unit_m: u in metres.
        r_inf: radius of the disc in u; inf for the plane.
        near_exponent: beta_0 = d ln l / d ln r as r -> 0; 0 with a height or a shortest distance.
        far_exponent: beta_last, of r -> inf; inf for a stretched exponential.
        breakpoints: float64 ``[k]`` distances in u where the law changes.
        height, min_distance: in u.
        gain_at_unit: linear gain at distance u (height and shortest distance put to 0) where the near slope passes
            through 1 at 1 m. Noise relative to transmit power divided by it is noise in units of the power at u.
    """

    unit_m: float
    r_inf: float
    near_exponent: float
    far_exponent: float
    breakpoints: np.ndarray
    gain_at_unit: float

    def _set_geometry(self, unit_m: float, height_m: float, min_distance_m: float, r_inf_m: float) -> None:
        owner = type(self).__name__
        _check_length(owner, "height_m", height_m, 0)
        _check_length(owner, "min_distance_m", min_distance_m, 0)
        _check_length(owner, "r_inf_m", r_inf_m, inf)
        check(owner, "r_inf_m", r_inf_m > min_distance_m, f"above min_distance_m={min_distance_m:g}", r_inf_m)
        self.unit_m = unit_m
        self.height, self.min_distance, self.r_inf = (x / unit_m for x in (height_m, min_distance_m, r_inf_m))

    def slant_log_loss(self, log_r: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def slant_log_distance(self, log_loss: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _log_turns(self) -> np.ndarray:
        """ln of slant distances around which the law turns smoothly, none further apart than it turns."""
        return np.zeros(0)

    @property
    def is_bounded(self) -> bool:
        """Whether the gain has a finite limit at distance 0."""
        return self.near_exponent == 0

    def _slant(self, log_r: np.ndarray) -> np.ndarray:
        if self.min_distance:
            log_r = np.maximum(log_r, log(self.min_distance))
        return np.logaddexp(2 * log_r, 2 * log(self.height)) / 2 if self.height else log_r

    def log_loss(self, log_r: np.ndarray) -> np.ndarray:
        """ln l at distance exp(log_r) in u; any shape. The radius of the disc is not looked at."""
        return self.slant_log_loss(self._slant(np.asarray(log_r, dtype=np.float64)))

    def log_distance(self, log_loss: np.ndarray) -> np.ndarray:
        """ln of the largest distance in the disc whose ln l is at most ``log_loss``: the inverse of :meth:`log_loss`;
        -inf where there is none."""
        log_r = self.slant_log_distance(np.asarray(log_loss, dtype=np.float64))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self.height:
                within = np.minimum(2 * (log(self.height) - log_r), 0.0)
                log_r = np.where(within < 0, log_r + np.log(-np.expm1(within)) / 2, -inf)
            if self.min_distance:
                log_r = np.where(log_r >= log(self.min_distance), log_r, -inf)
        return np.minimum(log_r, log(self.r_inf)) if isfinite(self.r_inf) else log_r

    def _log_ground(self, log_slant: np.ndarray) -> np.ndarray:
        """ln r of slant distances; those within the height or the shortest distance are left out."""
        if self.height:
            log_slant = log_slant[log_slant > log(self.height)]
            # ln sqrt(rho^2 - h^2) without squaring: rho may be beyond the range of floats
            log_slant = log_slant + np.log(-np.expm1(2 * (log(self.height) - log_slant))) / 2
        return log_slant[log_slant > log(self.min_distance)] if self.min_distance else log_slant

    def log_corners(self) -> np.ndarray:
        """ln r where the law has a kink, and at the rim of the disc; ascending."""
        corners = [self._log_ground(np.log(self.breakpoints))]
        corners += [[log(x)] for x in (self.min_distance, self.r_inf) if 0 < x < inf]
        return np.unique(np.concatenate(corners))

    def log_edges(self) -> np.ndarray:
        """ln r between which a panel of an integral over the plane should not reach: kinks of the law with narrow
        panels beyond them and wide ones before, and where it turns smoothly. None beyond the rim."""
        corners = self.log_corners()
        sharp = corners if len(corners) <= 16 else corners[:1]
        edges = [corners, (sharp[:, None] + _RIGHT).ravel(), self._log_ground(self._log_turns())]
        if self.height:
            edges.append(log(self.height) + np.arange(-12.0, 3.0))
        edges.append((np.concatenate([corners[:1], corners[-1:]])[:, None] - _LEFT).ravel())
        edges = np.unique(np.concatenate(edges))
        return edges[edges <= log(self.r_inf)] if isfinite(self.r_inf) else edges

    def log_gain_integral(self, power: float, log_r: np.ndarray) -> np.ndarray:
        """ln of the integral of ``l^-power`` over the plane (disc) beyond distance exp(log_r); log_r float64 ``[n]``.
        -inf for the whole plane. +inf where the integral is."""
        log_r = np.asarray(log_r, dtype=np.float64)
        if not isfinite(self.r_inf) and self.far_exponent * power <= 2:
            return np.full(log_r.shape, inf)
        if (np.isneginf(log_r)).any() and self.near_exponent * power >= 2:
            return np.where(np.isneginf(log_r), inf, self.log_gain_integral(power, np.maximum(log_r, -300.0)))
        own = self.log_edges()
        rim = log(self.r_inf) if isfinite(self.r_inf) else inf
        first = np.concatenate([own, [0.0]]).min()
        # Below every break the law is one slope; the geometric panels take care of however slowly it falls.
        start = np.where(np.isneginf(log_r), first - 40.0 / max(2 - self.near_exponent * power, 1e-3), log_r)
        inward = np.maximum(first - _OUTWARD[None, 8:26], start[:, None])
        edges = np.concatenate(
            [
                start[:, None] + _OUTWARD,
                np.maximum(own[None, :], start[:, None]) if len(own) else np.zeros((len(log_r), 0)),
                np.maximum(own.max(initial=0.0) + _OUTWARD, start[:, None]),
                inward,
            ],
            axis=1,
        )
        edges = np.sort(np.clip(edges, None, rim), axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            return log_integral(lambda rows, t: log(2 * pi) + 2 * t - power * self.log_loss(t), edges)

    def lines(self) -> list[tuple[float, float]] | None:
        """``[(a_k, b_k)]`` with log2 l = max over k of a_k + b_k log2(squared slant distance); None where l is not."""
        return None

    def describe(self) -> str:
        """The law in the words of the command line."""
        raise NotImplementedError

    def _describe_geometry(self) -> str:
        named = (("h", self.height), ("min", self.min_distance), ("rinf", self.r_inf))
        return "".join(f";{name}={x * self.unit_m:g}m" for name, x in named if 0 < x < inf)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


class MultiSlope(PathLoss):
    """l(r) = A_k r^beta_k between breakpoints, continuous; ``exponents`` 0 <= beta_0 < beta_1 < ..., one more of them
    than ``breakpoints_m`` (ascending, in metres); beta_0 is 0, or 1e-4 or more.

    Raises:
        ValueError: an exponent, a breakpoint or a length is outside its range.
    """

    def __init__(
        self,
        exponents: Sequence[float],
        breakpoints_m: Sequence[float] = (),
        height_m: float = 0.0,
        min_distance_m: float = 0.0,
        r_inf_m: float = inf,
    ) -> None:
        owner, exponents, breaks = "MultiSlope", [float(b) for b in exponents], [float(r) for r in breakpoints_m]
        check(owner, "exponents", len(exponents) >= 1, "at least one number", exponents)
        check(owner, "exponents", all(0 <= b <= _STEEPEST for b in exponents), f"0 to {_STEEPEST:g}", exponents)
        is_rising = all(low < high for low, high in pairwise(exponents))
        check(owner, "exponents", is_rising, "strictly increasing", exponents)
        _check_near(owner, "the first exponent", exponents[0])
        words = f"one fewer than the {len(exponents)} exponents"
        check(owner, "breakpoints_m", len(breaks) == len(exponents) - 1, words, breaks)
        _check_breakpoints(owner, breaks, r_inf_m)
        self._set_geometry(
            breaks[0] if breaks else height_m or min_distance_m or 1.0, height_m, min_distance_m, r_inf_m
        )
        if r_inf_m == inf:
            words = "above 2 on the infinite plane, or interference is infinite (or give r_inf_m)"
            check(owner, "the last exponent", exponents[-1] > 2, words, exponents[-1])
        fits = exponents[0] * abs(log(self.unit_m)) < 690
        check(owner, "the first exponent", fits, f"such that {self.unit_m:g}^exponent is a float", exponents[0])
        self.exponents = np.array(exponents)
        self.breakpoints = np.array(breaks) / self.unit_m
        steps = np.log(self.breakpoints) * -np.diff(self.exponents)
        self._log_constants = np.concatenate([[0.0], np.cumsum(steps)])
        self.near_exponent = 0.0 if height_m or min_distance_m else exponents[0]
        self.far_exponent = exponents[-1]
        self.gain_at_unit = self.unit_m ** -exponents[0]

    def slant_log_loss(self, log_r):
        # Exponents increase, so the law is the largest of its slopes. A slope of 0 must not meet an infinite distance.
        result = self._log_constants[0] + (self.exponents[0] * log_r if self.exponents[0] else 0 * np.maximum(log_r, 0))
        for constant, exponent in zip(self._log_constants[1:], self.exponents[1:], strict=True):
            result = np.maximum(result, constant + exponent * log_r)
        return result

    def slant_log_distance(self, log_loss):
        log_r = np.full(log_loss.shape, inf)
        for constant, exponent in zip(self._log_constants, self.exponents, strict=True):
            if exponent:
                log_r = np.minimum(log_r, (log_loss - constant) / exponent)
            else:
                log_r = np.where(log_loss >= constant, log_r, -inf)
        return log_r

    def lines(self):
        return [(a / log(2), b / 2) for a, b in zip(self._log_constants, self.exponents, strict=True)]

    def describe(self):
        pairs = zip(self.exponents[:-1], self.breakpoints * self.unit_m, strict=True)
        if len(self.exponents) == 1:
            return f"slope:{self.exponents[0]:g}{self._describe_geometry()}"
        slopes = [*(f"{b:g}@{r:g}m" for b, r in pairs), f"{self.exponents[-1]:g}"]
        return f"ms:{','.join(slopes)}{self._describe_geometry()}"


class StretchedExponential(PathLoss):
    """l(r) = exp(a r^b), r in metres; bounded, and lighter than any power far away. The unit is 1 m, l(0) = 1.

    Raises:
        ValueError: a is not 1e-12 to 1e6, b not 0.05 to 2, or a length is outside its range.
    """

    def __init__(
        self, a: float, b: float, height_m: float = 0.0, min_distance_m: float = 0.0, r_inf_m: float = inf
    ) -> None:
        check("StretchedExponential", "a", 1e-12 <= a <= 1e6, "1e-12 to 1e6", a)
        check("StretchedExponential", "b", 0.05 <= b <= 2, "0.05 to 2", b)
        self._set_geometry(1.0, height_m, min_distance_m, r_inf_m)
        self.a, self.b = float(a), float(b)
        self.near_exponent, self.far_exponent, self.gain_at_unit = 0.0, inf, 1.0
        self.breakpoints = np.zeros(0)

    def slant_log_loss(self, log_r):
        with np.errstate(over="ignore"):
            return self.a * np.exp(self.b * log_r)

    def slant_log_distance(self, log_loss):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(log_loss > 0, np.log(np.maximum(log_loss, 0) / self.a) / self.b, -inf)

    def _log_turns(self):
        return (np.arange(-14.0, 8.0) - log(self.a)) / self.b  # a r^b of 1e-6 to 1e3

    def describe(self):
        return f"stretched:{self.a:g},{self.b:g}{self._describe_geometry()}"


class PathLossFunction(PathLoss):
    """A user's law: ``log_loss_m`` takes ln of distances in metres, float64 of any shape, and gives ln l, which must
    not fall. The unit is ``unit_m``, best the distance where the law turns.

    Args:
        log_loss_m: the function.
        near_exponent, far_exponent: of r -> 0 (0, or 1e-4 or more) and r -> inf; inf far where the law outgrows every
            power.
        breakpoints_m: distances where the law has a kink.

    Raises:
        ValueError: the function falls or is not finite, an exponent or a length is outside its range.
    """

    def __init__(
        self,
        log_loss_m: Callable[[np.ndarray], np.ndarray],
        near_exponent: float,
        far_exponent: float,
        *,
        unit_m: float = 1.0,
        breakpoints_m: Sequence[float] = (),
        height_m: float = 0.0,
        min_distance_m: float = 0.0,
        r_inf_m: float = inf,
        name: str = "function",
    ) -> None:
        owner, breaks = "PathLossFunction", [float(r) for r in breakpoints_m]
        check(owner, "near_exponent", 0 <= near_exponent <= _STEEPEST, f"0 to {_STEEPEST:g}", near_exponent)
        _check_near(owner, "near_exponent", near_exponent)
        check(owner, "far_exponent", far_exponent >= 0, "0 or more", far_exponent)
        check(owner, "unit_m", _SHORTEST_M <= unit_m <= _LONGEST_M, f"{_SHORTEST_M:g} to {_LONGEST_M:g} m", unit_m)
        _check_breakpoints(owner, breaks, r_inf_m)
        self._set_geometry(float(unit_m), height_m, min_distance_m, r_inf_m)
        if r_inf_m == inf:
            words = "above 2 on the infinite plane, or interference is infinite (or give r_inf_m)"
            check(owner, "far_exponent", far_exponent > 2, words, far_exponent)
        self.breakpoints = np.array(breaks) / unit_m
        self._function, self._name = log_loss_m, name
        self._log_unit = log(unit_m)
        self.near_exponent = 0.0 if height_m or min_distance_m else float(near_exponent)
        self.far_exponent = float(far_exponent)
        rim = min(log(self.r_inf), 25.0) if isfinite(self.r_inf) else 25.0
        probe = np.asarray(log_loss_m(np.linspace(-25.0, rim, 2001) + self._log_unit))
        check(owner, "log_loss_m", not np.isnan(probe).any() and probe[0] < inf, "finite", "nan or inf")
        check(owner, "log_loss_m", (np.diff(probe[probe < inf]) >= -1e-9).all(), "nowhere falling", "one that falls")
        self._log_loss_at_unit = float(np.asarray(log_loss_m(np.array([self._log_unit])))[0])
        self.gain_at_unit = float(np.exp(-self._log_loss_at_unit))

    def slant_log_loss(self, log_r):
        return np.asarray(self._function(log_r + self._log_unit), dtype=np.float64) - self._log_loss_at_unit

    def slant_log_distance(self, log_loss):
        # Bisection in asinh(ln r), so that far places cost no more than near ones.
        low, high = np.full(log_loss.shape, -21.0), np.full(log_loss.shape, 21.0)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(60):
                middle = (low + high) / 2
                is_near = self.slant_log_loss(np.sinh(middle)) <= log_loss
                low, high = np.where(is_near, middle, low), np.where(is_near, high, middle)
        return np.where(low == -21.0, -inf, np.where(high == 21.0, inf, np.sinh(low)))

    def _log_turns(self):
        return np.arange(-16.0, 17.0)

    def describe(self):
        return f"{self._name}{self._describe_geometry()}"


class PathLossTable(PathLossFunction):
    """A measured law: straight lines of ln l over ln r through the points, the first and last continued outside.

    Args:
        r_m: distances in metres, ascending, at least 2.
        loss: linear losses there, positive, nowhere falling.

    Raises:
        ValueError: the points do not make a law, or a length is outside its range.
    """

    def __init__(
        self,
        r_m: Sequence[float],
        loss: Sequence[float],
        height_m: float = 0.0,
        min_distance_m: float = 0.0,
        r_inf_m: float = inf,
        name: str = "table",
    ) -> None:
        owner = "PathLossTable"
        r, values = np.asarray(r_m, dtype=np.float64), np.asarray(loss, dtype=np.float64)
        check(owner, "r_m", r.ndim == 1 and len(r) >= 2, "at least 2 distances", f"shape {r.shape}")
        is_rising = bool((r > 0).all() and (np.diff(r) > 0).all() and np.isfinite(r).all())
        check(owner, "r_m", is_rising, "positive, finite and strictly increasing", r_m)
        check(owner, "loss", values.shape == r.shape, f"one for each of the {len(r)} distances", f"{values.shape}")
        is_rising = bool((values > 0).all() and (np.diff(values) >= 0).all() and np.isfinite(values).all())
        check(owner, "loss", is_rising, "positive, finite and nowhere falling", loss)
        log_r, log_l = np.log(r), np.log(values)
        slopes = np.diff(log_l) / np.diff(log_r)

        def log_loss_m(place):
            inside = np.interp(place, log_r, log_l)
            before, after = np.minimum(place - log_r[0], 0), np.maximum(place - log_r[-1], 0)
            near = slopes[0] * before if slopes[0] else 0.0
            return inside + near + (slopes[-1] * after if slopes[-1] else 0.0)

        super().__init__(
            log_loss_m, slopes[0], slopes[-1], unit_m=r[0], breakpoints_m=r, height_m=height_m,
            min_distance_m=min_distance_m, r_inf_m=r_inf_m, name=name,
        )  # fmt: skip
