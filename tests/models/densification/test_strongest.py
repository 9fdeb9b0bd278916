"""The laws of the strongest cell: known values, one formula against another, simulation of the power domain."""

from math import gamma, inf, pi

import numpy as np
import pytest
from scipy import integrate
from tokenweave_models.densification.exact import saturation, strongest
from tokenweave_models.densification.fading import LogNormal, LogPareto, NoFading, Pareto, Rayleigh
from tokenweave_models.densification.path_loss import MultiSlope, StretchedExponential
from tokenweave_models.densification.power_measure import PowerMeasure
from tokenweave_models.densification.regime import classify


def dual(beta_0, r_inf_m=inf):
    return MultiSlope([beta_0, 4.0], [1.0], r_inf_m=r_inf_m)


def simulate(measure, density, noise=0.0, activity=1.0, seed=7, count=10_000, terms=128):
    """SINR and its strongest power and sum, by the power domain with the mean of what lies beyond."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(size=(count, terms)), axis=1) / density
    log_arrivals = np.log(arrivals)
    knots = np.linspace(log_arrivals.min(), log_arrivals.max(), 4000)
    powers = np.exp(np.interp(log_arrivals, knots, measure.log_power(knots)))
    knots = np.linspace(arrivals[:, -1].min(), arrivals[:, -1].max(), 50)
    rest = density * np.interp(arrivals[:, -1], knots, measure.tail_mean(knots))
    active = rng.random(size=powers.shape) < activity
    active[:, 0] = False
    interference = (powers * active).sum(axis=1) + activity * rest
    return powers[:, 0] / (interference + noise), powers[:, 0], powers.sum(axis=1) + rest


def assert_mean(samples, expected, z=4.0):
    # Of an event that never came up, the standard deviation is that of the expected few.
    deviation = max(samples.std(), np.sqrt(max(expected, 0)) if samples.dtype == bool else 0)
    assert abs(samples.mean() - expected) < z * deviation / np.sqrt(len(samples)) + 1e-15


# ------------------------------------------------------------------------------------------------- powers and their sum


def test_strongest_power_and_sum():
    measure = PowerMeasure(dual(1.5), Rayleigh())
    _, strongest_power, total = simulate(measure, 0.8)
    for x in (0.3, 1.0, 4.0):
        assert_mean(strongest_power <= x, float(strongest.max_cdf(measure, 0.8, x)))
    for s in (0.01, 0.2, 1.0):
        assert_mean(np.exp(-s * total), float(strongest.sum_laplace(measure, 0.8, s)))


def test_sum_laplace_under_rayleigh():
    """Lambda(s) is the integral of 2 pi v / (1 + l(v) / s)."""
    s = 1.7
    expected = sum(
        integrate.quad(lambda v: 2 * pi * v / (1 + max(v**1.5, v**4) / s), a, b)[0] for a, b in ((0, 1), (1, inf))
    )
    value = strongest.sum_laplace(PowerMeasure(dual(1.5), Rayleigh()), 0.6, [s, 0.0])
    np.testing.assert_allclose(value, [np.exp(-0.6 * expected), 1.0], rtol=1e-8)


def test_levy_law():
    for s in (0.1, 1.0, 5.0):  # its Laplace transform is that of a stable law of index 1/2
        transform = strongest.sum_laplace(PowerMeasure(MultiSlope([4.0]), Rayleigh()), 0.5, s)
        assert transform == pytest.approx(np.exp(-0.5 * pi * gamma(1.5) * gamma(0.5) * np.sqrt(s)), rel=1e-8)
    _, _, total = simulate(PowerMeasure(MultiSlope([4.0]), Rayleigh()), 0.5)
    for x in (0.5, 2.0, 20.0):
        assert_mean(total <= x, float(strongest.sum_cdf_exponent_4(x, 0.5, gamma(1.5))))


# ------------------------------------------------------------------------------------------------------------- coverage


def test_known_single_slope_with_noise():
    assert strongest.coverage_single_slope(1.0, 4.0, noise=1.0) == pytest.approx(0.60169, abs=5e-6)
    assert strongest.coverage_single_slope(1.0, 4.0, noise=30.0) == pytest.approx(0.35071, abs=5e-6)


@pytest.mark.parametrize("beta", [2.2, 3.0, 4.0, 9.0])
def test_single_slope_without_noise_is_the_saturation_law(beta):
    thresholds = np.array([1.0, 3.0, 1e4])
    value = strongest.coverage_single_slope(thresholds, beta, density=7.0, moment=0.3)
    np.testing.assert_allclose(value, saturation.coverage(2 / beta, thresholds), rtol=1e-10)


def test_single_slope_with_noise_against_its_integral():
    delta, a, noise = 2 / 3, pi * 0.4 * 0.9, 2.0
    integral = integrate.quad(
        lambda s: delta * np.exp(-noise * s ** (1 / delta) - a * gamma(1 - delta) * s) / delta, 0, inf, epsabs=1e-13
    )[0]  # in s^delta
    value = strongest.coverage_single_slope(2.0, 3.0, density=0.4, moment=0.9, noise=noise)
    assert value == pytest.approx(a * 2.0**-delta / gamma(delta) * integral / delta, rel=1e-8)


def test_known_rayleigh():
    values = strongest.coverage_rayleigh(dual(1.5), [1.0, 100.0], [1.0])[:, 0]
    np.testing.assert_allclose(values, [0.293739, 0.023923], atol=4e-6)
    noisy = strongest.coverage_rayleigh(dual(1.5), [1.0], [3.0], noise=0.5)[0, 0]
    assert noisy == pytest.approx(0.061085, abs=2e-6)


def test_rayleigh_against_nested_quadrature():
    def loss(r):
        return max(r**1.5, r**4)

    def outer(r):
        s = 3.0 * loss(r)
        inner = sum(integrate.quad(lambda v: v / (1 + loss(v) / s), a, b)[0] for a, b in ((0, 1), (1, inf)))
        return 2 * pi * r * np.exp(-0.5 * s - 2 * pi * inner)

    expected = sum(integrate.quad(outer, a, b)[0] for a, b in ((0, 1), (1, 3)))
    assert strongest.coverage_rayleigh(dual(1.5), [1.0], [3.0], noise=0.5)[0, 0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    "law, density, noise, tolerance",
    [
        (dual(1.5), 0.01, 0.0, 1e-5),
        (dual(1.5), 1.0, 0.5, 1e-6),
        (dual(3.0), 10.0, 0.0, 1e-6),
        (dual(0.5), 1e6, 0.0, 1e-6),  # 2.6e-20
        (dual(0.0), 1.0, 0.0, 1e-6),
        (dual(0.0), 100.0, 0.0, 1e-6),  # 1.3e-173: far in the left tail of S
        (MultiSlope([3.5], height_m=1.0), 2.0, 0.1, 1e-6),
        (dual(1.0, 4.0), 0.5, 0.1, 1e-6),
        (StretchedExponential(1.0, 0.6), 1.0, 0.1, 1e-5),
    ],
)
def test_inversion_meets_rayleigh_formula(law, density, noise, tolerance):
    thresholds = [1.0, 4.0]
    expected = strongest.coverage_rayleigh(law, [density], thresholds, noise=noise)[0]
    value = strongest.coverage(PowerMeasure(law, Rayleigh()), density, thresholds, noise=noise)
    np.testing.assert_allclose(value, expected, rtol=tolerance)


@pytest.mark.parametrize("fading", [NoFading(), LogNormal(8.0), Pareto(1.2)])
@pytest.mark.parametrize("beta", [2.5, 4.0])
def test_inversion_meets_single_slope_for_any_fading(fading, beta):
    measure = PowerMeasure(MultiSlope([beta]), fading)
    for noise in (0.0, 0.7):
        value = strongest.coverage(measure, 1.5, [1.0, 30.0], noise=noise)
        options = {"density": 1.5, "moment": fading.moment(2 / beta), "noise": noise}
        np.testing.assert_allclose(value, strongest.coverage_single_slope([1.0, 30.0], beta, **options), rtol=1e-4)


@pytest.mark.parametrize(
    "law, fading, activity",
    [
        (dual(0.0), NoFading(), 1.0),
        (dual(1.5), LogNormal(10.0), 1.0),
        (dual(0.0), Pareto(1.5), 1.0),
        (dual(0.0, 100.0), Pareto(0.5), 1.0),
        (dual(1.5), Rayleigh(), 0.3),
    ],
)
def test_against_simulation(law, fading, activity):
    measure = PowerMeasure(law, fading)
    sinr, _, _ = simulate(measure, 0.5, 0.1, activity)
    options = {"noise": 0.1, "activity": activity}
    for y, exact in zip((1.0, 2.5), strongest.coverage(measure, 0.5, [1.0, 2.5], **options), strict=True):
        assert_mean(sinr > y, exact)
    assert_mean(np.log1p(sinr), strongest.rate(measure, 0.5, **options))


def test_low_density_is_the_noise_limit():
    """P_y ~ density L1(y W)."""
    measure = PowerMeasure(dual(1.5), Rayleigh())
    value = strongest.coverage(measure, 1e-5, [2.0], noise=1.0)[0]
    assert value == pytest.approx(1e-5 * np.exp(measure.log_measure(np.log(2.0))), rel=1e-4)


# ------------------------------------------------------------------------------------------------- rate and asymptotes


@pytest.mark.parametrize("beta", [2.1, 3.0, 4.0, 8.0])
def test_rate_on_a_single_slope(beta):
    measure = PowerMeasure(MultiSlope([beta]), Pareto(1.2))
    assert strongest.rate(measure, 30.0) == pytest.approx(saturation.rate(2 / beta), rel=1e-9)


def test_rate_with_noise_only():
    """At vanishing density E ln(1 + M / W), so density times the integral of L1(x) / (x + W)."""
    measure = PowerMeasure(dual(1.5), Rayleigh())
    expected = integrate.quad(lambda t: np.exp(measure.log_measure(t)) / (1 + np.exp(-t)), -40, 12, limit=200)[0]
    assert strongest.rate(measure, 1e-6, noise=1.0) == pytest.approx(1e-6 * expected, rel=1e-4)


def test_rate_of_a_slowly_varying_law():
    """ln M - ln I of marks whose logarithm has a tail of index 2: half of E ln M."""
    measure = PowerMeasure(dual(0.0, 100.0), LogPareto(2.0))
    total = 100.0 * pi * 1e4
    expected = np.sqrt(total) * (gamma(0.5) - gamma(1.5))
    assert strongest.rate(measure, 100.0) == pytest.approx(expected, rel=2e-3)


def test_scaling():
    """Only density * R_1^2 counts, for the same law in other units."""
    one, other = (PowerMeasure(MultiSlope([1.0, 4.0], [r]), LogNormal(6.0)) for r in (1.0, 300.0))
    assert strongest.rate(one, 2.0) == pytest.approx(strongest.rate(other, 2.0), rel=1e-9)
    np.testing.assert_allclose(strongest.coverage(one, 2.0, [1.5]), strongest.coverage(other, 2.0, [1.5]), rtol=1e-7)


def test_mean_strongest_power():
    measure = PowerMeasure(MultiSlope([0.0, 4.0], [1.0]), Rayleigh())
    expected = integrate.quad(lambda x: 1 - strongest.max_cdf(measure, 5.0, x), 0, 60, limit=300)[0]
    assert strongest.mean_strongest_power(measure, 5.0) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: strongest.coverage(m, 1.0, [0.5]), "thresholds must be at least 1 .0 dB. for this formula, got 0.5"),
        (
            lambda m: strongest.coverage_rayleigh(dual(1.5), [1.0], [1.0, 0.1]),
            "at least 1 .0 dB. for this formula, got 0.1",
        ),
        (lambda m: strongest.coverage_single_slope(0.9, 4.0), "at least 1 .0 dB. for this formula, got 0.9"),
        (
            lambda m: strongest.coverage_single_slope(1.0, 2.0),
            "exponent must be above 2, or interference is infinite; got 2",
        ),
        (
            lambda m: strongest.coverage_single_slope(1.0, 4.0, moment=inf),
            "moment must be positive and finite, got inf",
        ),
        (lambda m: strongest.coverage(m, 0.0, [1.0]), "density must be positive and finite, got 0"),
        (lambda m: strongest.coverage(m, 1.0, [1.0], noise=-1.0), "noise must be finite and not negative, got -1"),
        (lambda m: strongest.rate(m, 1.0, activity=0.0), "activity must be above 0 and at most 1, got 0"),
        (
            lambda m: strongest.deficit_rate(classify(dual(3.0), Rayleigh()), 1.0),
            "rho must be above 1 and finite, got 0.666667",
        ),
        (
            lambda m: strongest.deficit_coverage(classify(dual(0.0), Rayleigh()), 1.0, 1.0),
            "and finite, got inf .deficit.",
        ),
        (
            lambda m: strongest.coverage(PowerMeasure(dual(0.0, 9.0), LogPareto(2.0)), 1.0, [1.0]),
            "powers within the range of floats for this inversion, got logpareto:2",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(PowerMeasure(dual(1.5), Rayleigh()))


def test_rate_needs_its_mean():
    with pytest.raises(ValueError, match="fading must have a finite E ln.1 . m., got logpareto:1"):
        strongest.rate(PowerMeasure(dual(0.0, 9.0), LogPareto(1.0)), 1.0)
