"""Family sinr_field: the signal to interference and noise ratio (SINR) of a user at the origin of a Poisson field of
transmitters, sampled for whole sweeps of densities and thresholds at once.

Three samplers, each a pure function of its arguments and of (seed, realisation number):

- :func:`sample_power_domain`: strongest cell, any fading. Received powers are themselves a Poisson process, of tail
  measure ``density * L1(x)``, so the strongest ``num_terms`` of them are ``L1^-1(arrival / density)`` for the arrivals
  of a unit Poisson process, and what is left is close to normal. Its cost does not depend on the density.
- :func:`sample_geometry`: base stations by distance, ``r = sqrt(arrival / (pi density))``, each with its own mark;
  strongest or nearest cell.
- :func:`rayleigh_conditional`: the probability of coverage given the geometry, under Rayleigh fading: nearest cell, or
  strongest cell for thresholds of at least 1. Its distribution over geometries is the meta-distribution.

One realisation serves all densities (common random numbers), so curves over density are smooth.

Numeric contract, met by every backend:

- Philox4x32-10, key seed, counter (step, realisation, stream): word w of step s gives arrival, or mark, 4 s + w.
  Streams: 0 arrivals, 1 marks, 3 (step 0) the normal residual and the place of the rate's nodes, 4 activity.
- An arrival adds ``-log(1 - v)``, v = (word + 1/2) / 2^32: from 1.2e-10 to 22.9, correct to a few units in the last
  place at both ends. Arrivals are added up in fp32, one by one. The mark of a word is that exceeded with probability
  1 - v, looked up by the smaller of v and 1 - v.
- Powers are kept as log2 and interference relative to its largest term, in fp32, so that no law of fading overflows.
  The interference is summed apart from the signal, never as a difference. A SINR without interference and noise is
  +inf; without any transmitter it is 0.
- Sums are float64: each cell of 256 realisations is added up by 32 lanes, then the lanes as a tree; the cells of a
  batch of 16,384 in order. So the same bits for any grid, any number of threads, any split of a run at batches.
- Every product that is added is a fused multiply-add, logarithms and exponentials are polynomials: a GPU, the
  emulated kernels and a CPU with AVX2 or AVX-512 give the same bits; on a CPU without fused multiply-add results
  differ by rounding, a unit or two in the last place of log2 of the powers: 5e-5 dB for powers of 2^-128 to 2^128.
- ``residual``: "gauss" adds the mean of what the finite number of terms leaves out and a normal deviate of its
  variance, clipped at 0; "mean" only the mean; "none" nothing, which is what simulations in a finite window do.

Source: Nguyen and Kountouris, "Performance limits of network densification", arXiv 1611.07790 (the system model);
the power domain is the mapping theorem for Poisson processes.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from tokenweave_ops._library import define_op
from tokenweave_ops._sinr_tables import GeometryTable, LogTable, PowerTable, SinrGrid

BATCH = 16384  # realisations whose sums are given apart
HISTOGRAM_BINS = 512
HISTOGRAM_LOW = (
    -64
)  # log2 SINR at the lower edge of the first bin, which also takes all below; the last takes all above
HISTOGRAM_PER_OCTAVE = 4
META_BINS = 256  # of [0, 1], for conditional coverage
MOMENTS = ("rate", "inverse_sinr", "residual_share")
MAX_TERMS = 64
MAX_POINTS = 1 << 20
MAX_RATE_NODES = 16
RESIDUALS = ("none", "mean", "gauss")
MAX_REALISATIONS = 1 << 30  # of one call


# ---------------------------------------------------------------------------------------------- schemas, fake kernels


def _empty_outputs(scales, thresholds, num_realisations, moments, histogram_shape, samples_shape):
    num_batches = (num_realisations + BATCH - 1) // BATCH
    items = moments + thresholds.shape[0]
    sums = scales.new_empty((num_batches, scales.shape[0], items, 2), dtype=torch.float64)
    return sums, scales.new_empty(histogram_shape, dtype=torch.int64), scales.new_empty(samples_shape)


def _fake_sampler(scales, thresholds, num_realisations, keep_samples):
    kept = num_realisations if keep_samples else 0
    densities = scales.shape[0]
    shapes = (densities, HISTOGRAM_BINS), (densities, kept, 2)
    return _empty_outputs(scales, thresholds, num_realisations, len(MOMENTS), *shapes)


def _fake_conditional(scales, thresholds, num_realisations, keep_samples):
    kept = num_realisations if keep_samples else 0
    shape = scales.shape[0], thresholds.shape[0]
    return _empty_outputs(scales, thresholds, num_realisations, 0, (*shape, META_BINS), (*shape, kept))


define_op(
    "sample_power_domain(Tensor scales, Tensor thresholds, Tensor inverse, Tensor measure, int inverse_key,"
    " int inverse_steps, int measure_negative, int measure_steps, float cut, float noise, float activity,"
    " int num_terms, int rate_nodes, int residual, int seed, int first_realisation, int num_realisations,"
    " bool keep_samples)"
    " -> (Tensor sums, Tensor histogram, Tensor samples)",
    fake=lambda scales, thresholds, *rest: _fake_sampler(scales, thresholds, *rest[-2:]),
)
define_op(
    "sample_geometry(Tensor scales, Tensor thresholds, Tensor gain, Tensor fading, Tensor far, int gain_key,"
    " int gain_steps, int fading_key, int fading_steps, int far_key, int far_steps, float height, float min_distance,"
    " float r_inf, float mark_mean, float mark_second_moment, float noise, float activity, int num_points,"
    " bool nearest, int residual, int seed, int first_realisation, int num_realisations, bool keep_samples)"
    " -> (Tensor sums, Tensor histogram, Tensor samples)",
    fake=lambda scales, thresholds, *rest: _fake_sampler(scales, thresholds, *rest[-2:]),
)
define_op(
    "rayleigh_conditional(Tensor scales, Tensor thresholds, Tensor gain, Tensor far, int gain_key, int gain_steps,"
    " int far_key, int far_steps, float height, float min_distance, float r_inf, float noise, int num_points,"
    " bool nearest, int seed, int first_realisation, int num_realisations, bool keep_samples)"
    " -> (Tensor sums, Tensor histogram, Tensor samples)",
    fake=lambda scales, thresholds, *rest: _fake_conditional(scales, thresholds, *rest[-2:]),
)

_sample_power_domain = torch.ops.tokenweave.sample_power_domain.default
_sample_geometry = torch.ops.tokenweave.sample_geometry.default
_rayleigh_conditional = torch.ops.tokenweave.rayleigh_conditional.default


# -------------------------------------------------------------------------------------------------- public functions


class Estimate(NamedTuple):
    """A mean over realisations and its standard error, float64."""

    mean: Tensor
    standard_error: Tensor


class SinrSums(NamedTuple):
    """What a sampler returns.

    Attributes:
        sums: float64 ``[batches, densities, 3 + thresholds, 2]``, sums of value and of value squared over the
            realisations of a batch of 16,384 (the last may be shorter). Values: the rate ln(1 + SINR) in nats; 1/SINR;
            the standard deviation of the residual relative to the interference; then the coverage of each threshold.
        histogram: int64 ``[densities, 512]`` of log2 SINR, 4 bins an octave from 2^-64; the outer bins take the rest.
        samples: fp32 ``[densities, realisations, 2]``, log2 of signal and of interference without noise, if kept;
            else with 0 realisations.
        num_realisations: how many there were.
    """

    sums: Tensor
    histogram: Tensor
    samples: Tensor
    num_realisations: int

    @property
    def coverage(self) -> Estimate:
        """P(SINR > threshold), ``[densities, thresholds]``."""
        return estimate_from_sums(self.sums[:, :, len(MOMENTS) :], self.num_realisations)

    @property
    def rate(self) -> Estimate:
        """E ln(1 + SINR) in nats, ``[densities]``."""
        return estimate_from_sums(self.sums[:, :, 0], self.num_realisations)

    @property
    def inverse_sinr(self) -> Estimate:
        """E[1 / SINR], ``[densities]``; inf where a realisation had no transmitter."""
        return estimate_from_sums(self.sums[:, :, 1], self.num_realisations)


class ConditionalSums(NamedTuple):
    """What :func:`rayleigh_conditional` returns.

    Attributes:
        sums: float64 ``[batches, densities, thresholds, 2]``, sums of the conditional coverage and of its square.
        histogram: int64 ``[densities, thresholds, 256]`` of the conditional coverage over [0, 1], the
            meta-distribution.
        samples: fp32 ``[densities, thresholds, realisations]``, the conditional coverage, if kept.
        num_realisations: how many there were.
    """

    sums: Tensor
    histogram: Tensor
    samples: Tensor
    num_realisations: int

    @property
    def coverage(self) -> Estimate:
        """P(SINR > threshold), ``[densities, thresholds]``."""
        return estimate_from_sums(self.sums, self.num_realisations)


def estimate_from_sums(sums: Tensor, num_realisations: int) -> Estimate:
    """Mean and standard error from sums ``[batches, ..., 2]`` of value and value squared, batches added in order. The
    error is inf where it is not known: of one realisation, and where values or their squares are infinite."""
    total = torch.zeros(sums.shape[1:], dtype=torch.float64, device=sums.device)
    for batch in sums:
        total = total + batch
    mean = total[..., 0] / num_realisations
    variance = (total[..., 1] / num_realisations - mean * mean).clamp(min=0)
    error = (variance / max(num_realisations - 1, 1)).sqrt()
    is_known = error.isfinite() & (num_realisations > 1)
    return Estimate(mean, torch.where(is_known, error, inf))


def _check(op: str, name: str, is_good: bool, words: str, value: object) -> None:
    if not is_good:
        raise ValueError(f"{op}: {name} must be {words}, got {value}")


def _residual_number(op: str, residual: str) -> int:
    _check(op, "residual", residual in RESIDUALS, "none, mean or gauss", repr(residual))
    return RESIDUALS.index(residual)


def sample_power_domain(
    table: PowerTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_terms: int = 16,
    rate_nodes: int = 4,
    noise: float = 0.0,
    activity: float = 1.0,
    residual: str = "gauss",
    seed: int = 0,
    keep_samples: bool = False,
) -> SinrSums:
    """Strongest-cell SINR by the power domain. No gradient.

    Coverage is ``min(1, density * L1(y (I + W)) / Gamma_2)`` given everything but the strongest power, whose arrival is
    uniform below the second one: unbiased, and smooth, so that a coverage of 1e-20 is resolved. The rate is averaged
    over ``rate_nodes`` such strongest powers, of arrivals ``Gamma_2 * v^4``, v at one random place in each of as many
    equal pieces of (0, 1): unbiased as well. Histogram, 1/SINR and samples are of the realisation itself.

    Args:
        table: of the network; covers the densities.
        grid: densities and thresholds.
        num_realisations: 1 to 2^30.
        first_realisation: number of the first one, a multiple of 16,384: calls that share a seed and whose ranges do
            not overlap are independent, and together equal one call over the whole range.
        num_terms: powers taken one by one, a multiple of 4 from 4 to 64. 16 leaves a bias below 1e-4 for path-loss
            exponents from 2.5 on.
        rate_nodes: 0 to 16; 0 takes the rate of the realisation itself.
        noise: W, in units of the power at distance u.
        activity: probability that an interferer transmits; the serving cell always does.
        residual: "gauss", "mean" or "none".
        seed: -2^63 to 2^63 - 1.
        keep_samples: also return log2 of signal and interference.

    Raises:
        ValueError: an argument is outside its range.
        RuntimeError: a tensor does not fit, or no kernels were built for the device.
    """
    number = _residual_number("sample_power_domain", residual)
    inverse, measure = table.inverse, table.measure
    return SinrSums(
        *_sample_power_domain(
            grid.scales, grid.log2_thresholds, inverse.coefficients, measure.coefficients, inverse.first_key,
            inverse.log2_steps, measure.negative, measure.log2_steps, table.cut, noise, activity, num_terms, rate_nodes,
            number, seed, first_realisation, num_realisations, keep_samples,
        ),
        num_realisations,
    )  # fmt: skip


def _gain_arguments(gain: Tensor | LogTable) -> tuple[Tensor, int, int]:
    return (gain.coefficients, gain.first_key, gain.log2_steps) if isinstance(gain, LogTable) else (gain, 0, 0)


def sample_geometry(
    table: GeometryTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_points: int = 256,
    association: str = "strongest",
    noise: float = 0.0,
    activity: float = 1.0,
    residual: str = "gauss",
    seed: int = 0,
    keep_samples: bool = False,
) -> SinrSums:
    """SINR from the ``num_points`` nearest base stations, each with its own mark, and the far field. No gradient.

    Coverage counts realisations: its sums are whole numbers. ``residual_share``, the last of :data:`MOMENTS`, says how
    much the far field's fluctuation matters; a mean above 0.01 asks for more points or for :func:`sample_power_domain`.

    Args:
        table: of the network.
        num_points: base stations taken one by one, a multiple of 4 from 4 to 2^20.
        association: "strongest" by received power, or "nearest" by distance. With ``activity`` below 1 the strongest
            is chosen among all, idle ones too.
        grid, num_realisations, first_realisation, noise, activity, residual, seed, keep_samples: as in
            :func:`sample_power_domain`. "gauss" needs a finite second moment of the marks, "mean" a finite mean.

    Raises:
        ValueError: an argument is outside its range.
        RuntimeError: a tensor does not fit, or no kernels were built for the device.
    """
    number = _residual_number("sample_geometry", residual)
    nearest = _is_nearest("sample_geometry", association)
    return SinrSums(
        *_sample_geometry(
            grid.scales, grid.log2_thresholds, *_geometry_tensors(table, with_fading=True), table.height,
            table.min_distance, table.r_inf, table.mark_mean, table.mark_second_moment, noise, activity, num_points,
            nearest, number, seed, first_realisation, num_realisations, keep_samples,
        ),
        num_realisations,
    )  # fmt: skip


def _is_nearest(op: str, association: str) -> bool:
    _check(op, "association", association in ("strongest", "nearest"), "strongest or nearest", repr(association))
    return association == "nearest"


def _geometry_tensors(table: GeometryTable, with_fading: bool) -> tuple:
    gain, *gain_numbers = _gain_arguments(table.gain)
    tables = [table.fading, table.far] if with_fading else [table.far]
    numbers = [number for one in tables for number in (one.first_key, one.log2_steps)]
    return (gain, *(one.coefficients for one in tables), *gain_numbers, *numbers)


def rayleigh_conditional(
    table: GeometryTable,
    grid: SinrGrid,
    *,
    num_realisations: int,
    first_realisation: int = 0,
    num_points: int = 64,
    association: str = "nearest",
    noise: float = 0.0,
    seed: int = 0,
    keep_samples: bool = False,
) -> ConditionalSums:
    """Coverage given the distances of all base stations, under Rayleigh fading of unit mean. No gradient.

    Nearest cell: ``exp(-T W l_0) * product over i > 0 of 1 / (1 + T l_0 / l_i)``. Strongest cell, T >= 1, where at most
    one station can be above the threshold: the sum over j of the same product for server j. What lies beyond the points
    is averaged: ``exp(-density * integral of x / (1 + x))``, x = T l_j gain, by the integrals m1 of x and m2 of x^2 as
    ``exp(-density * m1 / (1 + m2 / m1))``: exact to second order in x, and never above 1.

    Args:
        table: of the network; its marks are not used.
        grid: densities and thresholds.
        num_points: base stations, a multiple of 4 from 4 to 2^20; at most 64 for the strongest cell.
        association: "nearest" or "strongest".
        num_realisations, first_realisation, noise, seed: as in :func:`sample_power_domain`.
        keep_samples: also return the conditional coverage of each realisation.

    Raises:
        ValueError: an argument is outside its range, or a threshold below 1 is asked of the strongest cell.
        RuntimeError: a tensor does not fit, or no kernels were built for the device.
    """
    op = "rayleigh_conditional"
    nearest = _is_nearest(op, association)
    if not nearest:
        lowest = min(grid.thresholds, default=1.0)
        _check(op, "thresholds", lowest >= 1, "at least 1 for the strongest cell", lowest)
    return ConditionalSums(
        *_rayleigh_conditional(
            grid.scales, grid.log2_thresholds, *_geometry_tensors(table, with_fading=False), table.height,
            table.min_distance, table.r_inf, noise, num_points, nearest, seed, first_realisation, num_realisations,
            keep_samples,
        ),
        num_realisations,
    )  # fmt: skip
