"""What a network refuses, and the units in which it hands on what it is made of."""

from math import inf, pi

import numpy as np
import pytest
from tokenweave_models.densification.fading import LogPareto, NoFading, Pareto, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope, StretchedExponential

DUAL = MultiSlope([0.5, 4], [10.0])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"association": "best"}, "association must be strongest or nearest, got 'best'"),
        ({"noise": -1e-9}, "noise must be a finite power of at least 0, got -1e-09"),
        ({"noise": inf}, "noise must be a finite power of at least 0, got inf"),
        ({"noise": np.nan}, "noise must be a finite power of at least 0, got nan"),
        ({"activity": 0.0}, "activity must be above 0 and at most 1, got 0"),
        ({"activity": 1.5}, "activity must be above 0 and at most 1, got 1.5"),
        (
            {"fading": Pareto(0.5)},
            r"fading must be of a tail index above 2 / \(last exponent\) = 0.5 .*r_inf_m, got 0.5",
        ),
        ({"fading": LogPareto(3)}, r"fading must be of a tail index above .*, got 0 \(logpareto:3\)"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=f"^Network: {words}"):
        Network(**{"path_loss": DUAL, "fading": Rayleigh()} | options)


def test_heavy_marks_are_welcome_in_a_disc_or_under_a_steep_far_field():
    Network(MultiSlope([0.5, 4], [10.0], r_inf_m=4e4), Pareto(0.5))
    Network(MultiSlope([0.5, 4], [10.0], r_inf_m=4e4), LogPareto(3))
    Network(MultiSlope([0.5, 5], [10.0]), Pareto(0.5))
    Network(StretchedExponential(0.1, 0.5), Pareto(0.01))
    with pytest.raises(ValueError, match="fading must be of a tail index above"):
        Network(StretchedExponential(0.1, 0.5), LogPareto(3))


@pytest.mark.parametrize("density", [0.0, -1.0, inf, np.nan])
def test_densities_are_positive_and_finite(density):
    with pytest.raises(ValueError, match="^Network: densities_per_km2 must be positive and finite, got "):
        Network(DUAL, Rayleigh()).scaled_density([1.0, density])


@pytest.mark.parametrize("density", [1e-22, 1e30])
def test_densities_that_no_sampler_takes(density):
    with pytest.raises(ValueError, match=r"such that a square of 10 m, .* has 1e-25 to 1e\+25 base stations, got "):
        Network(DUAL, Rayleigh()).scaled_density([1.0, density])


def test_density_and_noise_are_in_the_unit_of_the_path_loss():
    network = Network(DUAL, Rayleigh(), noise=1e-9)
    assert network.scaled_density([1e4])[0] == pytest.approx(1.0)  # 1 per square of 10 m
    # At 10 m the gain is 10^-0.5, so that the noise there is as strong as 10^0.5 of it at 1 m.
    assert network.scaled_noise() == pytest.approx(1e-9 * 10**0.5)


def test_a_disc_may_be_empty_and_a_plane_may_not():
    disc = Network(MultiSlope([0.5, 4], [10.0], r_inf_m=1000.0), Rayleigh())
    assert disc.empty_probability([0.5, 2.0]) == pytest.approx(np.exp([-0.5 * pi, -2.0 * pi]))
    assert Network(DUAL, Rayleigh()).empty_probability([1e-3]) == 0


def test_tables_are_built_once_for_each_range_of_densities():
    network = Network(DUAL, NoFading())
    table = network.power_table([1.0, 100.0])
    again = network.power_table([100.0, 10.0, 1.0])
    assert again.inverse.coefficients.data_ptr() == table.inverse.coefficients.data_ptr()
    other = network.power_table([1.0, 101.0])
    assert other.inverse.coefficients.data_ptr() != table.inverse.coefficients.data_ptr()
    assert network.geometry_table().far.coefficients.data_ptr() == network.geometry_table().far.coefficients.data_ptr()


def test_exponents_of_the_strongest_cell_are_not_passed_off_as_the_nearest_ones():
    light = Network(DUAL, Rayleigh(), association="nearest").regime()  # the near field decides for both
    assert light.exponents["coverage"] == pytest.approx(-3.0)
    heavy = MultiSlope([0.5, 4], [10.0]), Pareto(1.5)
    assert Network(*heavy).regime().exponents["coverage"] == pytest.approx(-0.5)
    nearest = Network(*heavy, association="nearest").regime()
    assert np.isnan(list(nearest.exponents.values())).all()
    assert any("nearest" in warning for warning in nearest.warnings)


def test_it_says_what_it_is():
    assert Network(DUAL, Rayleigh(), noise=1e-9).describe() == {
        "path_loss": "ms:0.5@10m,4",
        "fading": "rayleigh",
        "association": "strongest",
        "noise": 1e-9,
        "activity": 1.0,
    }
