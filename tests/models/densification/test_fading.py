"""The laws of marks against scipy, against each other, and at the ends where floats give out."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import integrate, special, stats
from tokenweave_models.densification.fading import (
    Fading,
    FadingFunction,
    FadingTable,
    Gamma,
    LogNormal,
    LogPareto,
    Nakagami,
    NoFading,
    Pareto,
    Product,
    Rayleigh,
    Rice,
    Suzuki,
    Weibull,
)

SIGMA_8_DB = 8 * np.log(10) / 10
K_6_DB = 10**0.6

# Each law beside the same law in scipy, of the mark itself.
KNOWN = [
    (Rayleigh(), stats.expon()),
    (Gamma(0.5), stats.gamma(0.5, scale=2)),
    (Gamma(7), stats.gamma(7, scale=1 / 7)),
    (Nakagami(2), stats.gamma(2, scale=0.5)),
    (Rice(6), stats.ncx2(2, 2 * K_6_DB, scale=0.5 / (1 + K_6_DB))),
    (Weibull(0.6), stats.weibull_min(0.6, scale=1 / special.gamma(1 + 1 / 0.6))),
    (LogNormal(8), stats.lognorm(SIGMA_8_DB)),
    (Pareto(1.5), stats.pareto(1.5)),
]
PRODUCTS = [Suzuki(8), Gamma(2) * LogNormal(6), Pareto(1.5) * LogNormal(4), LogPareto(2) * Rayleigh()]
TABLE = FadingTable([0.1, 1, 3, 10], [1, 0.7, 0.2, 1e-3])
ALL = [law for law, _ in KNOWN] + PRODUCTS + [NoFading(), LogPareto(2), TABLE]
CURVED = [law for law in ALL if not isinstance(law, NoFading)]


def name(value):
    return value.describe() if isinstance(value, Fading) else ""


@pytest.mark.parametrize("law, known", KNOWN, ids=name)
def test_survival_and_quantiles_are_those_of_scipy(law, known):
    probability = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999])
    m = known.isf(probability)
    np.testing.assert_allclose(law.log_survival(np.log(m)), np.log(known.sf(m)), rtol=1e-9)
    np.testing.assert_allclose(law.log_quantile(-np.log(probability)), np.log(m), rtol=1e-9, atol=1e-11)
    # Where almost all marks are larger, the few that are not must be exact relative to themselves.
    few = np.array([2.0**-33, 1e-6, 1e-3])
    m = known.ppf(-np.expm1(-few))
    rounding = 3e-16 if law.log_min == 0 else 0.0  # of a mark just above 1
    np.testing.assert_allclose(-law.log_survival(np.log(m)), few, rtol=1e-8, atol=rounding)
    np.testing.assert_allclose(np.exp(law.log_quantile(few)), m, rtol=1e-8)


@pytest.mark.parametrize("law, known", KNOWN, ids=name)
def test_moments_are_those_of_scipy(law, known):
    for power in (0.3, 0.5, 1.0, 1.4):
        by_scipy = integrate.quad(lambda e, q=power: np.exp(q * np.log(known.isf(np.exp(-e))) - e), 0, 40, limit=400)[0]
        tail = np.exp(power * law.log_quantile(np.array([40.0]))[0] - 40)  # of pareto it is not all
        tail *= 1 / (1 - power / law.tail_index)
        assert law.moment(power) == pytest.approx(by_scipy + tail, rel=2e-6)
        assert law.moment(power) == pytest.approx(
            Fading.moment(law, power), rel=1e-10
        )  # the closed form and the integral
    assert law.moment(0) == 1


@pytest.mark.parametrize("law", CURVED, ids=name)
def test_quantile_inverts_survival(law):
    e = np.array([2.0**-33, 1e-5, 0.01, 0.5, 1.0, 4.0, 32.0, 700.0])
    np.testing.assert_allclose(-law.log_survival(law.log_quantile(e)), e, rtol=1e-9, atol=1e-17)


@pytest.mark.parametrize("law", ALL, ids=name)
@settings(max_examples=20, deadline=None)
@given(places=st.lists(st.floats(-80, 80), min_size=2, max_size=8))
def test_survival_falls_and_is_a_probability(law, places):
    values = law.log_survival(np.sort(places))
    assert (values <= 0).all()
    assert (np.diff(values[np.isfinite(values)]) <= 1e-12 * np.abs(values[np.isfinite(values)][1:])).all()
    assert law.log_survival(np.array([-np.inf]))[0] == 0


def test_deep_tails_do_not_underflow():
    gamma = Gamma(3.0)  # closed form: sum of three terms
    y = 3 * np.exp(np.array([4.0, 6.0, 8.0]))
    closed = -y + np.log1p(y + y**2 / 2)
    np.testing.assert_allclose(gamma.log_survival(np.log(y / 3)), closed, rtol=1e-12)
    # Rice without a constant path is Rayleigh; with one, far out, a Gaussian of the amplitude.
    np.testing.assert_allclose(Rice(-80).log_survival(np.array([0.0, 5.0, 7.0])), -np.exp([0.0, 5.0, 7.0]), rtol=1e-6)
    v = np.array([11.5, 11.6])  # on both sides of where the far form takes over
    amplitude = np.sqrt((1 + K_6_DB) * np.exp(v)) - np.sqrt(K_6_DB)
    np.testing.assert_allclose(Rice(6).log_survival(v), -(amplitude**2), rtol=1e-4)
    far = Rice(6).log_survival(np.log(1e5) + np.array([-1e-9, 1e-9]))
    assert abs(far[1] - far[0]) < 1e-3 * abs(far[0]) * 1e-3
    assert LogNormal(8).log_survival(np.array([200.0]))[0] == pytest.approx(stats.norm.logsf(200 / SIGMA_8_DB))
    assert LogPareto(2).log_survival(np.array([1e10]))[0] == pytest.approx(-2 * np.log1p(1e10))
    assert LogPareto(2).log_quantile(np.array([40.0]))[0] == pytest.approx(np.expm1(20.0))


@pytest.mark.parametrize("log_m", [-12.0, -2.0, 0.5, 3.0, 12.0, 60.0])
def test_suzuki_is_the_mixture(log_m):
    """Against adaptive quadrature over the shadowing, around its peak."""

    def log_integrand(z):
        with np.errstate(over="ignore"):
            fading = -np.exp(np.clip(log_m - SIGMA_8_DB * z, None, 700.0))
            if log_m < -5:  # then the complement: what is small is exact
                fading = np.log(-np.expm1(fading))
        return fading + stats.norm.logpdf(z)

    grid = np.linspace(-40, 40, 80001)
    values = log_integrand(grid)
    peak = values.max()
    inside = grid[values > peak - 50]
    edges = np.linspace(inside[0] - 1e-3, inside[-1] + 1e-3, 41)
    area = sum(
        integrate.quad(lambda z: np.exp(log_integrand(z) - peak), low, high, epsabs=0, epsrel=1e-12)[0]
        for low, high in pairwise(edges)
    )
    found = Suzuki(8).log_survival(np.array([log_m]))[0]
    if log_m < -5:
        found = np.log(-np.expm1(found))
    assert found == pytest.approx(np.log(area) + peak, abs=1e-9 * max(1, abs(peak)))


@pytest.mark.parametrize("law", PRODUCTS, ids=name)
def test_products_have_the_survival_of_their_samples(law):
    rng = np.random.default_rng(3)
    log_m = law.log_sample(rng, 200_000)
    for probability in (0.99, 0.5, 0.05):
        share = np.mean(log_m > law.log_quantile(np.array([-np.log(probability)]))[0])
        assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 200_000)


def test_products_with_closed_forms_take_them():
    assert isinstance(Rayleigh() * LogNormal(8), Suzuki) and isinstance(LogNormal(8) * Rayleigh(), Suzuki)
    both = LogNormal(3) * LogNormal(4)
    assert isinstance(both, LogNormal) and both.db == pytest.approx(5)
    assert isinstance(NoFading() * Pareto(2), Pareto) and isinstance(Pareto(2) * LogNormal(0), Pareto)
    assert isinstance(Gamma(2) * LogNormal(6), Product)
    # Pareto times Pareto of another index: a sum of two powers
    v = np.array([0.1, 2.0, 20.0])
    closed = np.log((2 * np.exp(-0.7 * v) - 0.7 * np.exp(-2 * v)) / 1.3)
    np.testing.assert_allclose((Pareto(0.7) * Pareto(2)).log_survival(v), closed, rtol=1e-9)
    with pytest.raises(TypeError):
        Rayleigh() * 2.0


@pytest.mark.parametrize("first, second", [(Rayleigh(), Rayleigh()), (Gamma(2), Gamma(3)), (Gamma(2), Weibull(0.5))])
def test_a_product_of_light_tails_is_the_law_of_its_samples(first, second):
    """And its quantiles are found from a hazard of 1e-30 to one of 1e3."""
    law, n = first * second, 40_000
    sample = np.sort(law.log_sample(np.random.default_rng(3), n))
    gap = np.abs(-np.expm1(law.log_survival(sample)) - (np.arange(n) + 0.5) / n).max()
    assert gap < 1.95 / np.sqrt(n)  # Kolmogorov and Smirnov, one in a thousand
    e = np.geomspace(1e-30, 1e3, 71)
    np.testing.assert_allclose(-law.log_survival(law.log_quantile(e)), e, rtol=1e-6)


def test_a_product_of_rayleighs_is_a_bessel_function():
    """P(m > x) = 2 sqrt(x) K_1(2 sqrt(x)) for the product of two powers."""
    x = np.array([1e-6, 1e-2, 1.0, 30.0, 3e3, 1e5])
    root = 2 * np.sqrt(x)
    exact = np.log(root * special.kve(1, root)) - root
    np.testing.assert_allclose((Rayleigh() * Rayleigh()).log_survival(np.log(x)), exact, rtol=1e-7, atol=1e-12)


def test_tail_classes():
    for law in (Rayleigh(), Gamma(0.3), Rice(3), Weibull(0.2), LogNormal(12), Suzuki(8), NoFading()):
        assert law.tail_index == np.inf and law.log_mean_exists
    assert Pareto(0.5).tail_index == 0.5 and Pareto(0.5).tail_constant == 1
    assert LogPareto(2).tail_index == 0 and LogPareto(2).log_mean_exists
    assert not LogPareto(1).log_mean_exists and not (LogPareto(1) * Rayleigh()).log_mean_exists
    mixed = Pareto(1.5) * LogNormal(4)  # Breiman: the constant gains E[shadowing^1.5]
    assert mixed.tail_index == 1.5
    v = np.array([300.0])
    assert mixed.log_survival(v)[0] + 1.5 * v[0] == pytest.approx(np.log(mixed.tail_constant), abs=1e-8)


def test_moments_that_do_not_exist_are_infinite():
    assert Pareto(1.5).moment(1.5) == np.inf and Pareto(1.5).moment(1.4) == pytest.approx(15)
    assert LogPareto(5).moment(0.01) == np.inf and LogPareto(5).moment(0) == 1
    assert (Pareto(1.5) * Rayleigh()).moment(2) == np.inf
    assert Fading.moment(Pareto(1.5), 1.5) == np.inf
    assert Fading.moment(Pareto(1.5), 1.4999) == pytest.approx(15_000, rel=1e-8)
    with pytest.raises(ValueError, match="moment: power must be 0 or more and finite, got -1"):
        Fading.moment(Rayleigh(), -1)


def test_samples_follow_the_law():
    rng = np.random.default_rng(5)
    for law, known in KNOWN:
        assert stats.kstest(law.sample(rng, 20_000), known.cdf).pvalue > 1e-4
    assert law.sample(rng, (3, 5)).shape == (3, 5)
    assert LogPareto(0.3).sample(rng, 200).max() == np.inf  # beyond any float, and said so


def test_table_is_the_law_through_its_points():
    np.testing.assert_allclose(np.exp(TABLE.log_survival(np.log([0.1, 1, 3, 10]))), [1, 0.7, 0.2, 1e-3])
    assert TABLE.log_survival(np.array([-9.0]))[0] == 0
    assert TABLE.tail_is_fitted and TABLE.describe() == "table"  # the words of the command line alone
    given_tail = FadingTable([1, 2, 4], [1, 0.5, 0.25], tail_index=3.0)
    assert not given_tail.tail_is_fitted and given_tail.describe() == "table"
    assert np.exp(given_tail.log_survival(np.log([8.0])))[0] == pytest.approx(0.25 / 8)
    for power in (0.5, 1.0):
        assert TABLE.moment(power) == pytest.approx(Fading.moment(TABLE, power), rel=1e-9)
    # The mean is the integral of the survival function: 1 below 1, 1/m to 4, then 16 / m^3.
    assert given_tail.moment(1.0) == pytest.approx(1 + np.log(4) + 0.5)


def test_table_of_samples_is_close_to_their_law():
    rng = np.random.default_rng(11)
    samples = 1 + rng.pareto(2.0, 100_000)
    table = FadingTable.from_samples(samples)
    assert table.tail_index == pytest.approx(2.0, abs=4 * 2 / 100_000**0.25) and table.tail_is_fitted
    assert not FadingTable.from_samples(samples, tail_index=2.0).tail_is_fitted
    v = np.log([1.1, 1.5, 3.0, 10.0])
    np.testing.assert_allclose(table.log_survival(v), -2 * v, rtol=0.1)


def test_function_is_looked_up_like_a_law():
    law = FadingFunction(lambda v: -np.exp(v), tail_index=np.inf, name="mine")
    np.testing.assert_allclose(law.log_quantile(np.array([1e-6, 1.0, 50.0])), np.log([1e-6, 1.0, 50.0]), atol=1e-9)
    assert law.moment(2) == pytest.approx(2, rel=1e-9) and law.describe() == "mine"
    uniform = FadingFunction(lambda v: np.log1p(-np.exp(np.minimum(v, -1e-300))), tail_index=np.inf, log_max=0.0)
    assert uniform.moment(1) == pytest.approx(0.5, rel=1e-9)


REFUSED = [
    (lambda: Gamma(0), "Gamma: k must be 0.01 to 1000, got 0"),
    (lambda: Nakagami(-1), "Nakagami: m must be 0.01 to 1000, got -1"),
    (lambda: Weibull(np.nan), "Weibull: k must be 0.01 to 30, got nan"),
    (lambda: Pareto(0), "Pareto: alpha must be 0.001 to 100, got 0"),
    (lambda: LogPareto(-2), "LogPareto: g must be 0.1 to 100, got -2"),
    (lambda: LogNormal(-1), "LogNormal: db must be 0 to 300, got -1"),
    (lambda: Suzuki(0), "Suzuki: db must be 0.01 to 300, got 0"),
    (lambda: Rice(50), "Rice: k_db must be -300 to 40, got 50"),
    (lambda: FadingTable([1, 2], [0.9, 0.5]), "survival must begin with 1.*not normalised"),
    (lambda: FadingTable([1, 2], [1, 1]), "survival must be 2 positive, strictly decreasing numbers"),
    (lambda: FadingTable([1, 2], [1, 0]), "survival must be 2 positive, strictly decreasing numbers"),
    (lambda: FadingTable([0, 2], [1, 0.5]), "marks must be at least 2 positive, finite, strictly increasing"),
    (lambda: FadingTable([1, 2], [1, 0.5], tail_index=0.0), "tail_index must be positive and finite, got 0.0"),
    (lambda: FadingTable(np.arange(1, 300), np.geomspace(1, 1e-3, 299)), "marks must be at most 200, got 299"),
    (lambda: FadingTable.from_samples([1.0] * 19), "samples must be at least 20 positive, finite numbers"),
    (lambda: FadingTable.from_samples([0.0] * 30), "samples must be at least 20 positive, finite numbers"),
    (lambda: FadingFunction(lambda v: v, tail_index=1.0), "log_survival must be at most 0, nowhere rising"),
    (lambda: FadingFunction(lambda v: -np.exp(-v), tail_index=1.0), "log_survival must be at most 0, nowhere rising"),
    (lambda: FadingFunction(lambda v: v - np.inf, tail_index=1.0), "mark would always be 0"),
    (lambda: FadingFunction(lambda v: -np.exp(v), tail_index=-1.0), "tail_index must be 0 or more, or inf, got -1"),
    (lambda: FadingFunction(lambda v: -np.exp(v), tail_index=0.0), "log_mean_exists must be given"),
]


@pytest.mark.parametrize("build, message", REFUSED)
def test_refusals_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
