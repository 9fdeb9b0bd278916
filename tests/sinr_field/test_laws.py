"""Exact laws of Poisson fields that the samplers obey, within 4 standard errors of their own; and orderings that hold
realisation by realisation."""

from __future__ import annotations

import itertools
import math
from math import inf

import numpy as np
import pytest
import torch
from sinr_oracle import OPS, flat_near_field, geometry_network, log_normal, power_network, reference, sample

from tokenweave_ops import GeometryTable, PowerTable, SinrGrid
from tokenweave_ops.sinr_field import META_BINS

# Sums at thresholds below 1 have no closed form; these are by numerical inversion of the Laplace transform
# 1 / (1 + delta * integral over (0, 1) of (1 - e^(-s u)) u^(-delta - 1) du) of 1 / SIR.
RATES = {0.3: 3.09307, 0.5: 1.60062, 2 / 3: 0.96013, 0.95: 0.18580}
LOW_COVERAGE = {0.5: {0.1: 0.99983, 0.2: 0.98810, 0.5: 0.84570}, 2 / 3: {0.1: 0.99145, 0.2: 0.91045, 0.5: 0.63349}}


def realisations(backend, of_cpu: int = 1 << 17) -> int:
    return of_cpu if backend.name != "simt" else of_cpu >> 5


def assert_estimates(estimate, exact, bias: float = 0.0) -> None:
    """Within 4 standard errors, and what is known of the bias."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    z = (estimate.mean - exact).abs() / (4 * estimate.standard_error + bias + 1e-6)
    assert (z <= 1).all(), (
        f"got {estimate.mean.tolist()}, exact {exact.tolist()}, se {estimate.standard_error.tolist()}"
    )


def run(backend, op: str, table, grid, **options):
    return sample(backend, op, table, grid, num_realisations=realisations(backend), **options)


# ----------------------------------------------------------------------------------------- strongest cell, power domain


@pytest.mark.parametrize("delta", [0.1, 0.3, 0.5, 2 / 3, 0.8, 0.95])
def test_coverage_of_the_strongest_cell(backend, delta):
    """y >= 1: sin(pi delta) / (pi delta) y^-delta, whatever the fading and the density."""
    thresholds = [1.0, 2.0, 10.0, 1000.0]
    grid = SinrGrid.make([0.01, 1.0], [*LOW_COVERAGE.get(delta, {}), *thresholds])
    result = run(backend, "sample_power_domain", PowerTable.single_slope(2 / delta), grid, num_terms=32)
    exact = [math.sin(math.pi * delta) / (math.pi * delta) * y**-delta for y in thresholds]
    assert_estimates(result.coverage, [*LOW_COVERAGE.get(delta, {}).values(), *exact], bias=1e-5)


@pytest.mark.parametrize("delta", [0.1, 0.5, 2 / 3, 0.8])
def test_mean_of_interference_over_signal(backend, delta):
    grid = SinrGrid.make([1.0])
    result = run(backend, "sample_power_domain", PowerTable.single_slope(2 / delta), grid, num_terms=32)
    assert_estimates(result.inverse_sinr, delta / (1 - delta))


@pytest.mark.parametrize("rate_nodes", [0, 4])
@pytest.mark.parametrize("delta", list(RATES))
def test_rate_of_the_strongest_cell(backend, delta, rate_nodes):
    options = {"num_terms": 32, "rate_nodes": rate_nodes}
    result = run(backend, "sample_power_domain", PowerTable.single_slope(2 / delta), SinrGrid.make([1.0]), **options)
    assert_estimates(result.rate, RATES[delta], bias=1e-5)


def test_rate_nodes_lower_the_variance(backend):
    grid, table = SinrGrid.make([1.0]), power_network("4")
    errors = [
        run(backend, "sample_power_domain", table, grid, rate_nodes=nodes).rate.standard_error.item()
        for nodes in (0, 1, 4, 16)
    ]
    assert errors[2] < 0.5 * errors[0] and errors[2] < errors[1] and errors[3] < errors[1]


def test_tiny_coverage_is_resolved(backend):
    """A disc of flat near field, Rayleigh fading: 1e4 stations in it; the indicator would be 0 in any run."""
    result = run(backend, "sample_power_domain", power_network("flat"), SinrGrid.make([1.0, 100.0], [1.0, 1e4]))
    assert result.coverage.mean[0, 0] == pytest.approx(0.0653, abs=1.5e-3)
    assert 0 < result.coverage.mean[1, 0] < 1e-200
    single = run(backend, "sample_power_domain", power_network("4"), SinrGrid.make([1.0], [1e18]))
    assert_estimates(single.coverage, 2 / math.pi * 1e-9)
    assert single.coverage.standard_error.item() < 0.02 * single.coverage.mean.item()


@pytest.mark.parametrize("noise", [1.0, 30.0])
def test_coverage_with_noise(backend, noise):
    """y = 1, path loss r^4, density 1: E[pi (S + W)^(-1/2)], S of Levy's law, by quadrature."""
    s = np.linspace(0, 60, 200_001)[1:] ** 2  # s = t^2
    t = np.sqrt(s)
    value = np.exp(-s * noise - math.pi * math.sqrt(math.pi) * t) * 2  # s^(delta - 1) ds = 2 dt
    exact = math.pi / math.sqrt(math.pi) * (np.trapezoid(value, t) + 2 * t[0])
    grid = SinrGrid.make([1.0], [1.0])
    assert_estimates(run(backend, "sample_power_domain", power_network("4"), grid, noise=noise).coverage, exact)


@pytest.mark.parametrize("name", ["4", "flat", "disc"])
def test_law_of_the_strongest_power(backend, name):
    """P(strongest <= x) = exp(-density * L1(x)): Kolmogorov and Smirnov's distance, at the 99.99 % quantile."""
    num, density = realisations(backend, 1 << 15), 0.7
    grid = SinrGrid.make([density])
    options = {"num_realisations": num, "num_terms": 4, "keep_samples": True}
    signal = sample(backend, "sample_power_domain", power_network(name), grid, **options).samples[0, :, 0]
    x = signal.double().sort().values
    measure = flat_near_field(x.numpy()) if name == "flat" else power_network(name).measure.evaluate(x).numpy()
    measure = np.where(x.numpy() == -np.inf, np.log2(power_network(name).cut), measure)
    law = np.exp(-density * np.exp2(measure))
    # Steps up to the next larger power: the law has a jump at no power at all.
    distance = np.abs(law - torch.searchsorted(x, x, right=True).numpy() / num).max()
    assert distance * math.sqrt(num) < 2.23


# -------------------------------------------------------------------------------------------------------- the residual


@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize(
    ("exponent", "num_terms", "bias"),
    [("4", 4, 0.13), ("4", 16, 0.027), ("4", 64, 6.3e-3), ("3", 4, 0.25), ("3", 16, 0.084), ("2.5", 4, 0.35),
     ("2.5", 16, 0.15)],
)  # fmt: skip
def test_what_the_residual_corrects(backend, exponent, num_terms, bias):
    """Leaving out what lies beyond the terms is optimistic by ``bias`` at y = 1; its mean alone is pessimistic by a few
    thousandths; with the normal deviate nothing is left to see."""
    delta = 2 / float(exponent)
    exact = math.sin(math.pi * delta) / (math.pi * delta)
    off, error = {}, {}
    for residual in ("none", "mean", "gauss"):
        options = {"num_terms": num_terms, "residual": residual, "seed": 1}
        coverage = run(backend, "sample_power_domain", power_network(exponent), SinrGrid.make([1.0], [1.0]), **options)
        off[residual] = coverage.coverage.mean.item() - exact
        error[residual] = coverage.coverage.standard_error.item()
    assert off["none"] == pytest.approx(bias, rel=0.05, abs=4 * error["none"])
    assert abs(off["gauss"]) < 4 * error["gauss"] + (3e-4 if num_terms == 4 else 1e-4)
    assert -3e-3 < off["mean"] < 4 * error["mean"]
    assert off["mean"] <= off["gauss"], "the same realisations"


def test_the_share_of_the_residual_falls_with_the_points(backend):
    shares = [
        sample(
            backend, "sample_geometry", geometry_network("4"), SinrGrid.make([1.0]), num_realisations=500, num_points=n
        ).sums[0, 0, 2, 0].item()
        for n in (4, 16, 64)
    ]  # fmt: skip
    assert shares[0] > 4 * shares[1] > 16 * shares[2] > 0


# ------------------------------------------------------------------------------------------- geometry and power domain


@pytest.mark.parametrize("name", ["no fading", "4", "log-normal", "Pareto"])
def test_geometry_agrees_with_the_power_domain(backend, name):
    """Single slope, strongest cell: the law of SIR is that of the power domain for every fading."""
    thresholds = [0.1, 0.5, 1.0, 10.0]
    grid, num = SinrGrid.make([0.8], thresholds), realisations(backend, 1 << 15)
    options = {"num_realisations": num, "num_points": 64, "seed": 1}
    geometry = sample(backend, "sample_geometry", geometry_network(name), grid, **options)
    power = run(backend, "sample_power_domain", power_network("4"), grid, seed=2)
    error = (geometry.coverage.standard_error**2 + power.coverage.standard_error**2).sqrt()
    # 64 points by distance leave a bias in the far field's shape, less than the share of its fluctuation.
    bias = 0.1 * (geometry.sums[:, 0, 2, 0].sum() / num).item() ** 2
    assert ((geometry.coverage.mean - power.coverage.mean).abs() < 4 * error + bias + 1e-6).all()
    error = (geometry.rate.standard_error**2 + power.rate.standard_error**2).sqrt()
    assert ((geometry.rate.mean - power.rate.mean).abs() < 4 * error + bias).all()


@pytest.mark.parametrize("residual", ["mean", "gauss"])
@pytest.mark.parametrize("exponent", ["4", "20"])
def test_a_residual_far_below_the_signal_is_not_lost(backend, exponent, residual):
    """Hardly anyone else transmits: what is left beyond 256 stations may be 2^-200 of the signal, but not nothing."""
    table = GeometryTable.single_slope(float(exponent))
    options = {"num_realisations": 256, "num_points": 256, "activity": 1e-9, "residual": residual, "seed": 1}
    found = sample(backend, "sample_geometry", table, SinrGrid.make([0.3, 10.0]), keep_samples=True, **options)
    expected = reference.sample_geometry(table, SinrGrid.make([0.3, 10.0]), **options)
    is_some = expected.log2_interference > -inf
    assert is_some.float().mean() > (0.99 if residual == "mean" else 0.4)
    error = (found.samples[..., 1].double().cpu() - expected.log2_interference)[is_some]
    assert error.abs().max() < 1e-2  # the normal deviate may nearly cancel the mean
    assert (found.samples[..., 1].cpu()[~is_some] == -inf).all()


def test_a_residual_far_above_the_stations_is_not_cut(backend):
    """Log-normal marks of sigma 12: the mean beyond 32 stations is 2^100 times any of them."""
    table = GeometryTable.single_slope(
        4.0, fading=log_normal(12.0), mark_mean=math.exp(72), mark_second_moment=math.exp(288)
    )
    options = {"num_realisations": 256, "num_points": 32, "residual": "mean", "seed": 1}
    found = sample(backend, "sample_geometry", table, SinrGrid.make([1.0]), keep_samples=True, **options)
    expected = reference.sample_geometry(table, SinrGrid.make([1.0]), **options)
    assert expected.log2_interference.max() > 90
    assert (found.samples[..., 1].double().cpu() - expected.log2_interference).abs().max() < 1e-3


@pytest.mark.parametrize("density", [1e-14, 1e12])
def test_geometry_knows_no_scale(backend, density):
    """Without noise no density changes the SIR of a single slope, far beyond the densities that there are."""
    for op, options in (("sample_geometry", {}), ("rayleigh_conditional", {})):
        table = GeometryTable.single_slope(2.5)
        one, other = (
            sample(backend, op, table, SinrGrid.make([d], [1.0]), num_realisations=256, num_points=64, **options)
            for d in (1.0, density)
        )
        assert (one.coverage.mean - other.coverage.mean).abs().max() < 1 / 256


def test_geometry_in_a_disc_agrees_with_the_power_domain(backend):
    """No fading, stations within a radius of 1, of which there may be none."""
    grid, num = SinrGrid.make([0.3, 1.0, 3.0], [0.1, 1.0, 10.0]), realisations(backend, 1 << 15)
    table = geometry_network("disc, no fading")
    options = {"num_realisations": num, "num_points": 32, "noise": 0.2}
    geometry = sample(backend, "sample_geometry", table, grid, seed=1, **options)
    options = {"num_terms": 32, "noise": 0.2}
    power = run(backend, "sample_power_domain", power_network("disc"), grid, seed=2, **options)
    for one, other in ((geometry.coverage, power.coverage), (geometry.rate, power.rate)):
        error = (one.standard_error**2 + other.standard_error**2).sqrt()
        assert ((one.mean - other.mean).abs() < 4 * error + 1e-6).all()
    empty = power.histogram[:, 0] / power.num_realisations
    exact = (-math.pi * torch.tensor([0.3, 1.0, 3.0])).exp()
    assert ((empty - exact).abs() < 4 * (exact / power.num_realisations).sqrt()).all()


def nearest_coverage(exponent: float, threshold: float) -> float:
    """Nearest cell, Rayleigh fading, no noise: 1 / (1 + rho), rho by quadrature (Andrews, Baccelli, Ganti,
    arXiv 1009.0516, theorem 2)."""
    start, half = threshold ** (-2 / exponent), exponent / 2
    # u = start / v: the integral of du / (1 + u^half) from start on
    v = (np.arange(200_000) + 0.5) / 200_000
    rho = threshold ** (2 / exponent) * np.mean(start / v**2 / (1 + (start / v) ** half))
    return 1 / (1 + rho)


def test_the_quadrature_of_nearest_coverage():
    closed = 1 / (1 + math.sqrt(3) * (math.pi / 2 - math.atan(1 / math.sqrt(3))))
    assert nearest_coverage(4.0, 3.0) == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("exponent", ["4", "3"])
@pytest.mark.parametrize("op", OPS[1:])
def test_coverage_of_the_nearest_cell(backend, op, exponent):
    thresholds = [0.1, 0.5, 1.0, 10.0, 100.0]
    grid, num = SinrGrid.make([0.2, 5.0], thresholds), realisations(backend, 1 << 15)
    options = {"num_realisations": num, "num_points": 64, "association": "nearest"}
    result = sample(backend, op, geometry_network(exponent), grid, **options)
    assert_estimates(result.coverage, [nearest_coverage(float(exponent), y) for y in thresholds], bias=2e-5)


def test_rate_of_the_nearest_cell(backend):
    options = {"num_realisations": realisations(backend, 1 << 15), "num_points": 64, "association": "nearest"}
    result = sample(backend, "sample_geometry", geometry_network("4"), SinrGrid.make([1.0]), **options)
    assert_estimates(result.rate, 1.48899)


def test_coverage_of_the_nearest_cell_from_above(backend):
    """Height h: exp(-pi density h^2 rho) / (1 + rho)."""
    densities, thresholds, height = [0.5, 5.0], [0.5, 1.0, 4.0], 0.5
    grid = SinrGrid.make(densities, thresholds)
    rho = 1 / torch.tensor([nearest_coverage(4.0, y) for y in thresholds], dtype=torch.float64) - 1
    scale = math.pi * height**2 * torch.tensor(densities, dtype=torch.float64)[:, None]
    for op in OPS[1:]:
        options = {"num_realisations": realisations(backend, 1 << 15), "num_points": 64, "association": "nearest"}
        result = sample(backend, op, geometry_network("height"), grid, **options)
        assert_estimates(result.coverage, (-scale * rho).exp() / (1 + rho), bias=2e-5)


@pytest.mark.parametrize("name", ["4", "2.5"])
def test_rayleigh_conditional_for_the_strongest_cell(backend, name):
    """Sums of servers over geometries: sin(pi delta) / (pi delta) y^-delta from y = 1 on."""
    delta, thresholds = 2 / float(name), [1.0, 3.0, 100.0]
    options = {"association": "strongest", "num_points": 32 if backend.name != "simt" else 16}
    grid, num = SinrGrid.make([1.0], thresholds), realisations(backend, 1 << 14)
    result = sample(backend, "rayleigh_conditional", geometry_network(name), grid, num_realisations=num, **options)
    exact = [math.sin(math.pi * delta) / (math.pi * delta) * y**-delta for y in thresholds]
    # Servers beyond the points are left out, and the far field is averaged.
    assert_estimates(result.coverage, exact, bias=2e-3)


def test_the_meta_distribution(backend):
    """Its mean is the coverage; all realisations are in it; lower thresholds put it higher."""
    grid, num = SinrGrid.make([1.0, 2.0], [0.1, 1.0, 10.0]), realisations(backend, 1 << 14)
    result = sample(backend, "rayleigh_conditional", geometry_network("4"), grid, num_realisations=num)
    assert (result.histogram.sum(-1) == num).all()
    middle = (torch.arange(META_BINS, dtype=torch.float64) + 0.5) / META_BINS
    mean = (result.histogram * middle).sum(-1) / num
    assert ((mean - result.coverage.mean).abs() < 0.5 / META_BINS).all()
    up_to = result.histogram.cumsum(-1)
    assert (up_to.diff(dim=1) >= 0).all()


# ----------------------------------------------------------------------------- realisation by realisation, no exception

ROUNDING = 1e-5  # octaves


def samples(backend, op: str, table, densities=(0.5, 20.0), **options):
    num = realisations(backend, 1 << 16)
    result = sample(
        backend, op, table, SinrGrid.make(densities), num_realisations=num, keep_samples=True, seed=5, **options
    )
    return result.samples.double()


def log2_sir(values):
    return values[..., 0] - values[..., 1]


@pytest.mark.parametrize("residual", ["none", "mean"])
def test_a_smaller_delta_never_lowers_the_sir(backend, residual):
    """Single slope: I / S is a sum of (Gamma_1 / Gamma_i)^(1 / delta), each falling with 1 / delta."""
    sirs = [
        log2_sir(samples(backend, "sample_power_domain", power_network(name), residual=residual))
        for name in ("2.5", "3", "4", "8")
    ]
    for lower, higher in itertools.pairwise(sirs):
        assert (higher >= lower - ROUNDING).all() and (higher > lower).double().mean() > 0.99


def test_the_strongest_cell_is_never_worse_than_the_nearest(backend):
    for name in ("4", "log-normal", "dual slope"):
        strongest, nearest = (
            samples(backend, "sample_geometry", geometry_network(name), num_points=16, association=association)
            for association in ("strongest", "nearest")
        )
        assert (strongest[..., 0] >= nearest[..., 0]).all()
        assert (log2_sir(strongest) >= log2_sir(nearest) - ROUNDING).all()
        assert (log2_sir(strongest) > log2_sir(nearest) + 1).double().mean() > 0.05


@pytest.mark.parametrize("op", OPS[:2])
def test_interference_grows_with_the_terms(backend, op):
    """Without a residual, more terms are more interference; the signal stays unless a far one is the strongest."""
    table = power_network("3") if op == "sample_power_domain" else geometry_network("3")
    name = "num_terms" if op == "sample_power_domain" else "num_points"
    fewer, more = (samples(backend, op, table, residual="none", **{name: n}) for n in (4, 16))
    total = [torch.logaddexp2(*values.unbind(-1)) for values in (fewer, more)]
    assert (total[1] >= total[0] - ROUNDING).all() and (more[..., 0] >= fewer[..., 0]).all()


@pytest.mark.parametrize("op", OPS[:2])
def test_fewer_active_cells_never_lower_the_sir(backend, op):
    table = power_network("4") if op == "sample_power_domain" else geometry_network("4")
    sirs = [log2_sir(samples(backend, op, table, residual="none", activity=a)) for a in (1.0, 0.5, 0.1)]
    for more, fewer in itertools.pairwise(sirs):
        assert (fewer >= more - ROUNDING).all()


def test_single_slope_sir_is_the_same_at_all_densities(backend):
    """Density scales all powers alike, realisation by realisation."""
    for op, table in (("sample_power_domain", power_network("4")), ("sample_geometry", geometry_network("4"))):
        sir = log2_sir(samples(backend, op, table, densities=(0.01, 1.0, 64.0)))
        assert (sir - sir[:1]).abs().max() < 4 * ROUNDING


def test_coverage_falls_with_density_in_a_dual_slope(backend):
    """From the exponent of the far slope to that of the near one, below which interference is all around."""
    grid = SinrGrid.make([0.01, 1.0, 30.0], [1.0])
    options = {"num_realisations": 2000, "num_points": 64, "association": "nearest"}
    coverage = sample(backend, "sample_geometry", geometry_network("dual slope"), grid, **options).coverage
    assert (coverage.mean[:, 0].diff() < -0.1).all()
