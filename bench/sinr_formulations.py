"""What the benchmarks of family sinr_field share: the networks with their exact answers, how a statistic is judged, and
the same samplers as they are written in numpy and in torch.

Each algorithm is written once, for `xp` numpy or torch, on arrays [densities, powers or stations, realisations]; a
formulation differs in who draws, in the type and in how a table is looked up. Draws are Gamma_i of a unit Poisson
process, marks and one or two numbers for each realisation, as in tokenweave_ops/sinr_field.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import inf, log2, pi

import numpy as np
import torch

from bench.norm_formulations import compiled_afresh
from tokenweave_ops import GeometryTable, PowerTable

EXPONENT = 4.0  # of the single slope
SLOPES, BREAKPOINT_M = (1.5, 4.0), 10.0  # of the two slopes
KNOTS = 4096
SAFE_ERRORS = 5.0  # standard errors that an estimate may be off


@dataclass(frozen=True)
class Problem:
    """What every contestant of a case computes. Densities are per square unit of length, thresholds linear."""

    densities: tuple[float, ...]
    thresholds: tuple[float, ...]
    num_realisations: int
    count: int  # powers or stations taken one by one
    exact: np.ndarray  # [densities, items]: the rate in nats where there is one, then the coverages
    has_rate: bool = True
    nearest: bool = False
    rate_nodes: int = 0
    is_single_slope: bool = True  # so that its measure has a closed form

    @cached_property
    def items(self) -> int:
        return self.has_rate + len(self.thresholds)


# --------------------------------------------------------------------------------------------------- networks, answers


def single_slope_power_table(device: str) -> PowerTable:
    return PowerTable.single_slope(EXPONENT, densities=(1.0, 1.0), device=device)


def single_slope_geometry_table(device: str) -> GeometryTable:
    return GeometryTable.single_slope(EXPONENT, device=device)


def single_slope_exact(thresholds, nearest: bool, has_rate: bool, densities: int) -> np.ndarray:
    """[densities, items]; without noise no density changes anything. Needs scipy."""
    from tokenweave_models.densification.exact import nearest as of_nearest
    from tokenweave_models.densification.exact import saturation

    if nearest:
        rate, coverage = of_nearest.rate_single_slope(EXPONENT), of_nearest.coverage_single_slope(thresholds, EXPONENT)
    else:
        rate, coverage = saturation.rate(2 / EXPONENT), saturation.coverage(2 / EXPONENT, thresholds)
    return np.tile(np.concatenate([[rate] * has_rate, coverage]), (densities, 1))


def two_slopes(densities_per_km2, thresholds, table_per_km2, device: str) -> tuple[np.ndarray, PowerTable, np.ndarray]:
    """Densities per square unit, a table that reaches over `table_per_km2`, and exact answers [densities, items] of two
    slopes under Rayleigh fading, for thresholds of at least 1. Needs scipy."""
    from tokenweave_models.densification.exact import strongest
    from tokenweave_models.densification.fading import Rayleigh
    from tokenweave_models.densification.network import Network
    from tokenweave_models.densification.path_loss import MultiSlope

    network = Network(MultiSlope(SLOPES, (BREAKPOINT_M,)), Rayleigh())
    densities = network.scaled_density(densities_per_km2)
    coverage = strongest.coverage_rayleigh(network.path_loss, densities, thresholds)
    rate = [strongest.rate(network.power_measure, density) for density in densities]
    return densities, network.power_table(table_per_km2, device), np.column_stack([rate, coverage])


# ----------------------------------------------------------------------------------------------------------- judgement


def judge(problem: Problem, bias: float, sums) -> torch.Tensor:
    """How far off each mean is, as a share of what is allowed: 5 of its standard errors and the stated bias. The error
    itself may not be above that of counting, so that noise does not pass for agreement; a rate's deviation is taken to
    be within twice its mean. Sums: [densities, items, 2] of value and of value squared."""
    sums, n = torch.as_tensor(sums).double().cpu(), problem.num_realisations
    exact = torch.from_numpy(problem.exact)
    mean = sums[..., 0] / n
    error = ((sums[..., 1] / n - mean * mean).clamp(min=0) / (n - 1)).sqrt()
    variance = exact * (1 - exact)
    if problem.has_rate:
        variance[:, 0] = (2 * exact[:, 0]) ** 2
    most_error = 2 * (variance / n).sqrt() + 2 / n  # counts of a few are far from their mean now and then
    off = (mean - exact).abs() / (SAFE_ERRORS * error + bias)
    return off.masked_fill(error > most_error, inf)


# -------------------------------------------------------------------------------------------------------------- tables


class Line:
    """a + b z: what all curves of a single slope are, in log-log coordinates. For numpy and torch."""

    def __init__(self, a: float, b: float):
        self.a, self.b = a, b

    def __call__(self, z):
        return self.a + self.b * z


class Interpolated:
    """np.interp between knots."""

    def __init__(self, knots: np.ndarray, values: np.ndarray):
        self.knots, self.values = knots, values

    def __call__(self, z):
        return np.interp(z, self.knots, self.values)


class Indexed:
    """The same where the knots are evenly spaced: the interval is computed, not searched for. For numpy and torch."""

    def __init__(self, knots: np.ndarray, values: np.ndarray, convert: Callable, as_index: Callable):
        self.first, self.per_unit = float(knots[0]), float((len(knots) - 1) / (knots[-1] - knots[0]))
        self.last = len(knots) - 2
        self.values, self.steps = convert(values[:-1]), convert(np.diff(values))
        self.as_index = as_index

    def __call__(self, z):
        place = (z - self.first) * self.per_unit
        index = self.as_index(place.clip(0, self.last))
        return self.values[index] + (place - index) * self.steps[index]


@dataclass(frozen=True)
class Curves:
    """Of log2 of g = Gamma / density: log2 of the power and of mean and deviation of what lies beyond; of log2 of the
    power: log2 of the measure."""

    power: Callable
    rest_mean: Callable
    rest_deviation: Callable
    measure: Callable


def closed_form() -> Curves:
    """Of the single slope: L1(x) = pi x^-delta."""
    delta, base = 2 / EXPONENT, log2(pi)
    mean, variance = 1 - 1 / delta, 1 - 2 / delta
    return Curves(
        Line(base / delta, -1 / delta),
        Line(base * (1 - mean) - log2(-mean), mean),
        Line(0.5 * (base * (1 - variance) - log2(-variance)), 0.5 * variance),
        Line(base, -delta),
    )


def tabulated(table: PowerTable, make: Callable[[np.ndarray, np.ndarray], Callable]) -> Curves:
    """4,096 knots, evenly spaced in log2, from the table that ours reads."""
    table = table.to("cpu")
    inverse = table.inverse
    ends = np.array([inverse.first_key, inverse.first_key + inverse.coefficients.shape[1]], dtype=np.int32)
    low, high = np.log2((ends << (23 - inverse.log2_steps)).view(np.float32).astype(np.float64))
    knots = np.linspace(low, high, KNOTS)
    planes = [inverse.evaluate(torch.from_numpy(np.exp2(knots)), plane).numpy() for plane in range(3)]
    powers = np.linspace(planes[0][-1], planes[0][0], KNOTS)
    measure = table.measure.evaluate(torch.from_numpy(powers)).numpy()
    return Curves(*(make(knots, values) for values in planes), make(powers, measure))


# ---------------------------------------------------------------------------------------------------------- algorithms


def _sums(xp, items):
    """[densities, items, realisations] -> [densities, items, 2]"""
    return xp.stack([items.sum(-1), (items * items).sum(-1)], -1)


def power_domain(xp, problem: Problem, curves: Curves, constants, draws):
    """Powers by the inverse measure, the rest as a normal deviate, coverage given all but the strongest."""
    log2_densities, log2_thresholds, nodes = constants  # [densities, 1, 1], [thresholds, 1], [nodes, 1]
    arrivals, deviates, offsets = draws
    g = xp.log2(arrivals) - log2_densities
    powers, last, log2_density = xp.exp2(curves.power(g)), g[:, -1], log2_densities[:, 0]
    mean = xp.exp2(curves.rest_mean(last) + log2_density)
    deviation = xp.exp2(curves.rest_deviation(last) + 0.5 * log2_density)
    interference = powers[:, 1:].sum(1) + (mean + deviation * deviates).clip(0)
    second = g[:, 1:2]
    if problem.rate_nodes:
        v = (nodes + offsets) / problem.rate_nodes
        signal = xp.exp2(curves.power(4 * xp.log2(v) + second))
        rate = (4 / problem.rate_nodes * v**3 * xp.log1p(signal / interference[:, None])).sum(1)
    else:
        rate = xp.log1p(powers[:, 0] / interference)
    log2_coverage = curves.measure(xp.log2(interference)[:, None] + log2_thresholds) - second
    coverage = xp.exp2(log2_coverage.clip(max=0))
    return _sums(xp, xp.concatenate([rate[:, None], coverage], 1))


def geometry(xp, problem: Problem, constants, draws, subtract: bool):
    """Stations by distance. `subtract`: interference as a difference, which float64 allows and float32 does not."""
    densities, thresholds = constants  # [densities, 1, 1], [thresholds, 1]
    arrivals, deviates, marks = draws
    half = EXPONENT / 2
    s = arrivals / (pi * densities)
    powers = marks * s**-half
    if problem.nearest:
        signal, interference = powers[:, 0], powers[:, 1:].sum(1)
    else:
        signal = xp.amax(powers, 1)
        others = powers if subtract else xp.where(powers == signal[:, None], 0.0, powers)
        interference = others.sum(1) - signal if subtract else others.sum(1)
    last, density = s[:, -1], densities[:, 0]
    mean = density * (pi / (half - 1)) * last ** (1 - half)
    variance = density * (2 * pi / (EXPONENT - 1)) * last ** (1 - EXPONENT)
    sir = signal / (interference + (mean + xp.sqrt(variance) * deviates).clip(0))
    coverage = xp.where(sir[:, None] > thresholds, 1.0, 0.0)
    return _sums(xp, xp.concatenate([xp.log1p(sir)[:, None], coverage], 1))


def conditional(xp, problem: Problem, constants, draws):
    """Coverage given the distances, for one density."""
    _, thresholds = constants  # [thresholds, 1]
    arrivals, *_ = draws
    (density,) = problem.densities
    half = EXPONENT / 2
    s = arrivals / (pi * density)
    gains, last = s**-half, s[-1]
    m1 = density * (pi / (half - 1)) * last ** (1 - half)
    m2 = density * (pi / (EXPONENT - 1)) * last ** (1 - EXPONENT)
    # [servers, thresholds, stations, realisations]; the server itself, among them, gives a factor of 1 + threshold
    servers = gains[:1] if problem.nearest else gains
    scales = thresholds / servers[:, None]
    products = (1 + scales[:, :, None] * gains).prod(2) / (1 + thresholds)
    coverage = xp.exp(-scales * m1 / (1 + scales * m2 / m1)) / products
    return _sums(xp, coverage.sum(0).clip(max=1)[None])


# --------------------------------------------------------------------------------------------------------- who draws


def numpy_draws(rng: np.random.Generator, dtype, problem: Problem, block: int, has_marks: bool) -> tuple:
    arrivals = rng.standard_exponential((problem.count, block), dtype=dtype)
    for row in range(1, problem.count):  # four times faster than cumsum along this axis
        arrivals[row] += arrivals[row - 1]
    extra = rng.standard_exponential((problem.count, block), dtype=dtype) if has_marks else rng.random(block, dtype)
    return arrivals, rng.standard_normal(block, dtype=dtype), extra


def _eager_exponential(shape, device):
    if device == "cuda":
        return torch.empty(shape, device=device).exponential_()
    return torch.rand(shape).clamp_(min=1e-10).log_().neg_()  # three times faster there than exponential_


def _compiled_exponential(shape, device):
    return -torch.log(torch.rand(shape, device=device).clamp(min=1e-10))  # fuses, as exponential_ does not


def torch_draws(exponential, device, problem: Problem, block: int, has_marks: bool) -> tuple:
    shape = (problem.count, block)
    extra = exponential(shape, device) if has_marks else torch.rand(block, device=device)
    return exponential(shape, device).cumsum(0), torch.randn(block, device=device), extra


def _block(problem: Problem, elements: int, per_realisation: int) -> int:
    """Realisations at once: the largest power of two that keeps an intermediate below so many elements."""
    return min(problem.num_realisations, 1 << max(4, (elements // per_realisation).bit_length() - 1))


# Of an intermediate; on a CPU of the sizes tried the fastest.
NUMPY_ELEMENTS = 1 << 17
TORCH_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 27}


def _elements(problem: Problem, algorithm) -> int:
    """Of the largest intermediate, for each realisation."""
    if algorithm is conditional:
        return problem.count * len(problem.thresholds) * (1 if problem.nearest else problem.count)
    return len(problem.densities) * max(problem.count, len(problem.thresholds), problem.rate_nodes)


@cache
def keep_freed_memory() -> None:
    """Peers allocate every intermediate. Where freed memory goes back to the system (glibc, above 128 KB), paging it in
    again is most of their time; it is kept instead. For this whole process."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest there may be


def numpy_call(algorithm, problem: Problem, dtype=np.float64, **options) -> Callable[[], np.ndarray]:
    """Blocks that stay in the cache, one density after the other, the same draws for all."""
    keep_freed_memory()
    rng = np.random.default_rng(20)
    thresholds = np.array(problem.thresholds, dtype=dtype)[:, None]
    densities = np.array(problem.densities, dtype=dtype)
    nodes = np.arange(problem.rate_nodes, dtype=dtype)[:, None]
    in_log2 = algorithm is power_domain
    one_density = [(np.log2(d) if in_log2 else d).reshape(1, 1, 1) for d in densities]
    rest = (np.log2(thresholds), nodes) if in_log2 else (thresholds,)
    block = _block(problem, NUMPY_ELEMENTS, _elements(problem, algorithm) // len(densities))
    draw = partial(numpy_draws, rng, dtype, problem, block, algorithm is geometry)

    def call():
        totals = np.zeros((len(densities), problem.items, 2))
        for _ in range(problem.num_realisations // block):
            draws = draw()
            for of_density, density in zip(totals, one_density, strict=True):
                of_density += algorithm(np, problem, constants=(density, *rest), draws=draws, **options)[0]
        return totals

    return call


def torch_call(algorithm, problem: Problem, device: str, compiled: bool, **options) -> Callable[[], torch.Tensor]:
    """All densities at once, in blocks that fit memory; compiled: draws, algorithm and sums in one graph."""
    keep_freed_memory()
    thresholds = torch.tensor(problem.thresholds, device=device)[:, None]
    densities = torch.tensor(problem.densities, dtype=torch.float32, device=device)[:, None, None]
    nodes = torch.arange(problem.rate_nodes, dtype=torch.float32, device=device)[:, None]
    in_log2 = algorithm is power_domain
    constants = (densities.log2(), thresholds.log2(), nodes) if in_log2 else (densities, thresholds)
    block = _block(problem, TORCH_ELEMENTS[device], _elements(problem, algorithm))
    exponential = _compiled_exponential if compiled else _eager_exponential

    def step():
        draws = torch_draws(exponential, device, problem, block, algorithm is geometry)
        return algorithm(torch, problem, constants=constants, draws=draws, **options)

    step = compiled_afresh(step) if compiled else step

    def call():
        totals = step().double()
        for _ in range(problem.num_realisations // block - 1):
            totals += step()
        return totals

    return call


# --------------------------------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Peer:
    name: str
    formulation: str
    make: Callable[[], Callable]


def power_curves(problem: Problem, table: PowerTable, device: str) -> dict[str, Curves]:
    """How each peer looks powers up. All but `numpy` take what is fastest: a closed form where there is one."""
    if problem.is_single_slope:
        return {"numpy": tabulated(table, Interpolated), "numpy_tuned": closed_form(), "torch": closed_form()}
    in_numpy = partial(Indexed, convert=np.float32, as_index=lambda place: place.astype(np.int32))
    to_tensor = partial(torch.tensor, dtype=torch.float32, device=device)
    in_torch = partial(Indexed, convert=to_tensor, as_index=lambda place: place.to(torch.int64))
    return {
        "numpy": tabulated(table, Interpolated),
        "numpy_tuned": tabulated(table, in_numpy),
        "torch": tabulated(table, in_torch),
    }


ALGORITHMS = {"sample_power_domain": power_domain, "sample_geometry": geometry, "rayleigh_conditional": conditional}


def peers(op: str, problem: Problem, device: str, curves: dict[str, Curves]) -> list[Peer]:
    """The same algorithm by numpy in float64, where it pays off also tuned, by eager torch and by torch.compile."""
    algorithm = ALGORITHMS[op]

    def options(name: str) -> dict:
        if algorithm is power_domain:
            return {"curves": curves[name]}
        return {"subtract": name == "numpy"} if algorithm is geometry else {}

    lookup = "closed form" if problem.is_single_slope else "tables, interval computed"
    by_table = algorithm is power_domain
    found = []
    if device == "cpu":
        text = "np.interp in 4,096 knots" if by_table else "one expression each for gain, sum and far field"
        make = partial(numpy_call, algorithm, problem, **options("numpy"))
        found.append(Peer("numpy", f"vectorised, float64, blocks that stay in L2; {text}", make))
        if by_table:
            make = partial(numpy_call, algorithm, problem, dtype=np.float32, **options("numpy_tuned"))
            found.append(Peer("numpy_tuned", f"the same in float32; {lookup}", make))
    text = f"; {lookup}" if by_table else ""
    for name, words in (("eager", "torch, fp32, in blocks that fit memory"), ("compile", "torch.compile of a block")):
        make = partial(torch_call, algorithm, problem, device, name == "compile", **options("torch"))
        found.append(Peer(name, words + text, make))
    return found
