"""The power measure against closed forms and adaptive quadrature, its inverse, its tails and its tables."""

from itertools import pairwise
from math import gamma, inf, log, pi

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import integrate, special, stats
from tokenweave_models.densification.fading import (
    FadingFunction,
    FadingTable,
    Gamma,
    LogNormal,
    LogPareto,
    NoFading,
    Pareto,
    Rayleigh,
    Rice,
    Suzuki,
    Weibull,
)
from tokenweave_models.densification.path_loss import MultiSlope, PathLossFunction, PathLossTable, StretchedExponential
from tokenweave_models.densification.power_measure import PowerMeasure, geometry_table

DUAL = MultiSlope([1.5, 4], [10])
FLAT = MultiSlope([0, 4], [10])
FLAT_DISC = MultiSlope([0, 4], [10], r_inf_m=4e4)
LOG_X = np.array([-30.0, -10.0, -3.0, -0.5, 0.3, 2.0, 4.0, 5.5, 6.9])
CASES = [
    (DUAL, Rayleigh()),
    (DUAL, Suzuki(8)),
    (FLAT, Suzuki(8)),
    (FLAT, Rayleigh()),
    (MultiSlope([0.2, 2.1], [10]), LogNormal(12)),
    (MultiSlope([3, 4], [10], r_inf_m=1000), Pareto(0.5)),
    (FLAT_DISC, LogPareto(2)),
    (MultiSlope([0.5, 3], [10], min_distance_m=2), Weibull(0.5)),
    (MultiSlope([1, 2, 4], [10, 100], height_m=3), Rice(8)),
    (StretchedExponential(0.9, 0.5), Rayleigh()),
    (MultiSlope([0, 4], [10], r_inf_m=100), NoFading()),
    (MultiSlope([4], height_m=10), Pareto(1.2)),
    (PathLossFunction(lambda t: 3.5 * np.logaddexp(0, t - 1), 0, 3.5), Gamma(0.5)),
    (PathLossTable([1, 10, 30, 100], [1, 5, 100, 2e4]), Rayleigh()),
    (DUAL, FadingTable([0.1, 1, 3, 10], [1, 0.7, 0.2, 1e-3])),
]


def name(value):
    return value.describe() if hasattr(value, "describe") else ""


# ------------------------------------------------------------------------------------------------------- closed forms


def lower_gamma(q, y):
    return gamma(q) * special.gammainc(q, y)


def test_rayleigh_multislope_in_closed_form():
    """Slope k from R_k to R_k+1 gives q pi (x A_k)^-q [gamma(q, x A_k R_k+1^b) - gamma(q, x A_k R_k^b)], q = 2 / b."""
    x = np.exp(np.linspace(-20, 6, 27))
    q0, q1 = 2 / 1.5, 0.5
    near = q0 * pi * x**-q0 * lower_gamma(q0, x)
    far = q1 * pi * x**-q1 * gamma(q1) * special.gammaincc(q1, x)
    np.testing.assert_allclose(np.exp(PowerMeasure(DUAL, Rayleigh()).log_measure(np.log(x))), near + far, rtol=1e-11)
    flat = pi * np.exp(-x) + far
    np.testing.assert_allclose(np.exp(PowerMeasure(FLAT, Rayleigh()).log_measure(np.log(x))), flat, rtol=1e-11)


def test_rayleigh_with_height_in_closed_form():
    x = np.exp(np.linspace(-20, 6, 27))
    closed = pi * 0.5 * x**-0.5 * gamma(0.5) * special.gammaincc(0.5, x)
    measure = PowerMeasure(MultiSlope([4], height_m=10), Rayleigh())
    np.testing.assert_allclose(np.exp(measure.log_measure(np.log(x))), closed, rtol=1e-11)


def test_lognormal_dual_slope_in_closed_form():
    """pi (x A_k)^-q E[m^q; within slope k], the partial moment of a log-normal mark."""
    sigma, v = 12 * log(10) / 10, np.linspace(-40, 30, 36)

    def upper(q):  # of E[m^q; ln m > v]
        return np.exp((q * sigma) ** 2 / 2) * stats.norm.sf((v - q * sigma**2) / sigma)

    q0, q1 = 2 / 1.5, 0.5
    lower = np.exp((q0 * sigma) ** 2 / 2) * stats.norm.cdf((v - q0 * sigma**2) / sigma)
    closed = pi * np.exp(-q0 * v) * lower + pi * np.exp(-q1 * v) * upper(q1)
    np.testing.assert_allclose(np.exp(PowerMeasure(DUAL, LogNormal(12)).log_measure(v)), closed, rtol=1e-10)


@pytest.mark.parametrize("law", [Rayleigh(), LogNormal(8), Pareto(1.2), Suzuki(8), NoFading(), Pareto(0.68)], ids=name)
def test_single_slope_depends_on_one_moment(law):
    """L1 = pi E[m^(2/3)] x^(-2/3), for Pareto(0.68) close to where it stops to exist."""
    log_x = np.linspace(-60, 60, 25)
    measure = PowerMeasure(MultiSlope([3]), law)
    expected = log(pi * law.moment(2 / 3)) - 2 / 3 * log_x
    np.testing.assert_allclose(measure.log_measure(log_x), expected, rtol=1e-11, atol=1e-11)
    # The rest beyond g is then a power of g: 2 g P(g), delta / (1 - delta) = 2.
    g = np.array([1e-8, 1.0, 1e6])
    np.testing.assert_allclose(measure.tail_mean(g), 2 * g * np.exp(measure.log_power(np.log(g))), rtol=1e-9)
    variance = 0.5 * g * np.exp(2 * measure.log_power(np.log(g)))  # delta / (2 - delta)
    np.testing.assert_allclose(measure.tail_variance(g), variance, rtol=1e-9)


def test_no_fading_is_the_area_within_reach():
    measure = PowerMeasure(DUAL, NoFading())
    x = np.array([1e-6, 0.3, 1.0, 50.0])
    r = np.where(x < 1, x**-0.25, x ** (-1 / 1.5))
    np.testing.assert_allclose(np.exp(measure.log_measure(np.log(x))), pi * r**2, rtol=1e-11)
    g = np.array([1e-7, 1.0, pi, 100.0])
    np.testing.assert_allclose(measure.log_power(np.log(g)), -DUAL.log_loss(np.log(g / pi) / 2), atol=1e-10)
    # In a flat near field all powers within u are 1, those beyond the rim are not there.
    flat = PowerMeasure(MultiSlope([0, 4], [10], r_inf_m=100), NoFading())
    np.testing.assert_array_equal(flat.log_measure(np.array([0.0, 1e-9])), -inf)
    np.testing.assert_allclose(flat.log_power(np.log([1e-6, 3.0, 4 * pi])), [0, 0, -4 * log(2)], atol=1e-11)
    assert flat.log_power(np.log(np.array([flat.total * 1.001])))[0] == -inf
    np.testing.assert_allclose(flat.tail_mean([1e-9, 1.0]), [flat.mean_power, flat.mean_power - 1], rtol=1e-7)


def test_marks_of_two_values():
    """A main lobe 10 times the side lobe, in a tenth of all directions: L1 jumps twice."""
    lobes = FadingFunction(
        lambda v: np.where(v < log(10), log(0.1), -inf),
        tail_index=inf,
        log_kinks=[0, log(10)],
        log_min=0,
        log_max=log(10),
    )
    np.testing.assert_allclose(lobes.log_quantile(np.array([1e-9, 2.3, 2.31, 30.0])), [0, 0, log(10), log(10)])
    assert lobes.moment(1) == pytest.approx(1.9)
    disc = PowerMeasure(MultiSlope([0], r_inf_m=1), lobes)
    np.testing.assert_allclose(np.exp(disc.log_measure(np.log([0.5, 2.0, 11.0]))), [pi, 0.1 * pi, 0], rtol=1e-11)
    g = np.array([0.01, 0.3, 0.32, 3.0])
    np.testing.assert_allclose(np.exp(disc.log_power(np.log(g))), [10, 10, 1, 1], rtol=1e-11)
    below = [1.9 * pi - 0.1, 1.9 * pi - 3, pi - 0.32, pi - 3]
    np.testing.assert_allclose(disc.tail_mean(g), below, rtol=1e-7)
    squares = [100 * (0.1 * pi - 0.01) + 0.9 * pi, 100 * (0.1 * pi - 0.3) + 0.9 * pi, *below[2:]]
    np.testing.assert_allclose(disc.tail_variance(g), squares, rtol=1e-7)


def test_slowly_varying_marks_reach_beyond_any_float():
    """Flat disc only: L1 = pi R^2 P(m > x), so everything is known, at ln x = 1e10 too."""
    measure = PowerMeasure(MultiSlope([0], r_inf_m=1), LogPareto(1.5))
    log_x = np.array([-5.0, 0.5, 1e3, 1e6, 1e10])
    expected = log(pi) - 1.5 * np.log1p(np.maximum(log_x, 0))
    np.testing.assert_allclose(measure.log_measure(log_x), expected, rtol=1e-10)
    np.testing.assert_allclose(measure.log_power(expected[1:]), log_x[1:], rtol=1e-8)
    # What lies below: x |dL1 / d ln x| (1 + 2.5 / (1 + ln x) + ...), x beyond any float
    tail = measure.log_tail(expected[2:], 1) - measure.log_power(expected[2:])
    below = log(1.5) + expected[2:] - np.log1p(log_x[2:]) + np.log1p(2.5 / (1 + log_x[2:]))
    np.testing.assert_allclose(tail[:2], below[:2], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- quadrature


def by_quadrature(path_loss, fading, log_x):
    """ln L1 by adaptive quadrature of scipy around the peak of the integrand, in ln r."""

    def log_integrand(t):
        return 2 * t + fading.log_survival(log_x + path_loss.log_loss(t))

    rim = log(path_loss.r_inf) if path_loss.r_inf < inf else 60.0
    grid = np.linspace(-90, rim, 150_001)
    values = log_integrand(grid)
    peak = values.max()
    inside = np.flatnonzero(values > peak - 45)
    low, high = grid[max(inside[0] - 1, 0)], grid[min(inside[-1] + 1, len(grid) - 1)]
    middle = grid[values.argmax()]
    kinks = np.array(fading.log_kinks)[:, None] - log_x
    corners = np.concatenate([path_loss.log_corners(), path_loss.log_distance(kinks).ravel()])
    edges = [*np.linspace(low, high, 41), *(middle + 0.3 * np.linspace(-1, 1, 21)), *(middle + np.linspace(0, 0.01, 9))]
    edges = np.unique(np.clip([*edges, *corners[np.isfinite(corners)]], low, high))
    area = 0.0
    for pair in pairwise(edges):
        area += integrate.quad(lambda t: float(np.exp(log_integrand(np.array([t]))[0] - peak)), *pair, epsrel=1e-11)[0]
    return log(2 * pi * area) + peak


@pytest.mark.parametrize("path_loss, fading", CASES, ids=name)
def test_measure_is_the_integral(path_loss, fading):
    measure = PowerMeasure(path_loss, fading)
    log_x = np.append(LOG_X[1::2], 1e6) if fading.tail_index == 0 else LOG_X[1::2]
    for place, value in zip(log_x, measure.log_measure(log_x), strict=True):
        if value > -1e4:
            assert value == pytest.approx(by_quadrature(path_loss, fading, place), abs=2e-9), place


def test_measure_goes_below_exp_minus_1000():
    value = PowerMeasure(FLAT, Rayleigh()).log_measure(np.array([7.2]))[0]
    x = np.exp(7.2)  # pi exp(-x) and the far slope's asymptotic series
    far = 0.5 * pi / x * (1 - 0.5 / x + 0.75 / x**2)
    assert value < -1300
    assert value == pytest.approx(-x + log(pi + far), abs=1e-8)


@pytest.mark.parametrize("path_loss, fading", CASES, ids=name)
@settings(max_examples=10, deadline=None)
@given(log_g=st.lists(st.floats(-25, 17), min_size=2, max_size=12))
def test_inverse_falls_and_inverts(path_loss, fading, log_g):
    measure = cached(path_loss, fading)
    log_g = np.sort(np.array(log_g))
    log_g = log_g[log_g < log(measure.total) - 1e-6] if measure.total < inf else log_g
    power = measure.log_power(log_g)
    assert (np.diff(power) <= 1e-11 * np.maximum(1, np.abs(power[1:]))).all()
    inside = np.abs(power - measure._log_highest) > 1e-6  # else within the jump at the largest power
    back = measure.log_measure(power[inside])
    np.testing.assert_allclose(back, log_g[inside], atol=1e-8 if not fading.log_kinks else 1e-6)


_measures = {}


def cached(path_loss, fading):
    """Curves grow with what they are asked, so that one measure serves all examples."""
    key = id(path_loss), id(fading)
    if key not in _measures:
        _measures[key] = PowerMeasure(path_loss, fading)
    return _measures[key]


# --------------------------------------------------------------------------------------------------------------- tails


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("path_loss, fading", [case for case in CASES if case[1].tail_index > 0], ids=name)
def test_tails_are_the_integral_of_the_inverse(path_loss, fading, order):
    """From g on to 1e3 g and the rest there: the difference is an integral of P over ln g by Gauss-Legendre."""
    measure = cached(path_loss, fading)
    corners = np.log(pi) + 2 * path_loss.log_corners()
    nodes, weights = np.polynomial.legendre.leggauss(16)
    for g in (1e-6, 0.1, 5.0):
        end = min(1e3 * g, measure.total * 0.5)
        edges = np.unique(np.concatenate([np.linspace(log(g), log(end), 257), corners]))
        edges = edges[(edges >= log(g)) & (edges <= log(end))]
        half = np.diff(edges)[:, None] / 2
        places = edges[:-1, None] + half * (1 + nodes)
        log_values = order * measure.log_power(places) + places
        peak = log_values.max()
        between = peak + log((np.exp(log_values - peak) * half @ weights).sum())
        found, rest = measure.log_tail(np.log([g, end]), order)
        tolerance = 1e-7 if not fading.log_kinks else 2e-5  # the nodes do not know the kinks
        assert found == pytest.approx(np.logaddexp(between, rest), abs=tolerance)


def test_mean_power_is_the_whole_tail():
    for path_loss, fading in [(DUAL, Rayleigh()), (FLAT, Suzuki(8)), (FLAT_DISC, Pareto(1.5))]:
        measure = PowerMeasure(path_loss, fading)
        assert measure.tail_mean(np.array([1e-40]))[0] == pytest.approx(measure.mean_power, rel=1e-8)
    assert PowerMeasure(DUAL, Rayleigh()).mean_power == pytest.approx(2 * pi * (2 + 0.5), rel=1e-9)
    assert PowerMeasure(MultiSlope([4]), Rayleigh()).mean_power == inf
    assert PowerMeasure(FLAT_DISC, Pareto(0.5)).mean_power == inf


def test_kappa_is_the_limit():
    near = PowerMeasure(DUAL, Rayleigh())
    assert near.kappa == pytest.approx(pi * gamma(1 + 2 / 1.5))
    assert near.log_measure(np.array([60.0]))[0] + 60 * 2 / 1.5 == pytest.approx(log(near.kappa), abs=1e-9)
    tail = PowerMeasure(FLAT, Pareto(1.5))  # 2 pi (1/2 + 1 / (6 - 2))
    assert tail.kappa == pytest.approx(2 * pi * 0.75, rel=1e-9)
    assert tail.log_measure(np.array([80.0]))[0] + 80 * 1.5 == pytest.approx(log(tail.kappa), abs=1e-9)
    assert PowerMeasure(MultiSlope([1, 4], [10]), Pareto(2)).kappa == inf
    assert np.isnan(PowerMeasure(FLAT, Rayleigh()).kappa) and np.isnan(PowerMeasure(FLAT_DISC, LogPareto(2)).kappa)


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("path_loss, fading", CASES, ids=name)
def test_table_is_the_inverse(path_loss, fading):
    measure = cached(path_loss, fading)
    densities = (1e-5, 1e2)
    table = measure.power_table(densities)
    assert table.cut == measure.total
    reach = min(200 / densities[0], measure.total * 0.9)
    g = torch.from_numpy(np.geomspace(2.0**-33 / 1e2, reach, 5000)).float()
    exact = measure.log_power(np.log(g.double().numpy())) / log(2)
    error = np.abs(table.inverse.evaluate(g).numpy() - exact) / np.maximum(1, np.abs(exact) / 64)
    assert error.max() <= 1.2 * measure.table_error + 1e-6
    kinked = fading.log_kinks or len(path_loss.log_corners()) > 2
    assert measure.table_error < (5e-3 if kinked else 1e-5)
    for order in (1, 2):
        exact = measure.log_tail(np.log(g.double().numpy()), order) / log(2) / order
        found = table.inverse.evaluate(g, plane=order).numpy()
        assert (np.abs(found - exact) / np.maximum(1, np.abs(exact) / 64)).max() < (5e-2 if kinked else 1e-4)


@pytest.mark.parametrize(
    "path_loss, fading", [(DUAL, Suzuki(8)), (FLAT, Rayleigh()), (FLAT_DISC, Pareto(0.5))], ids=name
)
def test_table_of_the_measure(path_loss, fading):
    measure = cached(path_loss, fading)
    table = measure.power_table((1e-5, 1e2))
    strongest = measure.log_power(np.log([2.0**-33 / 1e2]))[0] / log(2)
    z = torch.linspace(-60, strongest + 79, 4000)
    exact = measure.log_measure(z.double().numpy() * log(2)) / log(2)
    matters = exact > -1000
    found = table.measure.evaluate(z).numpy()
    np.testing.assert_allclose(found[matters], exact[matters], atol=2e-3 if fading.log_kinks else 1e-4)
    assert (found[exact < -1.1e4] <= -9.9e3).all()  # nothing is there


def test_table_covers_what_a_sampler_asks():
    table = PowerMeasure(DUAL, Rayleigh()).power_table((1e-3, 10.0))
    first = np.array([table.inverse.first_key << (23 - table.inverse.log2_steps)], dtype=np.int32).view(np.float32)[0]
    assert first <= 2.0**-33 / 10
    last = table.inverse.first_key + table.inverse.coefficients.shape[1]
    assert np.array([last << (23 - table.inverse.log2_steps)], dtype=np.int32).view(np.float32)[0] >= 4 * 64 / 1e-3
    falls = table.inverse.evaluate(torch.from_numpy(np.geomspace(1.2e-11, 2e5, 3000)))
    assert (falls.diff() < 0).all()


@pytest.mark.parametrize("densities", [(0.0, 1.0), (2.0, 1.0), (1.0, inf)])
def test_table_refuses_densities(densities):
    with pytest.raises(ValueError, match="power_table: densities must be a positive, finite, ascending pair, got"):
        PowerMeasure(DUAL, Rayleigh()).power_table(densities)


def test_table_refuses_powers_whose_logarithms_run_together():
    measure = PowerMeasure(FLAT_DISC, LogPareto(0.9))
    assert measure.power_table((1e-9, 2e-9)).inverse.coefficients.isfinite().all()
    words = r"fading must have a lighter tail at 1e\+06 base stations .* is 2\^[\d.e+]+, got logpareto:0.9"
    with pytest.raises(ValueError, match=f"^power_table: {words}$"):
        measure.power_table((1e-9, 1e6))


@pytest.mark.parametrize("path_loss, fading", CASES, ids=name)
def test_geometry_table(path_loss, fading):
    table = geometry_table(path_loss, fading)
    r = np.geomspace(1e-2, min(1e3, path_loss.r_inf * 0.99), 300)
    slant = np.maximum(r, table.min_distance) ** 2 + table.height**2
    loss = path_loss.log_loss(np.log(r)) / log(2)
    if path_loss.lines():
        a, b = table.gain.double().numpy().T
        found = (a[:, None] + b[:, None] * np.log2(slant)).max(axis=0)
    else:
        found = -table.gain.evaluate(torch.from_numpy(slant)).numpy()
    np.testing.assert_allclose(found, loss, rtol=1e-5, atol=2e-3 if isinstance(path_loss, PathLossTable) else 1e-4)
    y = np.geomspace(2.0**-33, 0.5, 500).astype(np.float32).astype(np.float64)
    atol = 5e-3 if isinstance(fading, FadingTable) else 1e-5
    for plane, e in enumerate((-np.log1p(-y), -np.log(y))):
        exact, found = fading.log_quantile(e) / log(2), table.fading.evaluate(torch.from_numpy(y), plane)
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-5, atol=atol)
    for plane in (0, 1):
        exact = path_loss.log_gain_integral(plane + 1.0, np.log(r)) / log(2) / (plane + 1)
        found = table.far.evaluate(torch.from_numpy(r**2), plane).numpy()
        smooth = r < 0.9 * path_loss.r_inf
        is_kinked = len(path_loss.log_corners()) > 0
        np.testing.assert_allclose(found[smooth], exact[smooth], rtol=1e-6, atol=3e-3 if is_kinked else 1e-5)
    assert table.mark_mean == fading.moment(1) and table.mark_second_moment == fading.moment(2)
    assert table.r_inf == path_loss.r_inf


# ------------------------------------------------------------------------------------------------------------- refusals


def test_infinite_interference_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"above 2 / far exponent = 0.5 on the infinite plane.*got 0.5 \(pareto:0.5\)"):
        PowerMeasure(FLAT, Pareto(0.5))
    with pytest.raises(ValueError, match=r"tail index above 2 / far exponent = 0.5.*got 0 \(logpareto:2\).*r_inf_m"):
        PowerMeasure(FLAT, LogPareto(2))
    with pytest.raises(ValueError, match=r"above 2 / far exponent = 0 .*got 0 \(logpareto:2\)"):
        PowerMeasure(StretchedExponential(0.9, 0.5), LogPareto(2))
    PowerMeasure(FLAT, Pareto(0.51))
    PowerMeasure(FLAT_DISC, LogPareto(2))
