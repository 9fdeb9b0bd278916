"""Two tools that keep every number as its natural logarithm: integrals of exp(...) over panels, and smooth curves that
are computed once and then looked up.

Powers of a Poisson field span more than any float: marks of a slowly varying law reach exp(1e10), coverage in a flat
near field falls below exp(-1e3). Nothing here ever leaves the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_NODES = 12  # of Gauss-Legendre, on each panel
_places, _weights = np.polynomial.legendre.leggauss(_NODES)
_PLACES, _WEIGHTS = (_places + 1) / 2, _weights / 2
_NEGLIGIBLE = 45.0  # panels that are smaller than the largest by exp(-45) are left out
_ROWS = 2048  # handled at once: bounds the memory


def log_integral(log_integrand: Callable[[np.ndarray, np.ndarray], np.ndarray], edges: np.ndarray) -> np.ndarray:
    """ln of the integral of ``exp(log_integrand)`` over the panels between ``edges``, one integral a row.

    Args:
        log_integrand: takes rows int ``[k, 1]`` and places ``[k, m]``, gives ``[k, m]``; -inf is allowed. It must be
            smooth within panels, and no panel may hide a peak that neither of its edges feels.
        edges: float64 ``[n, e]``, ascending in each row; equal edges make panels without weight.

    Returns:
        float64 ``[n]``; -inf where the integrand vanishes.
    """
    parts = [_log_integral(log_integrand, edges[k : k + _ROWS], k) for k in range(0, len(edges), _ROWS)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _log_integral(log_integrand, edges, first_row):
    count = len(edges)
    widths = np.diff(edges, axis=1)
    at_edges = log_integrand(first_row + np.arange(count)[:, None], edges)
    with np.errstate(divide="ignore"):
        heights = np.maximum(at_edges[:, :-1], at_edges[:, 1:]) + np.log(widths)
    best = heights.max(axis=1)
    is_kept = heights > (best - _NEGLIGIBLE)[:, None]
    is_near = is_kept.copy()  # beside a jump the edge itself may be on the wrong side
    is_near[:, 1:] |= is_kept[:, :-1]
    is_near[:, :-1] |= is_kept[:, 1:]
    total = _sum_panels(log_integrand, edges, widths, is_near, best, first_row)
    # An edge rounded to the wrong side of a jump promised what its panel does not hold: ask all panels of that row.
    wrong = np.flatnonzero(total < best - _NEGLIGIBLE / 3)
    if len(wrong):
        every = np.zeros_like(is_near)
        every[wrong] = True
        for _ in range(2):  # first to find the true height
            again = _sum_panels(log_integrand, edges, widths, every, best, first_row)
            best = np.where(np.isfinite(again), again, best)
        total[wrong] = again[wrong]
    return total


def _sum_panels(log_integrand, edges, widths, is_kept, best, first_row):
    """ln of the sum over the kept panels; best, float64 ``[n]``, is about as large as the result."""
    row, panel = np.nonzero(is_kept & (widths > 0))
    width = widths[row, panel]
    places = edges[row, panel][:, None] + width[:, None] * _PLACES
    with np.errstate(over="ignore", divide="ignore"):
        values = np.exp(log_integrand(first_row + row[:, None], places) - best[row][:, None] + np.log(width)[:, None])
        total = np.bincount(row, values @ _WEIGHTS, minlength=len(edges))
        return np.where(total > 0, best, -np.inf) + np.log(total)


_CURVE_NODES = 12
_chebyshev = np.cos(np.pi * (np.arange(_CURVE_NODES)[::-1] + 0.5) / _CURVE_NODES)  # ascending, inside (-1, 1)
_TO_CHEBYSHEV = np.linalg.inv(np.polynomial.chebyshev.chebvander(_chebyshev, _CURVE_NODES - 1))
_TO_MONOMIALS = np.stack(
    [np.pad(np.polynomial.chebyshev.cheb2poly(row), (0, _CURVE_NODES))[:_CURVE_NODES] for row in np.eye(_CURVE_NODES)]
)
_MAX_DEPTH = 44  # halvings of a panel, enough to reach an end where the curve is singular
_NOISE = 1e-9  # relative; worse than this is no rounding
_NARROWEST = 1e-3  # a panel inside the range is not halved below this width


class LogCurve:
    """A function of one variable that is smooth but for known kinks, as polynomials on adaptive panels.

    Panels are halved until the last coefficients are below ``tolerance`` (relative to the value where that is above
    1), and added on demand when a place outside the range is asked for, ever wider ones, so that 1e10 is in reach.
    """

    def __init__(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        *,
        kinks: Sequence[float] = (),
        low: float = -np.inf,
        high: float = np.inf,
        tolerance: float = 1e-11,
    ) -> None:
        """``function`` takes and gives float64 ``[n]``, finite for low < place < high; kinks and jumps of it are
        ``kinks``, where panels end."""
        self._function, self._tolerance = function, tolerance
        self._limits = low, high
        inside = sorted({float(kink) for kink in kinks if low < kink < high})
        self._kinks = np.array(inside)
        self._middle = inside[len(inside) // 2] if inside else float(np.clip(0.0, low, high))
        self.edges = np.array([self._middle])
        self.coefficients = np.zeros((0, _CURVE_NODES))

    def cover(self, low: float, high: float) -> None:
        """Adds panels until the range holds low and high, as far as the function is defined."""
        if not len(self.coefficients):
            low, high = min(low, self._middle - 1.0), max(high, self._middle + 1.0)
        low, high = (float(np.clip(place, *self._limits)) for place in (low, high))
        for side, goal in ((-1, low), (1, high)):
            end = self.edges[0] if side < 0 else self.edges[-1]
            if (goal - end) * side <= 0:
                continue
            places = [end]
            while (goal - places[-1]) * side > 0:  # to the same places in whichever steps, so values are the same
                place = places[-1] + side * (2.0 + 0.25 * abs(places[-1] - self._middle))
                places.append(float(np.clip(place, *self._limits)))
            kinks = self._kinks[(self._kinks > min(places)) & (self._kinks < max(places))]
            new = np.unique(np.concatenate([places, kinks]))
            edges, coefficients = self._fit(new)
            if side < 0:
                self.edges = np.concatenate([edges, self.edges[1:]])
                self.coefficients = np.concatenate([coefficients, self.coefficients])
            else:
                self.edges = np.concatenate([self.edges[:-1], edges])
                self.coefficients = np.concatenate([self.coefficients, coefficients])

    def _fit(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = edges[:-1], edges[1:]
        done_low, done = [], []
        coarser = np.full(len(low), np.inf)  # what was left over before the panel was halved
        for depth in range(_MAX_DEPTH + 1):
            places = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * _chebyshev
            values = self._function(places.ravel()).reshape(places.shape)
            if not np.isfinite(values).all():
                place = places[~np.isfinite(values)][0]
                raise ValueError(f"a smooth curve must be finite inside its range, but is not at {place:g}")
            series = values @ _TO_CHEBYSHEV.T
            scale = np.maximum(np.abs(values).max(axis=1), 1.0)
            left_over = np.abs(series[:, -3:]).max(axis=1) / scale
            # Half the width gains a factor of 2 even at a kink; what gains nothing is the function's own rounding.
            is_noise = (left_over < _NOISE) & (left_over > coarser / 1.5)
            is_good = (left_over <= self._tolerance) | is_noise
            is_outer = np.isin(low, self._limits) | np.isin(high, self._limits)
            is_good |= (high - low < _NARROWEST) & ~is_outer
            is_good |= depth == _MAX_DEPTH
            done_low.append(low[is_good])
            done.append(series[is_good] @ _TO_MONOMIALS)
            low, high = low[~is_good], high[~is_good]
            coarser = np.tile(left_over[~is_good], 2)
            if not len(low):
                break
            middle = (low + high) / 2
            low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        lows, coefficients = np.concatenate(done_low), np.concatenate(done)
        order = np.argsort(lows)
        return np.append(lows[order], edges[-1]), coefficients[order]

    def _locate(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        panel = np.clip(np.searchsorted(self.edges, place, side="right") - 1, 0, len(self.coefficients) - 1)
        half = (self.edges[panel + 1] - self.edges[panel]) / 2
        return panel, (place - self.edges[panel]) / half - 1, half

    def __call__(self, place: np.ndarray) -> np.ndarray:
        """Values at ``place``, of any shape. Every place must be finite and inside the limits."""
        place = np.asarray(place, dtype=np.float64)
        if not place.size:
            return np.zeros(place.shape)
        self.cover(place.min(), place.max())
        panel, local, _ = self._locate(place)
        return _horner(self.coefficients, panel, local)

    def slope(self, place: np.ndarray) -> np.ndarray:
        """The derivative at ``place``."""
        place = np.asarray(place, dtype=np.float64)
        self.cover(place.min(), place.max())
        panel, local, half = self._locate(place)
        return _horner(self.coefficients[:, 1:] * np.arange(1, _CURVE_NODES), panel, local) / half

    def edge_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Values at the left and at the right end of every panel, from inside."""
        signs = (-1.0) ** np.arange(_CURVE_NODES)
        return self.coefficients @ signs, self.coefficients.sum(axis=1)

    def cover_values(self, low: float, high: float, sign: int) -> None:
        """Adds panels until the values, which rise (``sign`` 1) or fall (-1), hold low and high, or it ends."""
        self.cover(self._middle, self._middle)
        for side in (-1, 1):
            step = 4.0
            falls = side * sign < 0
            goal = low if falls else high
            while True:
                left, right = self.edge_values()
                end, value = (self.edges[0], left[0]) if side < 0 else (self.edges[-1], right[-1])
                is_there = value <= goal if falls else value >= goal
                if is_there or end in self._limits or abs(end) > 1e300:
                    break
                self.cover(*((end - step, end) if side < 0 else (end, end + step)))
                step *= 1.5

    def inverse(self, value: np.ndarray, sign: int) -> np.ndarray:
        """The place where the curve, which rises (``sign`` 1) or falls (-1), has each value; inside a jump, the jump;
        beyond the end of the function, its end."""
        value = np.asarray(value, dtype=np.float64)
        if not value.size:
            return np.zeros(value.shape)
        self.cover_values(float(value.min()), float(value.max()), sign)
        left, _ = self.edge_values()
        # Rising order for searchsorted; polynomials of neighbours may cross by rounding.
        starts = np.maximum.accumulate(sign * left)
        panel = np.clip(np.searchsorted(starts, sign * value, side="right") - 1, 0, len(starts) - 1)
        low, high = np.full(value.shape, -1.0), np.full(value.shape, 1.0)
        local = np.zeros(value.shape)
        slopes = self.coefficients[:, 1:] * np.arange(1, _CURVE_NODES)
        todo = np.ones(value.shape, dtype=bool)
        for _ in range(60):
            at, here, wanted = panel[todo], local[todo], value[todo]
            error = sign * (_horner(self.coefficients, at, here) - wanted)
            below, above = np.where(error < 0, here, low[todo]), np.where(error < 0, high[todo], here)
            with np.errstate(divide="ignore", invalid="ignore"):
                guess = here - error / (sign * _horner(slopes, at, here))
            guess = np.where((guess >= below) & (guess <= above), guess, (below + above) / 2)
            low[todo], high[todo], local[todo] = below, above, guess
            todo[todo] = np.abs(guess - here) > 1e-14
            if not todo.any():
                break
        half = (self.edges[panel + 1] - self.edges[panel]) / 2
        place = self.edges[panel] + (local + 1) * half
        place = np.where(local > 1 - 1e-13, self.edges[panel + 1], place)  # exactly where a jump is
        return np.where(local < -1 + 1e-13, self.edges[panel], place)


def _horner(coefficients: np.ndarray, panel: np.ndarray, local: np.ndarray) -> np.ndarray:
    result = coefficients[panel, -1]
    for k in range(coefficients.shape[1] - 2, -1, -1):
        result = result * local + coefficients[panel, k]
    return result
