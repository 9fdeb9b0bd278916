"""Every row of the table of regimes, its constants, words and warnings."""

import json
from dataclasses import asdict
from math import gamma, inf, isnan, pi

import numpy as np
import pytest
from tokenweave_models.densification.exact import saturation, strongest
from tokenweave_models.densification.fading import (
    FadingTable,
    Gamma,
    LogNormal,
    LogPareto,
    NoFading,
    Pareto,
    Product,
    Rayleigh,
    Weibull,
)
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.power_measure import PowerMeasure
from tokenweave_models.densification.regime import METRICS, Regime, classify


def dual(beta_0, r_inf_m=inf):
    return MultiSlope([beta_0, 4.0], [1.0], r_inf_m=r_inf_m)


@pytest.mark.parametrize(
    "beta_0, fading, r_inf_m, name, rho, exponents",
    [
        (0.0, LogPareto(2.0), 100.0, "growth", 0.0, (0, None, 1, None)),
        (3.0, Rayleigh(), inf, "saturation", 2 / 3, (0, 0, 1, 1)),
        (0.0, Pareto(0.6), inf, "saturation", 0.6, (0, 0, 1, 1)),
        (2.0, Rayleigh(), inf, "boundary", 1.0, (None, None, None, None)),
        (0.0, Pareto(1.0), inf, "boundary", 1.0, (None, None, None, None)),
        (1.5, Rayleigh(), inf, "deficit", 4 / 3, (-1 / 3, -1 / 4, 2 / 3, 3 / 4)),
        (0.0, Pareto(1.5), inf, "deficit", 1.5, (-0.5, -1 / 3, 0.5, 2 / 3)),
        (1.0, Rayleigh(), inf, "deficit", 2.0, (-1, -0.5, 0, 0.5)),
        (0.5, Rayleigh(), inf, "deficit", 4.0, (-3, -0.75, -2, 0.25)),
        (0.5, Pareto(2.0), inf, "deficit", 2.0, (-1, -0.5, 0, 0.5)),
        (0.0, Rayleigh(), inf, "deficit", inf, (-inf, None, -inf, None)),
        (0.0, NoFading(), inf, "deficit", inf, (-inf, -1, -inf, 0)),
    ],
)
def test_rows(beta_0, fading, r_inf_m, name, rho, exponents):
    regime = classify(dual(beta_0, r_inf_m), fading)
    assert regime.name == name
    assert regime.rho == pytest.approx(rho)
    assert name in regime.words
    for metric, exponent in zip(METRICS, exponents, strict=True):
        found = regime.exponents[metric]
        assert isnan(found) if exponent is None else found == pytest.approx(exponent)


def test_height_makes_the_near_field_flat():
    assert classify(MultiSlope([3.0], height_m=1.0), Rayleigh()).rho == inf
    assert classify(MultiSlope([3.0]), Rayleigh()).rho == pytest.approx(2 / 3)


def test_constants():
    regime = classify(dual(1.5), Rayleigh())
    assert regime.kappa == pytest.approx(pi * gamma(1 + 4 / 3))
    assert regime.mean_power == pytest.approx(5 * pi)
    heavy = classify(dual(0.0), Pareto(1.5))
    assert heavy.kappa == pytest.approx(2 * pi * (1 / 2 + 1 / 4))  # integral of r l^-1.5
    assert heavy.mean_power == pytest.approx(3 * 2 * pi)
    assert isnan(classify(dual(0.0), Rayleigh()).kappa)
    assert classify(dual(3.0), Rayleigh()).mean_power == inf


@pytest.mark.parametrize(
    "beta_0, fading, coverage, rate, coverage_tolerance",  # the limits, evaluated at 1e6 per u^2
    [
        (1.5, Rayleigh(), 9.51e-4, 0.0196, 0.01),
        (1.2, Rayleigh(), 8.69e-6, 2.04e-3, 0.005),
        (0.0, Pareto(1.5), 5.76e-5, 4.00e-3, 0.02),
        (0.5, Rayleigh(), 2.61e-20, 1.56e-5, 1e-3),
    ],
)
def test_deficit_limits(beta_0, fading, coverage, rate, coverage_tolerance):
    law = dual(beta_0)
    regime, measure = classify(law, fading), PowerMeasure(law, fading)
    limit = float(strongest.deficit_coverage(regime, 1e6, 1.0))
    assert limit == pytest.approx(coverage, rel=2e-3)
    assert float(strongest.deficit_rate(regime, 1e6)) == pytest.approx(rate, rel=5e-3)
    assert strongest.coverage(measure, 1e6, [1.0])[0] == pytest.approx(limit, rel=coverage_tolerance)
    assert strongest.mean_share(measure, 1e6) == pytest.approx(float(strongest.deficit_rate(regime, 1e6)), rel=1e-6)


def test_bounded_gain_with_rayleigh_fading():
    measure = PowerMeasure(dual(0.0), Rayleigh())
    limit = (np.log(1e6 * pi) + np.euler_gamma) / (1e6 * measure.mean_power)
    assert limit == pytest.approx(2.473e-6, rel=1e-3)
    assert strongest.mean_share(measure, 1e6) == pytest.approx(limit, rel=5e-3)
    assert strongest.rate(measure, 1e6) == pytest.approx(limit, rel=5e-3)


def test_saturation_limit():
    measure = PowerMeasure(dual(3.0), Rayleigh())
    assert strongest.coverage(measure, 1e6, [1.0])[0] == pytest.approx(float(saturation.coverage(2 / 3, 1.0)), rel=1e-3)
    heavy = PowerMeasure(dual(0.0, 100.0), Pareto(0.5))
    assert strongest.coverage(heavy, 100.0, [1.0])[0] == pytest.approx(0.63662, rel=1e-3)
    assert strongest.rate(heavy, 1e4) == pytest.approx(1.60062, rel=1e-4)


def test_light_tails_in_words():
    def growth(fading):
        return classify(dual(0.0), fading).laws["ase"]

    assert growth(NoFading()) == "~ constant"
    assert growth(Rayleigh()) == "~ ln density"
    assert growth(Gamma(3.0)) == "~ ln density"
    assert growth(Weibull(0.5)) == "~ (ln density)^2"
    assert growth(Weibull(2.0)) == "~ (ln density)^0.5"
    shadowing = LogNormal(8.0)
    assert growth(shadowing) == f"~ exp({shadowing.sigma:.2g} sqrt(2 ln density))"
    assert growth(Rayleigh() * LogNormal(8.0)).startswith("~ exp(")


def warnings(law, fading):
    return " | ".join(classify(law, fading).warnings)


def test_warnings():
    assert "logarithmically" in warnings(dual(2.0), Rayleigh())
    assert "close to 1" in warnings(dual(1.9), Rayleigh())
    assert "up to a logarithmic factor" in warnings(dual(4 / 3), Pareto(1.5))
    assert "the rate is infinite at every density" in warnings(dual(0.0, 100.0), LogPareto(1.0))
    assert classify(dual(0.0, 100.0), LogPareto(1.0)).laws["rate"] == "infinite at every density"
    fitted = FadingTable([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [1, 0.3, 0.1, 0.03, 0.01, 0.003])
    assert "is a fit to the largest marks" in warnings(dual(0.0), fitted)
    assert "is a fit to the largest marks" in warnings(dual(0.0), Product(Rayleigh(), Product(fitted, Rayleigh())))
    assert "is a fit" not in warnings(dual(0.0), Product(fitted, Pareto(fitted.tail_index / 2)))
    assert "the rate has no variance" in warnings(dual(0.0, 100.0), Product(LogPareto(2.0), Rayleigh()))
    assert "no variance" not in warnings(dual(0.0, 100.0), LogPareto(2.1))
    assert warnings(dual(0.5), Rayleigh()) == ""


def test_moments():
    moments = classify(dual(1.5), Rayleigh()).moments
    assert moments["E[m^(2/4)], interference is finite"] == pytest.approx(gamma(1.5))
    assert moments["E[m^1.333], scale of the strongest power"] == pytest.approx(gamma(7 / 3))
    assert moments["E ln(1 + m) is finite, rate exists"] == 1
    assert classify(dual(0.0, 9.0), LogPareto(1.0)).moments["E ln(1 + m) is finite, rate exists"] == 0


def test_ties_have_no_constant():
    regime = classify(dual(4 / 3), Pareto(1.5))
    assert regime.rho == pytest.approx(1.5)
    assert isnan(regime.kappa)
    assert "alike" in regime.words
    with pytest.raises(ValueError, match="constant kappa .* must be known, got nan"):
        strongest.deficit_rate(regime, 1.0)


def test_survives_json():
    regime = classify(dual(0.0), Rayleigh())
    again = Regime(**json.loads(json.dumps(asdict(regime))))
    assert str(again) == str(regime)


def test_unit_does_not_matter():
    one, other = classify(dual(1.5), Rayleigh()), classify(MultiSlope([1.5, 4.0], [250.0]), Rayleigh())
    assert one.kappa == pytest.approx(other.kappa)
    assert one.mean_power == pytest.approx(other.mean_power)
