"""The laws of the nearest cell: known values, one against another, quadrature of the definition, simulation."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate
from tokenweave_models.densification.exact import nearest
from tokenweave_models.densification.path_loss import MultiSlope, StretchedExponential


def dual(beta_0, r_inf_m=np.inf):
    return MultiSlope([beta_0, 4.0], [1.0], r_inf_m=r_inf_m)


def test_interference_factor():
    thresholds = np.array([1e-4, 0.1, 1.0, 10.0, 1e6])
    np.testing.assert_allclose(
        nearest.interference_factor(thresholds, 4.0), np.sqrt(thresholds) * np.arctan(np.sqrt(thresholds)), rtol=1e-12
    )
    for beta in (2.2, 3.0, 5.5):
        for t in thresholds:
            integral = integrate.quad(lambda u, b=beta: 1 / (1 + u ** (b / 2)), t ** (-2 / beta), np.inf, limit=400)[0]
            assert nearest.interference_factor(t, beta) == pytest.approx(t ** (2 / beta) * integral, rel=1e-6)


def test_known_single_slope():
    assert nearest.coverage_single_slope(1.0, 4.0) == pytest.approx(0.56010, abs=5e-6)
    assert nearest.rate_single_slope(4.0) == pytest.approx(1.48899, abs=5e-6)
    assert nearest.rate_single_slope(3.0) == pytest.approx(0.87126, abs=5e-6)


def test_rate_is_the_integral_of_coverage():
    for beta in (2.5, 4.0, 6.0):
        expected = integrate.quad(lambda t, b=beta: float(nearest.coverage_single_slope(np.expm1(t), b)), 1e-300, 60)[0]
        tail = integrate.quad(lambda t, b=beta: float(nearest.coverage_single_slope(np.expm1(t), b)), 60, 300)[0]
        assert nearest.rate_single_slope(beta) == pytest.approx(expected + tail, rel=1e-6)


@pytest.mark.parametrize("beta", [2.5, 4.0, 6.0])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("height", [0.0, 0.4])
def test_single_slope_against_the_definition(beta, noise, height):
    """Nearest distance, interference beyond it and noise, integrated by scipy."""
    density, t = 0.7, 2.0
    factor = float(nearest.interference_factor(t, beta))

    def integrand(v):
        ring = np.pi * density * np.exp(-np.pi * density * (v - height**2))
        return ring * np.exp(-np.pi * density * v * factor - t * noise * v ** (beta / 2))

    scale = min(1.0, noise ** (-2 / beta) if noise else 1.0)
    edges = height**2 + scale * np.array([0, 0.1, 0.5, 2, 10, 100, 1000])
    expected = sum(integrate.quad(integrand, a, b, epsabs=0)[0] for a, b in pairwise(edges) if integrand(a) > 0)
    value = nearest.coverage_single_slope([t, 3 * t], beta, density=density, noise=noise, height=height)
    assert value[0] == pytest.approx(expected, rel=1e-7)
    assert value[1] < value[0] or value[0] == 0


@pytest.mark.parametrize(
    "beta_0, known",
    [
        (3.0, (0.554481, 0.462837, 0.396792, 0.380976, 0.376403)),
        (1.5, (0.540788, 0.240775, 0.062341, 0.023632, 0.010127)),
    ],
)
def test_known_dual_slope(beta_0, known):
    values = nearest.coverage(dual(beta_0), [0.1, 1, 10, 100, 1e3], [1.0])[:, 0]
    np.testing.assert_allclose(values, known, atol=2e-6)
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("law", [dual(1.5), dual(0.0), dual(3.0, r_inf_m=3.0), StretchedExponential(1.0, 0.7)])
def test_any_path_loss_against_the_definition(law):
    density, t, noise = 0.8, 1.5, 0.2
    rim = min(law.r_inf, 60.0)

    def loss(r):
        return float(np.exp(min(law.log_loss(np.log(r)), 700.0)))

    def outer(r):
        points = [1.0] if r < 1 < rim else None
        inner = integrate.quad(lambda v: v / (1 + loss(v) / (t * loss(r))), r, rim, points=points, limit=200)[0]
        if law.r_inf == np.inf and law.far_exponent < np.inf:
            inner += t * loss(r) * rim**-2 / 2
        ring = 2 * np.pi * density * r * np.exp(-np.pi * density * r * r)
        return ring * np.exp(-t * noise * loss(r) - 2 * np.pi * density * inner)

    ends = (1e-6, 1.0, min(4.0, rim))
    expected = sum(integrate.quad(outer, a, b, epsrel=1e-9)[0] for a, b in pairwise(ends))
    assert nearest.coverage(law, [density], [t], noise=noise)[0, 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [2.3, 4.0, 7.0])
def test_any_path_loss_meets_single_slope(beta):
    thresholds = [0.01, 1.0, 100.0]
    for height, noise in ((0.0, 0.0), (0.0, 2.0), (0.5, 0.0)):
        law = MultiSlope([beta], height_m=height)
        unit = law.unit_m  # the height where there is one
        value = nearest.coverage(law, [0.5 * unit**2], thresholds, noise=noise)[0]
        expected = nearest.coverage_single_slope(thresholds, beta, density=0.5, noise=noise, height=height)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(
        nearest.rate(MultiSlope([beta]), [1e-3, 1.0]), nearest.rate_single_slope(beta), rtol=1e-4
    )


def test_activity_thins_interferers():
    value = nearest.coverage(MultiSlope([4.0]), [1.0], [2.0], activity=0.3)[0, 0]
    assert value == pytest.approx(1 / (1 + 0.3 * nearest.interference_factor(2.0, 4.0)), rel=1e-9)


def test_high_density():
    steep = nearest.coverage(dual(3.0), [1e7], [1.0])[0, 0]
    assert steep == pytest.approx(nearest.high_density_coverage(dual(3.0), np.inf, 1.0, 1.0), rel=1e-3)
    assert nearest.high_density_coverage(dual(3.0), np.inf, 1.0, 1.0) == pytest.approx(0.374350, abs=1e-6)

    mean_power = 2 * np.pi * (1 / 0.5 + 1 / 2)  # of beta 1.5 and 4
    law = dual(1.5)
    value = nearest.coverage(law, [1e6], [1.0])[0, 0]
    assert value == pytest.approx(nearest.high_density_coverage(law, mean_power, 1e6, 1.0), rel=0.0065)
    assert nearest.high_density_slope(law) == pytest.approx(-1 / 3)

    low, high = nearest.coverage(dual(0.8), [1e3, 1e6], [1.0])[:, 0]
    assert np.log(high / low) / np.log(1e3) == pytest.approx(nearest.high_density_slope(dual(0.8)), abs=1e-3)
    assert nearest.high_density_slope(dual(0.8)) == pytest.approx(-1.5)
    assert nearest.high_density_slope(dual(3.0)) == 0
    assert nearest.high_density_slope(dual(0.0)) == -np.inf


def test_low_density():
    for beta_0 in (0.0, 1.5, 3.0):
        value = nearest.coverage(dual(beta_0), [1e-7], [1.0])[0, 0]
        assert value == pytest.approx(nearest.low_density_limit(dual(beta_0), 1.0), abs=2e-6)
    assert nearest.low_density_limit(dual(1.5), 1.0) == pytest.approx(0.560099, abs=1e-6)


def test_area_spectral_efficiency_saturates_with_height():
    law = MultiSlope([4.0], height_m=1.0)
    densities = np.array([1.0, 10.0, 100.0, 1000.0])
    values = densities * nearest.rate(law, densities)
    np.testing.assert_allclose(values, [0.2327, 0.3056, 0.3170, 0.3182], atol=6e-5)
    assert nearest.ase_limit_with_height(4.0, 1.0) == pytest.approx(0.3183, abs=5e-5)
    assert nearest.bounded_ase_limit(law, mean_power=np.pi) == pytest.approx(nearest.ase_limit_with_height(4.0, 1.0))


def test_scaling():
    """Only density * R_1^2 counts."""
    small = nearest.coverage(MultiSlope([1.0, 4.0], [10.0]), [3.0], [1.0, 5.0])
    large = nearest.coverage(MultiSlope([1.0, 4.0], [1000.0]), [3.0], [1.0, 5.0])
    np.testing.assert_allclose(small, large, rtol=1e-12)


def test_against_simulation():
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(size=(20_000, 256)), axis=1)
    r = np.sqrt(arrivals / np.pi)
    gain = np.minimum(r**-1.5, r**-4.0)
    ratio = gain[:, 1:] / gain[:, :1]
    # Rayleigh marks averaged out; the rest of the plane by its mean.
    covered = np.exp(-np.log1p(2.0 * ratio).sum(axis=1) - 2.0 * np.pi * r[:, -1] ** -2 / gain[:, 0])
    exact = nearest.coverage(dual(1.5), [1.0], [2.0])[0, 0]
    assert abs(covered.mean() - exact) < 4 * covered.std() / np.sqrt(len(covered))


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: nearest.coverage_single_slope(1.0, 2.0),
            "exponent must be above 2, or interference is infinite; got 2",
        ),
        (lambda: nearest.interference_factor(-1.0, 4.0), "thresholds must be positive \\(linear, not dB\\), got -1"),
        (lambda: nearest.coverage(dual(1.5), [0.0], [1.0]), "densities must be positive and finite"),
        (lambda: nearest.coverage(dual(1.5), [1.0], [1.0], noise=-1.0), "noise must not be negative, got -1"),
        (
            lambda: nearest.high_density_coverage(dual(2.0), 1.0, 1.0, 1.0),
            "near exponent must be positive and not 2, got 2",
        ),
        (lambda: nearest.bounded_ase_limit(dual(1.0), 1.0), "path gain must be bounded"),
        (lambda: nearest.low_density_limit(dual(1.0, 5.0), 1.0), "plane must be infinite"),
        (lambda: nearest.ase_limit_with_height(4.0, 0.0), "height must be positive, got 0"),
        (lambda: nearest.coverage_single_slope(1.0, 4.0, noise=-1), "must not be negative, got -1"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
