"""Laws that the user brings: a function, or a table of measured marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, sqrt

import numpy as np

from tokenweave_models.densification.fading.base import Fading

MAX_POINTS = 200  # of a table: each is a kink that integrals over the law have to stop at
_FIT_POINTS = 5  # fewest that a tail is fitted to


class FadingFunction(Fading):
    """A user's law.

    Args:
        log_survival: takes ln m, float64 of any shape, and gives ln P(mark > m); continuous but for ``log_kinks``,
            exact relative to itself also where it is close to 0.
        tail_index, tail_constant: of P(mark > x) ~ tail_constant x^-tail_index; 0 if slowly varying, inf if lighter
            than any power. They decide what a dense network does, and no function can be asked for them.
        log_kinks, log_min, log_max: as in :class:`Fading`.
        log_quantile: ln m over e, if there is a closed form.
        log_mean_exists: whether E ln(1 + mark) is finite; has to be said where tail_index is 0.

    Raises:
        ValueError: the function rises, is positive, or the mark is always 0; an argument is outside its range.
    """

    def __init__(
        self,
        log_survival: Callable[[np.ndarray], np.ndarray],
        tail_index: float,
        *,
        tail_constant: float = np.nan,
        log_kinks: Sequence[float] = (),
        log_min: float = -inf,
        log_max: float = inf,
        log_quantile: Callable[[np.ndarray], np.ndarray] | None = None,
        log_mean_exists: bool | None = None,
        name: str = "function",
    ) -> None:
        if not tail_index >= 0:
            raise ValueError(f"FadingFunction: tail_index must be 0 or more, or inf, got {tail_index}")
        if tail_index == 0 and log_mean_exists is None:
            raise ValueError("FadingFunction: log_mean_exists must be given where tail_index is 0")
        self.tail_index, self.tail_constant = float(tail_index), tail_constant
        self.log_kinks, self.log_min, self.log_max = tuple(map(float, log_kinks)), log_min, log_max
        self._log_survival, self._log_quantile, self._name = log_survival, log_quantile, name
        self._log_mean_exists = tail_index > 0 if log_mean_exists is None else log_mean_exists
        probe = np.asarray(self.log_survival(np.linspace(-40.0, 40.0, 801)))
        if np.isnan(probe).any() or (probe > 0).any() or (np.diff(probe[probe > -inf]) > 1e-9).any():
            raise ValueError("FadingFunction: log_survival must be at most 0, nowhere rising and not nan")
        if (probe == -inf).all():
            raise ValueError("FadingFunction: log_survival must not be -inf everywhere: the mark would always be 0")

    def log_survival(self, log_m):
        log_m = np.asarray(log_m, dtype=np.float64)
        with np.errstate(all="ignore"):
            value = np.asarray(self._log_survival(log_m), dtype=np.float64)
        return np.where(log_m < self.log_min, 0.0, np.where(log_m >= self.log_max, -inf, value))

    def log_quantile(self, e):
        return super().log_quantile(e) if self._log_quantile is None else self._log_quantile(e)

    @property
    def log_mean_exists(self):
        return self._log_mean_exists

    def describe(self):
        return self._name


class FadingTable(Fading):
    """A measured law: marks m_1 < m_2 < ... and P(mark > m_k); straight lines of its logarithm over ln m between them.

    Beyond the last mark the tail goes on as a power. Its index is given, or fitted to the last tenth of the points
    (at least 5), and then ``tail_is_fitted`` is set: what theory predicts of a dense network rests on that fit.

    Args:
        marks: float64 ``[n]``, positive, strictly increasing, n >= 2.
        survival: float64 ``[n]``, first 1 (the table is normalised), strictly decreasing, last above 0.
        tail_index: above 0; not given: fitted.

    Raises:
        ValueError: the points do not make a law, or the table is not normalised.
    """

    def __init__(
        self, marks: Sequence[float], survival: Sequence[float], tail_index: float | None = None, name: str = "table"
    ) -> None:
        m, above = np.asarray(marks, dtype=np.float64), np.asarray(survival, dtype=np.float64)
        if m.ndim != 1 or len(m) < 2 or not ((m > 0).all() and (np.diff(m) > 0).all() and np.isfinite(m).all()):
            raise ValueError("FadingTable: marks must be at least 2 positive, finite, strictly increasing numbers")
        if len(m) > MAX_POINTS:
            raise ValueError(f"FadingTable: marks must be at most {MAX_POINTS}, got {len(m)}; from_samples thins them")
        if above.shape != m.shape or not ((above > 0).all() and (np.diff(above) < 0).all()):
            raise ValueError(f"FadingTable: survival must be {len(m)} positive, strictly decreasing numbers")
        if above[0] != 1:
            raise ValueError(
                f"FadingTable: survival must begin with 1, P(mark > smallest mark), got {above[0]:g}; "
                "a table that is not normalised, or of a mark that may be 0, has no meaning here"
            )
        self._log_m, self._log_above, self._name = np.log(m), np.log(above), name
        self.log_kinks, self.log_min = tuple(self._log_m), float(self._log_m[0])
        self.tail_is_fitted = tail_index is None
        if tail_index is None:
            last = slice(-min(max(_FIT_POINTS, len(m) // 10), len(m)), None)
            tail_index = -np.polyfit(self._log_m[last], self._log_above[last], 1)[0]
        if not 0 < tail_index < inf:
            raise ValueError(f"FadingTable: tail_index must be positive and finite, got {tail_index}")
        self.tail_index = float(tail_index)
        self.tail_constant = float(np.exp(self._log_above[-1] + self.tail_index * self._log_m[-1]))

    @classmethod
    def from_samples(cls, samples: Sequence[float], tail_index: float | None = None, points: int = 64) -> FadingTable:
        """The law of measured marks: about ``points`` of their order statistics, and beyond the largest sqrt(n) of them
        a power whose index, if not given, is Hill's estimate (Annals of Statistics, 1975) from these.

        Raises:
            ValueError: fewer than 20 samples, or one that is not positive and finite.
        """
        ordered = np.sort(np.asarray(samples, dtype=np.float64).ravel())
        if len(ordered) < 20 or not (ordered[0] > 0 and np.isfinite(ordered).all()):
            raise ValueError("FadingTable: samples must be at least 20 positive, finite numbers")
        count = len(ordered)
        kept = count - max(_FIT_POINTS, ceil(sqrt(count)))  # beyond, single samples decide; they set the tail
        spread = np.concatenate([np.linspace(0, 1, points // 2), 1 - np.geomspace(1, 1 - kept / count, points // 2)])
        ranks = np.unique(np.clip(np.round(spread * count).astype(int), 0, kept))
        ranks = ranks[np.concatenate([[True], np.diff(ordered[ranks]) > 0])]
        excess = np.log(ordered[ranks[-1] :] / ordered[ranks[-1]]).mean()
        is_fitted = tail_index is None
        table = cls(ordered[ranks], 1 - ranks / count, 1 / excess if is_fitted else tail_index, name="samples")
        table.tail_is_fitted = is_fitted
        return table

    def log_survival(self, log_m):
        log_m = np.asarray(log_m, dtype=np.float64)
        inside = np.interp(log_m, self._log_m, self._log_above)
        return inside - self.tail_index * np.maximum(log_m - self._log_m[-1], 0.0)

    def log_quantile(self, e):
        e = np.asarray(e, dtype=np.float64)
        inside = np.interp(e, -self._log_above, self._log_m)
        return inside + np.maximum(e + self._log_above[-1], 0.0) / self.tail_index

    def moment(self, power):
        if power >= self.tail_index:
            return inf
        slopes = -np.diff(self._log_above) / np.diff(self._log_m)  # of each piece, a power law of its own
        steps = np.diff(self._log_m)
        starts = np.exp(power * self._log_m[:-1] + self._log_above[:-1])
        excess = power - slopes
        with np.errstate(divide="ignore", invalid="ignore"):
            widths = np.where(np.abs(excess * steps) > 1e-12, np.expm1(excess * steps) / excess, steps)
        tail = self.tail_index / (self.tail_index - power) * np.exp(power * self._log_m[-1] + self._log_above[-1])
        return float((slopes * starts * widths).sum() + tail)

    def describe(self):
        return self._name
