"""The best density is found where there is one, with an interval that holds it, and never invented."""

import numpy as np
import pytest
from tokenweave_models.densification.exact import nearest
from tokenweave_models.densification.fading import LogNormal, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.optimum import optimum
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.samplers import Settings

BATCH = 16384
DEFICIT = MultiSlope([1.5, 4], [10.0])
DEEP = MultiSlope([0.5, 4], [10.0])


def test_with_noise_and_a_deficit_coverage_has_a_maximum():
    network = Network(DEFICIT, Rayleigh(), noise=1e-7)
    best = optimum(network, "coverage", 0.0, range_per_km2=(1.0, 1e6), num_realisations=16 * BATCH)
    assert best.kind == "interior"
    assert best.density_low < best.density_per_km2 < best.density_high < 1.2 * best.density_low
    assert best.value == pytest.approx(best.result.coverage.max(), rel=1e-3)
    assert best.value_se == pytest.approx(best.result.coverage_se.max(), rel=0.5)
    assert f"{best.density_per_km2:.4g}/km2" in best.words and "95 %" in best.words
    # Other random numbers agree within the intervals of both.
    other = optimum(network, "coverage", 0.0, range_per_km2=(3.0, 3e5), num_realisations=16 * BATCH, seed=9)
    assert other.density_low < best.density_high and best.density_low < other.density_high


def test_the_interval_holds_the_exact_maximum():
    """The nearest cell under Rayleigh fading has an exact curve."""
    network = Network(DEFICIT, Rayleigh(), association="nearest", noise=1e-7)
    best = optimum(network, "coverage", 0.0, range_per_km2=(10.0, 1e5), num_realisations=4 * BATCH)
    densities = np.geomspace(best.density_per_km2 / 2, best.density_per_km2 * 2, 401)
    exact = nearest.coverage(DEFICIT, network.scaled_density(densities), [1.0], noise=network.scaled_noise())[:, 0]
    true = densities[np.argmax(exact)]
    assert best.result.provenance["method"] == "conditional"
    assert best.density_low < true < best.density_high
    assert abs(best.value - exact.max()) < 4 * best.value_se
    formula = optimum(network, "coverage", 0.0, range_per_km2=(10.0, 1e5), method="exact")
    assert formula.density_per_km2 == pytest.approx(true, rel=5e-3)  # the grid's step is 3.5e-3
    assert formula.value == pytest.approx(exact.max(), rel=1e-6)
    assert np.isnan(formula.density_low) and "95 %" not in formula.words


def test_counts_have_a_maximum_too():
    network = Network(DEFICIT, Rayleigh(), association="nearest", noise=1e-7)
    options = {"num_realisations": 8 * BATCH, "method": "geometry", "settings": Settings(num_points=64)}
    best = optimum(network, "coverage", 0.0, range_per_km2=(100.0, 1e4), **options)
    exact = optimum(network, "coverage", 0.0, range_per_km2=(100.0, 1e4), num_realisations=4 * BATCH)
    assert best.kind == "interior"
    assert best.density_low < exact.density_high and exact.density_low < best.density_high


def test_coverage_density_has_a_maximum_in_a_deep_deficit():
    best = optimum(Network(DEEP, Rayleigh()), "coverage_density", 0.0, range_per_km2=(1.0, 1e6))
    assert best.kind == "interior"
    assert best.value == pytest.approx(best.result.coverage_density.max(), rel=1e-3)


@pytest.mark.parametrize(
    "network, quantity, threshold_db, range_per_km2, kind, words",
    [
        (Network(DEFICIT, Rayleigh()), "coverage", 0.0, (1e3, 1e6), "falls", "Without noise, more density never helps"),
        (Network(DEFICIT, Rayleigh()), "ase", None, (1.0, 1e5), "rises", "area spectral efficiency rises from 1"),
        (Network(DEFICIT, Rayleigh()), "coverage_density", 0.0, (1.0, 1e5), "rises", "Regime deficit: rho"),
        (Network(MultiSlope([4]), LogNormal(8)), "coverage", 3.0, (1.0, 1e4), "flat", "does not change beyond its"),
        (Network(DEFICIT, Rayleigh(), noise=1e-7), "coverage", 0.0, (1e4, 1e6), "falls", "With noise it must rise at"),
        (Network(DEEP, Rayleigh()), "coverage_density", 0.0, (1e-2, 1.0), "rises", "It must fall at higher densities"),
        (Network(DEEP, Rayleigh()), "coverage_density", 0.0, (1e5, 1e6), "falls", "It must rise at lower densities"),
    ],
)
def test_without_an_interior_maximum_it_says_so_and_why(network, quantity, threshold_db, range_per_km2, kind, words):
    found = optimum(network, quantity, threshold_db, range_per_km2=range_per_km2, num_realisations=4 * BATCH)
    assert found.kind == kind
    assert np.isnan([found.density_per_km2, found.density_low, found.value]).all()
    assert words in found.words and "no maximum inside" in found.words


@pytest.mark.parametrize(
    "quantity, threshold_db, range_per_km2, words",
    [
        ("rate", None, (1.0, 10.0), "quantity must be coverage, coverage_density, ase, got 'rate'"),
        ("ase", 0.0, (1.0, 10.0), "threshold_db must be left out for ase, got 0"),
        ("coverage", None, (1.0, 10.0), "threshold_db must be given for coverage, got None"),
        ("coverage", 0.0, (10.0, 1.0), "range_per_km2 must be two ascending densities, got 10.0, 1.0"),
    ],
)
def test_bad_arguments_are_refused(quantity, threshold_db, range_per_km2, words):
    with pytest.raises(ValueError, match=f"^optimum: {words}"):
        optimum(Network(DEFICIT, Rayleigh()), quantity, threshold_db, range_per_km2=range_per_km2)
