"""The saturation law: known values, its pieces against each other, and against 60-digit arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from tokenweave_models.densification.exact import saturation

DELTAS = (0.02, 0.1, 0.3, 0.5, 2 / 3, 0.8, 0.95, 0.98)


@pytest.mark.parametrize(
    "delta, known",
    [(0.5, (0.99983, 0.98810, 0.84570, 0.63662, 0.20132)), (2 / 3, (0.99145, 0.91045, 0.63349, 0.41350, 0.08909))],
)
def test_known_coverage(delta, known):
    np.testing.assert_allclose(saturation.coverage(delta, [0.1, 0.2, 0.5, 1, 10]), known, atol=6e-6)


@pytest.mark.parametrize("delta, known", [(0.3, 3.09307), (0.5, 1.60062), (2 / 3, 0.96013), (0.95, 0.18580)])
def test_known_rate(delta, known):
    assert saturation.rate(delta) == pytest.approx(known, abs=6e-6)


@pytest.mark.parametrize(
    "delta, threshold, known",  # Euler inversion with 460 terms in 60 digits
    [
        (0.02, 0.01, 2.1851553375046e-233),
        (0.02, 0.2, 6.0470425660056e-13),
        (0.02, 0.49, 3.5795699621472e-6),
        (0.1, 0.1, 7.1583453145118e-15),
        (0.1, 0.49, 0.00063588167359525),
        (0.5, 0.05, 3.251583589411e-8),
        (0.5, 0.2, 0.011902000822174),
        (0.5, 0.49, 0.14900821185053),
        (0.8, 0.01, 2.2916835919765e-11),
        (0.8, 0.4, 0.53069409265004),
        (0.98, 0.01, 0.12994966218223),
        (0.98, 0.4, 0.95007768011643),
    ],
)
def test_outage_against_many_digits(delta, threshold, known):
    assert saturation.outage(delta, threshold) == pytest.approx(known, rel=1e-4, abs=0)
    assert saturation.outage(delta, threshold) == pytest.approx(known, abs=3e-8)


@pytest.mark.parametrize("delta", DELTAS)
def test_inversion_meets_closed_forms(delta):
    # Both are valid from 1/2 to 1; at 1 and above the law has a corner, where the inversion is worst.
    thresholds = np.array([0.5, 0.55, 0.6])
    inverted = 1 - saturation._tilted(delta, thresholds)
    np.testing.assert_allclose(inverted, saturation.coverage(delta, thresholds), atol=1e-6)


@pytest.mark.parametrize("delta", DELTAS)
def test_rate_is_the_integral_of_coverage(delta):
    # P(SIR > y) dy / (1 + y); above y = 1 in t = ln y, where it is a power.
    def below(y):
        return saturation.coverage(delta, y) / (1 + y)

    places, weights = np.polynomial.legendre.leggauss(40)
    low = sum((b - a) / 2 * (weights @ below(a + (b - a) * (1 + places) / 2)) for a, b in ((1e-9, 0.5), (0.5, 1)))
    high = integrate.quad(lambda t: np.exp(-delta * t) * np.sinc(delta) / (1 + np.exp(-t)), 0, np.inf)[0]
    assert low + high == pytest.approx(saturation.rate(delta), rel=2e-5)


def test_mean_inverse_sir():
    """E Z from the outage, 1 at beta = 4: the integral of P(Z > z)."""
    for delta in (0.5, 2 / 3, 0.8):
        z, weights = np.polynomial.legendre.leggauss(16)
        edges = np.array([1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 1, 2, 4, 8, 16, 40, 100, 200])
        half = np.diff(edges)[:, None] / 2
        values = saturation.outage(delta, 1 / (edges[:-1, None] + half * (1 + z)))
        assert (half * weights * values).sum() == pytest.approx(saturation.mean_inverse_sir(delta), rel=1e-4)
    assert saturation.mean_inverse_sir(0.5) == 1
    assert saturation.mean_inverse_sir(2 / 3) == pytest.approx(2)
    assert saturation.mean_inverse_sir(0.8) == pytest.approx(4)


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9])
def test_laplace_against_quadrature(delta):
    for s in (1e-6, 0.3, 5.0, 59.9, 60.1, 500.0):
        # The singular end is integrated by hand: (1 - exp(-s u)) u^(-delta - 1) ~ s u^-delta.
        end = 1e-9 / s
        start = s * end ** (1 - delta) / (1 - delta)
        log_integral = integrate.quad(
            lambda t, s=s: -np.expm1(-s * np.exp(t)) * np.exp(-delta * t), np.log(end), 0, limit=500, epsabs=0
        )[0]
        expected = 1 / (1 + delta * (start + log_integral))
        assert saturation.laplace(delta, s) == pytest.approx(expected, rel=1e-9)


def test_against_simulation():
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(size=(40_000, 200)), axis=1)
    beyond = arrivals[:, -1] / (1 / 0.4 - 1)  # mean of the powers left out, relative to the last
    ratios = (arrivals / arrivals[:, :1]) ** -2.5
    z = ratios[:, 1:].sum(axis=1) + ratios[:, -1] * beyond
    for y in (0.15, 0.3, 0.45, 0.7, 2.0):
        exact = float(saturation.coverage(0.4, y))
        error = np.sqrt(exact * (1 - exact) / len(z))
        assert abs((z < 1 / y).mean() - exact) < 4 * error


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.97), st.floats(-3, 6), st.floats(0.01, 1))
def test_monotone_in_threshold_and_delta(delta, log10_y, step):
    y = 10.0**log10_y
    here = saturation.coverage(delta, y)
    assert 0 < here <= 1
    assert saturation.coverage(delta, y * (1 + step)) <= here + 1e-8
    assert saturation.coverage(min(delta + step * 0.01, 0.98), y) <= here + 1e-8
    assert saturation.rate(min(delta + step * 0.01, 0.98)) < saturation.rate(delta)


@pytest.mark.filterwarnings("error")
def test_thresholds_next_to_0_are_covered():
    np.testing.assert_array_equal(saturation.coverage(0.5, [1e-300, 1e-100, 1e-17, 1e-5]), 1.0)


def test_shapes_and_many_thresholds():
    thresholds = np.geomspace(1e-3, 1e6, 900).reshape(3, 300)
    values = saturation.coverage(0.4, thresholds)
    assert values.shape == (3, 300)
    assert (np.diff(values.ravel()) <= 0).all()
    assert saturation.coverage(0.4, thresholds[2, 7]) == values[2, 7]


def test_outage_decays_at_its_root():
    for delta in (0.3, 0.5, 0.9):
        low, high = saturation.outage(delta, [1 / 60, 1 / 61])
        assert np.log(low / high) == pytest.approx(saturation.outage_decay(delta), rel=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.5, 1.5, np.nan])
def test_refuses_delta(delta):
    for function in (saturation.rate, saturation.mean_inverse_sir, saturation.outage_decay):
        with pytest.raises(ValueError, match="delta must be between 0 and 1, got"):
            function(delta)
    with pytest.raises(ValueError, match="delta must be between 0 and 1, got"):
        saturation.coverage(delta, 1.0)


def test_refuses_thresholds():
    with pytest.raises(ValueError, match="thresholds must be positive \\(linear, not dB\\), got -3"):
        saturation.coverage(0.5, [1.0, -3.0])
    with pytest.raises(ValueError, match="s must be real and not negative, got -1"):
        saturation.laplace(0.5, -1.0)
