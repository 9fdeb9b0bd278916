"""Sums over realisations whose bits do not depend on how a run was cut into calls, resumed, or spread over ranks.

The samplers give float64 sums per batch of realisations. A long run has far too many batches to keep, so neighbours are
merged along one fixed binary tree over batch numbers: what is kept depends on how many batches there were, and on
nothing else. Between 64 and 128 groups stay (all batches, while there are fewer), enough for intervals of anything that
is derived from the means, by the jackknife.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from tokenweave_ops import estimate_from_sums
from tokenweave_ops.sinr_field import BATCH

MOST_GROUPS = 128
TINY = 1e-150


class Groups(NamedTuple):
    """Sums of neighbouring batches, disjoint and together all of the run.

    Attributes:
        sums: float64 ``[groups, densities, items]``.
        sizes: int64 ``[groups]``, realisations in each.
    """

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Over all realisations, ``[densities, items]``."""
        return self.sums.sum(axis=0) / self.sizes.sum()

    def without_each(self) -> np.ndarray:
        """The means over all groups but one, ``[groups, densities, items]``."""
        with np.errstate(invalid="ignore"):  # an infinite rate stays without a number
            rest = self.sums.sum(axis=0) - self.sums
        return rest / (self.sizes.sum() - self.sizes)[:, None, None]


class Interval(NamedTuple):
    """A derived quantity with its standard error and the ends of its 95 % interval; nan where they are not known."""

    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray


def jackknife(function: Callable[[np.ndarray], np.ndarray], groups: Groups, confidence: float = 0.95) -> Interval:
    """The interval of ``function(means)``, means ``[densities, items]``, from leaving out one group at a time.

    Groups may differ in size: Busing, Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and
    Computing 9 (1999). Needs two groups; with one, all but the value is nan.
    """
    value = np.asarray(function(groups.means), dtype=np.float64)
    count = len(groups.sizes)
    if count < 2:
        unknown = np.full_like(value, np.nan)
        return Interval(value, unknown, unknown, unknown)
    shares = (groups.sizes.sum() / groups.sizes).reshape(-1, *[1] * value.ndim)
    replicates = np.stack([np.asarray(function(means), dtype=np.float64) for means in groups.without_each()])
    pseudo_values = shares * value - (shares - 1) * replicates
    centre = (pseudo_values / shares).sum(axis=0)
    error = np.sqrt(((pseudo_values - centre) ** 2 / (shares - 1)).mean(axis=0))
    reach = stats.t.ppf(0.5 + confidence / 2, count - 1) * error
    return Interval(value, error, value - reach, value + reach)


class Accumulator:
    """Sums of value and of value squared, batch after batch.

    Args:
        sums_shape: (densities, items) of the sampler's sums.
        histogram_shape: of its histogram.
    """

    def __init__(self, sums_shape: tuple[int, int], histogram_shape: tuple[int, ...]):
        self._shape = (*sums_shape, 2)
        self._group_level = 0  # a group is 2^level batches
        self._nodes: list[tuple[int, np.ndarray]] = []  # (level, sums): whole groups, then ever smaller subtrees
        self._histogram = np.zeros(histogram_shape, dtype=np.int64)
        self._last: tuple[np.ndarray, np.ndarray, int] | None = None  # sums, histogram and size of a short last batch
        self.num_batches = 0

    @property
    def num_realisations(self) -> int:
        return self.num_batches * BATCH + (self._last[2] if self._last else 0)

    def add(self, sums: np.ndarray, histogram: np.ndarray) -> None:
        """The next batches, all of them whole: float64 ``[batches, densities, items, 2]`` and their histogram."""
        if self._last:
            raise ValueError("Accumulator: nothing can follow a short batch")
        for batch in sums.reshape(-1, *self._shape):
            self._push(batch.astype(np.float64, copy=True))
        self._histogram += histogram

    def add_last(self, sums: np.ndarray, histogram: np.ndarray, num_realisations: int) -> None:
        """A batch that is not whole. It stays out of the tree and of what is saved: a run that goes on repeats it."""
        if not 0 < num_realisations < BATCH:
            raise ValueError(f"Accumulator: a short batch has 1 to {BATCH - 1} realisations, got {num_realisations}")
        self._last = (sums.reshape(self._shape).copy(), histogram.copy(), num_realisations)

    def _push(self, sums: np.ndarray) -> None:
        self.num_batches += 1
        level = 0
        while level < self._group_level and self._nodes and self._nodes[-1][0] == level:
            sums = self._nodes.pop()[1] + sums
            level += 1
        self._nodes.append((level, sums))
        if self.num_batches == MOST_GROUPS << self._group_level:  # all of them whole groups: merge each two
            pairs = zip(self._nodes[::2], self._nodes[1::2], strict=True)
            self._nodes = [(level + 1, left + right) for (level, left), (_, right) in pairs]
            self._group_level += 1

    def _parts(self) -> np.ndarray:
        parts = [sums for _, sums in self._nodes] + ([self._last[0]] if self._last else [])
        return np.stack(parts) if parts else np.zeros((0, *self._shape))

    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and their standard errors, each ``[densities, items]``.

        A mean so small that its square is no float64 has its error from the groups; nan if there is one only.
        """
        mean, error = (
            values.numpy() for values in estimate_from_sums(torch.from_numpy(self._parts()), self.num_realisations)
        )
        tiny = (mean > 0) & (mean < TINY)
        if tiny.any():
            scale = np.where(tiny, mean, 1.0)
            groups = self.groups()
            spread = jackknife(lambda means: means, Groups(groups.sums / scale, groups.sizes))
            error[tiny] = (spread.standard_error * scale)[tiny]
        return mean, error

    def mean_square(self) -> np.ndarray:
        """Means of the squares, ``[densities, items]``."""
        return self._parts()[..., 1].sum(axis=0) / self.num_realisations

    def histogram(self) -> np.ndarray:
        return self._histogram + self._last[1] if self._last else self._histogram.copy()

    def groups(self) -> Groups:
        """Whole groups, and one more of what is left over."""
        parts = self._parts()[..., 0]
        whole = sum(level == self._group_level for level, _ in self._nodes)
        sizes = np.full(whole, BATCH << self._group_level, dtype=np.int64)
        left_over = self.num_realisations - int(sizes.sum())
        if left_over:
            parts = np.concatenate([parts[:whole], parts[whole:].sum(axis=0, keepdims=True)])
            sizes = np.append(sizes, left_over)
        return Groups(parts, sizes)

    def state_dict(self) -> dict[str, np.ndarray]:
        """All whole batches, for :meth:`load_state_dict`, as arrays that npz can hold."""
        nodes = [sums for _, sums in self._nodes]
        return {
            "num_batches": np.int64(self.num_batches),
            "node_sums": np.stack(nodes) if nodes else np.zeros((0, *self._shape)),
            "histogram": self._histogram.copy(),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues where the other one stood. Raises ValueError where the state does not fit."""
        num_batches, sums, histogram = (state[name] for name in ("num_batches", "node_sums", "histogram"))
        self.num_batches, self._last = int(num_batches), None
        self._group_level, levels = _levels(self.num_batches)
        if sums.shape != (len(levels), *self._shape) or histogram.shape != self._histogram.shape:
            raise ValueError("Accumulator: the state is of another run: its arrays have another shape")
        self._nodes = list(zip(levels, sums.astype(np.float64), strict=True))
        self._histogram = histogram.astype(np.int64)


def _levels(num_batches: int) -> tuple[int, list[int]]:
    """The level of a group and those of all nodes, after so many batches."""
    group_level = max(0, num_batches.bit_length() - MOST_GROUPS.bit_length() + 1)
    whole, rest = divmod(num_batches, 1 << group_level)
    smaller = [level for level in reversed(range(group_level)) if rest >> level & 1]
    return group_level, [group_level] * whole + smaller
