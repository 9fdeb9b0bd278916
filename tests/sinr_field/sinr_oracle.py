"""What the tests of family sinr_field share: networks, a call on any backend, and how far it may be from the reference.

Tolerances are derived. An arrival is the sum of up to N fp32 numbers, so a power carries the arrival's relative error
times its own slope; a lookup and a logarithm add a few units in the last place of their results. From there errors are
carried through the formulas, realisation by realisation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import inf, log, log2, pi

import numpy as np
import torch
from torch import Tensor

from tokenweave_ops import (
    ConditionalSums,
    GeometryTable,
    LogTable,
    PowerTable,
    SinrGrid,
    SinrSums,
    TwoSidedTable,
    testing,
)
from tokenweave_ops.reference import sinr_field as reference
from tokenweave_ops.sinr_field import HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE, META_BINS

family = testing.family("sinr_field")

OPS = ("sample_power_domain", "sample_geometry", "rayleigh_conditional")
HALF_ULP = 2.0**-24  # relative rounding error of fp32
DB = 10 * np.log10(2.0)  # of an octave of power


# ---------------------------------------------------------------------------------------------------------- networks


def power_table(log2_measure, densities=(1e-3, 1e3), log2_power=(-70.0, 12.0)) -> PowerTable:
    """Of any measure, given as log2 of it by log2 of the power, by the trapezoid rule on a fine grid. The lower end of
    ``log2_power`` must be so small a power that all powers below together are nothing."""
    z = np.linspace(*log2_power, 200_001)
    log_g = log2_measure(z)
    measure = -np.diff(np.exp2(log_g), prepend=2.0 ** log_g[0])
    power = np.exp2(z)
    # The integral of P^k from g on is that of P^k over the measure of all powers below P(g).
    mean, square = (np.cumsum(measure * (power**k + np.roll(power, 1) ** k) / 2) for k in (1, 2))
    planes = [z, np.log2(np.maximum(mean, 1e-300)), 0.5 * np.log2(np.maximum(square, 1e-300))]

    def inverse(argument):
        return np.stack([np.interp(np.log2(argument), log_g[::-1], plane[::-1]) for plane in planes])

    least, most = 2.0**-33 / densities[1], 256 / densities[0]
    low, high = log2_power
    return PowerTable(LogTable.fit(inverse, least, most), TwoSidedTable.fit(log2_measure, low, high))


def flat_near_field(z: np.ndarray) -> np.ndarray:
    """Rayleigh fading and the path loss max(1, r^4): L1(x) = pi e^-x + pi^1.5 / (2 sqrt(x)) erfc(sqrt(x))."""
    x = torch.exp2(torch.from_numpy(np.asarray(z, dtype=np.float64)))
    far = 1.5 * log(pi) - 0.5 * x.log() + torch.special.log_ndtr(-(2 * x).sqrt())
    return (torch.logaddexp(log(pi) - x, far) / log(2.0)).numpy()


def disc_power_table(radius: float) -> PowerTable:
    """No fading, path loss r^4, stations within a radius: powers exist below cut = pi radius^2."""
    cut = pi * radius**2

    def inverse(g):
        inside = np.minimum(g, cut * (1 - 1e-9))
        mean = pi**2 * (1 / inside - 1 / cut)
        variance = pi**4 / 3 * (1 / inside**3 - 1 / cut**3)
        return np.stack([2 * np.log2(pi / inside), np.log2(mean), 0.5 * np.log2(variance)])

    return PowerTable(
        LogTable.fit(inverse, 2.0**-33 / 1e3, cut * 16),
        TwoSidedTable.fit(lambda z: np.minimum(log2(pi) - 0.5 * z, log2(cut)), -60.0, 150.0),
        cut=cut,
    )


def log_pareto(e: np.ndarray) -> np.ndarray:
    return np.expm1(e) / log(2.0)


def log_pareto_power_table() -> PowerTable:
    """Log-Pareto fading and no path loss in a disc of area pi: L1(x) = pi / ln(e x) from x = 1 on."""

    def inverse(g):
        power = np.maximum(pi / g - 1, 0.0) / log(2.0)
        return np.stack([power, power, power])  # no mean beyond: to be used without a residual

    def log2_measure(z):
        return log2(pi) - np.log2(1 + log(2.0) * np.maximum(z, 0.0))

    return PowerTable(LogTable.fit(inverse, 2.0**-33 / 1e3, 16.0), TwoSidedTable.fit(log2_measure, -1.0, 1e12), cut=pi)


@functools.cache
def power_network(name: str) -> PowerTable:
    if name == "flat":
        return power_table(flat_near_field)
    if name == "log-Pareto":
        return log_pareto_power_table()
    if name == "disc":
        return disc_power_table(1.0)
    return PowerTable.single_slope(float(name))


POWER_NETWORKS = ("4", "3", "2.5", "8", "20", "flat", "disc")  # "20": delta = 0.1, powers over hundreds of octaves


def log_normal(deviation: float):
    """log2 of a log-normal mark of median 1; ``deviation`` of its natural logarithm."""

    def mark(e):
        # P(normal > x) = exp(-e), by bisection on log_ndtr
        target = -torch.from_numpy(np.asarray(e, dtype=np.float64))
        low, high = torch.full_like(target, -40.0), torch.full_like(target, 40.0)
        for _ in range(80):
            middle = (low + high) / 2
            above = torch.special.log_ndtr(-middle) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (deviation / log(2.0) * low).numpy()

    return mark


@functools.cache
def geometry_network(name: str) -> GeometryTable:
    """Path loss r^4 but where another is named."""
    slope = GeometryTable.single_slope
    if name == "no fading":
        return slope(4.0, fading=lambda e: 0 * e, mark_mean=1.0, mark_second_moment=1.0)
    if name == "log-normal":
        moments = {"mark_mean": float(np.exp(0.5)), "mark_second_moment": float(np.exp(2.0))}
        return slope(4.0, fading=log_normal(1.0), **moments)
    if name == "Pareto":  # P(mark > m) = m^-3
        return slope(4.0, fading=lambda e: e / 3 / log(2.0), mark_mean=1.5, mark_second_moment=3.0)
    if name == "dual slope":  # max(r^1.5, r^4)
        return replace(slope(4.0), gain=torch.tensor([[0.0, 0.75], [0.0, 2.0]]), far=dual_slope_far())
    if name == "height":
        return replace(slope(4.0), far=height_far(0.5), height=0.5)
    if name == "height, tabulated":
        return replace(geometry_network("height"), gain=LogTable.fit(lambda q: -2 * np.log2(q), 1e-9, 1e9))
    if name == "min distance":
        return replace(slope(4.0), min_distance=0.25)
    if name == "disc":
        return replace(slope(4.0), r_inf=1.0, far=disc_far(1.0))
    if name == "disc, no fading":
        return replace(geometry_network("disc"), fading=geometry_network("no fading").fading, mark_second_moment=1.0)
    if name == "log-Pareto":  # P(mark > m) = 1 / ln(e m): thousands of octaves, and no mean
        return slope(4.0, fading=log_pareto, mark_mean=inf, mark_second_moment=inf)
    return slope(float(name))


def dual_slope_far() -> LogTable:
    def far(s):
        inside = np.minimum(s, 1.0)
        beyond = np.maximum(s, 1.0)
        mean = pi * (4 * (1 - inside**0.25) + 1 / beyond)
        square = pi * (2 * (inside**-0.5 - 1) + beyond**-3 / 3)
        return np.stack([np.log2(mean), 0.5 * np.log2(square)])

    return LogTable.fit(far, 1e-9, 1e12)


def height_far(height: float) -> LogTable:
    def far(s):
        q = s + height**2
        return np.stack([np.log2(pi / q), 0.5 * np.log2(pi / 3 / q**3)])

    return LogTable.fit(far, 1e-9, 1e12)


def disc_far(radius: float) -> LogTable:
    def far(s):
        s, end = np.minimum(s, radius**2 * (1 - 1e-9)), radius**2
        return np.stack([np.log2(pi * (1 / s - 1 / end)), 0.5 * np.log2(pi / 3 * (s**-3 - end**-3))])

    return LogTable.fit(far, 1e-9, 1e12)


GEOMETRY_NETWORKS = (
    "4", "2.5", "no fading", "log-normal", "Pareto", "dual slope", "height", "height, tabulated", "min distance",
    "disc",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- calls


def sample(backend, op: str, table, grid: SinrGrid, **options) -> SinrSums | ConditionalSums:
    """The public function on a backend; its tensors come back to the CPU."""
    with backend.use(family):
        result = getattr(family, op)(table.to(backend.device), grid.to(backend.device), **options)
    return result._replace(**{name: getattr(result, name).cpu() for name in ("sums", "histogram", "samples")})


def op_arguments(op: str, table, grid: SinrGrid, **options) -> dict:
    """What the public function hands to the op, by the names of its schema."""
    real, given = getattr(family, f"_{op}"), []
    try:
        setattr(family, f"_{op}", lambda *arguments: given.extend(arguments) or (None,) * 3)
        getattr(family, op)(table, grid, **{"num_realisations": 40, **options})
    finally:
        setattr(family, f"_{op}", real)
    return dict(zip([argument.name for argument in real._schema.arguments], given, strict=True))


# --------------------------------------------------------------------------------------------------------- tolerances


@dataclass
class Allowance:
    """How far a sampler may be from the reference, realisation by realisation."""

    signal: Tensor  # octaves, [densities, realisations]
    interference: Tensor
    sinr: Tensor
    items: Tensor  # as Realisations.summands


def arrival_error(index: int) -> float:
    """Relative, of the index-th arrival: index additions, whose rounding errors average out (six standard deviations),
    and the few units of its deviate and of the scale."""
    return (min(index, 6.0 * index**0.5) + 6.0) * HALF_ULP


def rounding(octaves: Tensor, ulps: float = 2.0) -> Tensor:
    """Of some operations whose result, or larger intermediate, is a logarithm of this size."""
    return ulps * HALF_ULP * (octaves.nan_to_num(0.0, 0.0, 0.0).abs() + 2.0)


def steepest(table: PowerTable | GeometryTable) -> float:
    """Octaves of power per octave of arrival, at most."""
    if isinstance(table, GeometryTable):
        return 2.0 if isinstance(table.gain, LogTable) else table.gain[:, 1].max().item()
    g = torch.logspace(-12, log2(min(table.cut, 1e5)) / log2(10), 4001, dtype=torch.float64)[:-1]
    values = table.inverse.evaluate(g)
    return (values.diff() / g.float().double().log2().diff()).abs().max().item()


def steepest_mark(table: GeometryTable, log2_power: Tensor) -> Tensor:
    """Octaves of a mark per relative change of its deviate: at most 12 for marks of light or power-law tails; those of
    a slowly varying one are as steep as they are large."""
    y = torch.logspace(-9, log2(0.5) / log2(10.0), 2001, dtype=torch.float64)
    values = torch.stack([table.fading.evaluate(y, plane) for plane in (0, 1)])
    steep = (values.diff() / y.float().double().log().diff()).abs().max().item()
    return torch.full_like(log2_power, steep) if steep < 12.0 else 23.0 * log2_power.nan_to_num(0.0, 0.0, 0.0).abs()


def allowance(op: str, table, grid: SinrGrid, found: reference.Realisations, options: dict) -> Allowance:
    power_domain = op == "sample_power_domain"
    num = options.get("num_terms", 16) if power_domain else options.get("num_points", 256)
    steep = steepest(table)
    of_last = steep * arrival_error(num) / log(2.0)
    of_first = steep * arrival_error(2) / log(2.0)
    if not power_domain and options.get("association", "strongest") == "strongest":
        of_first = of_last
    mark = [0.0, 0.0]
    if not power_domain:
        mark = [8 * HALF_ULP * steepest_mark(table, power) for power in (found.log2_signal, found.log2_interference)]
    signal = of_first + mark[0] + rounding(found.log2_signal, 4.0)
    summing = (num + 8) * HALF_ULP / log(2.0)
    interference = of_last + mark[1] + summing + rounding(found.log2_interference, 12.0)
    # The normal deviate may nearly cancel the mean; both are then off by more than their sum. And near 0 the deviate is
    # off by units in the last place of 1, since its angle is a difference.
    place = options.get("seed", 0), options.get("first_realisation", 0), found.rate.shape[1]
    normal, _ = reference.residual_numbers(*place)
    share = found.residual_share
    interference = interference * (1.0 + 2.0 * share * normal.abs()) + 16 * HALF_ULP * share
    noise = options.get("noise", 0.0)
    rest = torch.logaddexp2(found.log2_interference, reference.log2_noise(noise))
    sinr = signal + interference + rounding(rest) + rounding(found.log2_sinr)
    if power_domain:
        node = interference + of_first + rounding(found.log2_signal.abs() + 32.0 * steep, 4.0)
        limit = grid.log2_thresholds.double()[:, None] + rest[:, None]
        off = interference[:, None] + rounding(limit) + rounding(rest)[:, None]
        near = [table.measure.evaluate(limit + sign * off.clamp(min=1e-3)) for sign in (-1, 1)]
        octaves = (near[0] - near[1]).abs() / 2 * (off / off.clamp(min=1e-3)) + rounding(near[0], 4.0)
        coverage = found.coverage * log(2.0) * (octaves + arrival_error(2) / log(2.0) + rounding(off + 16.0))
    else:
        node = sinr
        distance = (found.log2_sinr[:, None] - grid.log2_thresholds.double()[:, None]).abs()
        coverage = (distance <= sinr[:, None]).double()
    rate = found.rate * (log(2.0) * node + 24 * HALF_ULP)
    inverse = found.inverse_sinr * (log(2.0) * sinr + 4 * HALF_ULP)
    share = share * (log(2.0) * (2.0 * interference) + 8 * HALF_ULP)
    items = torch.cat([torch.stack([rate, inverse, share], dim=1), coverage], dim=1).nan_to_num(0.0, 0.0, 0.0)
    return Allowance(signal, interference, sinr, items + 1e-300)


def conditional_allowance(table: GeometryTable, coverage: Tensor, options: dict) -> Tensor:
    """The conditional coverage is exp(-a) of a sum of terms that are each off by a relative error; the derivative of
    ln(1 + x) by ln x is below ln(1 + x), so a is off by no more than that error times a."""
    num = options.get("num_points", 64)
    relative = 2 * (steepest(table) * arrival_error(num) + 64 * HALF_ULP)
    exponent = -coverage.clamp(min=1e-300).log()
    if options.get("association", "nearest") == "strongest":
        exponent = exponent + log(num)  # the entropy of the shares of the servers
    return coverage * (relative * exponent + (num + 16) * HALF_ULP) + 1e-36


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor, what: str) -> None:
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    good = (actual == exact) | ((actual - exact).abs() <= allowed)
    if good.all():
        return
    share = ((actual - exact).abs() / allowed).nan_to_num(inf, inf).masked_fill(good, 0.0)
    where = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
    raise AssertionError(
        f"{what}: at {where} got {actual[where].item()!r}, expected {exact[where].item()!r} within"
        f" {allowed[where].item():.3e}; {(~good).sum().item()} of {good.numel()} are off"
    )


def assert_sums_within(sums: Tensor, values: Tensor, allowed: Tensor) -> None:
    """Batch by batch, of values and of their squares."""
    exact = reference.sums(values)
    bounds = torch.stack([allowed, allowed * (2.0 * values.abs() + allowed)], dim=-1)
    summed = torch.stack([reference.sums(bounds[..., k].nan_to_num(0.0, 0.0, 0.0))[..., 0] for k in (0, 1)], dim=-1)
    assert_within(sums, exact, summed + exact.nan_to_num(0.0, 0.0).abs() * 2.0**-40, "sums")


def assert_histogram_between(counts: Tensor, low: Tensor, high: Tensor, bins: tuple[int, float, float]) -> None:
    """Values lie between low and high: up to each bin there are no more than low and no fewer than high say."""
    most, least = (reference.histogram(value, *bins).cumsum(-1) for value in (low, high))
    up_to = counts.cumsum(-1)
    assert torch.equal(up_to[..., -1], least[..., -1]), "every realisation is counted once"
    assert ((up_to >= least) & (up_to <= most)).all(), "histogram"


def check(backend, op: str, table, grid: SinrGrid, **options):
    """Runs an op and compares all that it returns with the reference."""
    result = sample(backend, op, table, grid, keep_samples=True, **options)
    found = getattr(reference, op)(table, grid, **options)
    if op == "rayleigh_conditional":
        allowed = conditional_allowance(table, found, options)
        assert_within(result.samples, found, allowed, "samples")
        assert_sums_within(result.sums, found, allowed)
        assert_histogram_between(result.histogram, found - allowed, found + allowed, (META_BINS, 0.0, META_BINS))
        return result
    allowed = allowance(op, table, grid, found, options)
    assert_within(result.samples[..., 0], found.log2_signal, allowed.signal, "log2 of the signal")
    assert_within(result.samples[..., 1], found.log2_interference, allowed.interference, "log2 of the interference")
    assert_sums_within(result.sums, found.summands(), allowed.items)
    sinr, bins = found.log2_sinr, (HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_PER_OCTAVE)
    assert_histogram_between(result.histogram, sinr - allowed.sinr, sinr + allowed.sinr, bins)
    return result


def moved_by_one(tensor: Tensor) -> Tensor:
    """The same values, contiguous, in memory that begins 4 bytes after an aligned address."""
    return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)


def assert_same_bits(one, other) -> None:
    for name in ("sums", "histogram", "samples"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.shape == b.shape and a.dtype == b.dtype, name
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        assert same.all(), f"{name} differ at {(~same).nonzero()[0].tolist()}"
