"""Values of sample_power_domain, sample_geometry and rayleigh_conditional against the float64 reference, on every
backend, with derived tolerances: samples one by one, sums batch by batch, histograms up to every bin."""

from __future__ import annotations

import pytest
import torch
from sinr_oracle import (
    DB,
    GEOMETRY_NETWORKS,
    OPS,
    POWER_NETWORKS,
    check,
    geometry_network,
    power_network,
    reference,
    sample,
)

from tokenweave_ops import SinrGrid
from tokenweave_ops.sinr_field import HISTOGRAM_BINS, RESIDUALS

GRID = SinrGrid.make([0.3, 1.0, 10.0], [0.1, 1.0, 10.0])
HIGH = SinrGrid.make([0.3, 1.0, 10.0], [1.0, 3.0, 100.0])  # rayleigh_conditional for the strongest cell
FAR_AWAY = 2**34  # a realisation whose number needs more than 32 bits
POINTS = {"num_points": 32}


def network(op: str):
    return power_network("4") if op == "sample_power_domain" else geometry_network("4")


def size(op: str) -> dict:
    return {} if op == "sample_power_domain" else POINTS


# ------------------------------------------------------------------------------------------------- sample_power_domain


@pytest.mark.parametrize("name", POWER_NETWORKS)
def test_power_domain_of_a_network(backend, name):
    check(backend, "sample_power_domain", power_network(name), GRID, num_realisations=1025, seed=1)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("num_terms", [4, 16, 64])
@pytest.mark.parametrize("name", ["2.5", "flat"])
def test_power_domain_terms_and_residual(backend, name, num_terms, residual):
    options = {"num_terms": num_terms, "residual": residual, "num_realisations": 300, "seed": 2}
    check(backend, "sample_power_domain", power_network(name), GRID, **options)


@pytest.mark.parametrize("rate_nodes", [0, 1, 3, 16])
@pytest.mark.parametrize("name", ["3", "20", "disc"])
def test_power_domain_rate_nodes(backend, name, rate_nodes):
    options = {"rate_nodes": rate_nodes, "num_realisations": 300, "noise": 0.1, "seed": 3}
    check(backend, "sample_power_domain", power_network(name), GRID, **options)


@pytest.mark.parametrize("num_terms", [4, 16])
def test_power_domain_of_an_empty_disc(backend, num_terms):
    """At density 0.1 three in four realisations have no station, and at 0.3 many have one."""
    grid = SinrGrid.make([0.1, 0.3, 3.0], [0.1, 10.0])
    for noise in (0.0, 0.5):
        options = {"num_terms": num_terms, "num_realisations": 513, "seed": 4, "noise": noise}
        result = check(backend, "sample_power_domain", power_network("disc"), grid, **options)
        no_signal = result.samples[0, :, 0] == -torch.inf
        assert 0.6 < no_signal.double().mean() < 0.85
        assert (result.samples[0, no_signal, 1] == -torch.inf).all()
        assert result.inverse_sinr.mean[0] == torch.inf
        assert result.histogram[0, 0] == no_signal.sum()
        if noise == 0.0:
            alone = (result.samples[0, :, 0] > -torch.inf) & (result.samples[0, :, 1] == -torch.inf)
            assert alone.any() and result.histogram[0, HISTOGRAM_BINS - 1] >= alone.sum()
            assert result.rate.mean[0] == torch.inf


@pytest.mark.parametrize("activity", [0.3, 1e-3, 2.0**-33])
def test_power_domain_with_heavy_powers_and_idle_cells(backend, activity):
    """Path loss r^100: neighbouring powers are dozens of octaves apart, and the second strongest is often idle."""
    table = power_network("100")
    options = {"num_realisations": 300, "activity": activity, "seed": 6}
    for residual in ("none", "gauss"):
        check(backend, "sample_power_domain", table, GRID, residual=residual, **options)


# ----------------------------------------------------------------------------------------------------- sample_geometry


def test_power_domain_of_a_slowly_varying_tail(backend):
    """Powers of 2^(10^10): SINR beyond all that fp32 could hold as a number."""
    grid = SinrGrid.make([1.0, 100.0], [1.0, 100.0, 1e18])
    for activity in (1.0, 0.3):
        options = {"residual": "none", "num_terms": 64, "num_realisations": 300, "activity": activity, "seed": 13}
        result = check(backend, "sample_power_domain", power_network("log-Pareto"), grid, **options)
        assert (result.samples[1, :, 0] - result.samples[1, :, 1]).median() > 200


@pytest.mark.parametrize("association", ["strongest", "nearest"])
def test_geometry_of_a_slowly_varying_tail(backend, association):
    grid = SinrGrid.make([1.0, 100.0], [1.0, 100.0, 1e18])
    for activity in (1.0, 0.3):
        options = {"residual": "none", "num_realisations": 300, "activity": activity, "seed": 13, **POINTS}
        table = geometry_network("log-Pareto")
        result = check(backend, "sample_geometry", table, grid, association=association, **options)
        assert (result.samples[1, :, 0] - result.samples[1, :, 1]).abs().median() > 10


@pytest.mark.parametrize("association", ["strongest", "nearest"])
@pytest.mark.parametrize("name", GEOMETRY_NETWORKS)
def test_geometry_of_a_network(backend, name, association):
    options = {"association": association, "num_realisations": 513, "seed": 1, **POINTS}
    check(backend, "sample_geometry", geometry_network(name), GRID, **options)


@pytest.mark.parametrize("association", ["strongest", "nearest"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("num_points", [4, 16, 256])
def test_geometry_points_and_residual(backend, num_points, residual, association):
    options = {"num_points": num_points, "residual": residual, "num_realisations": 150, "seed": 2}
    check(backend, "sample_geometry", geometry_network("2.5"), GRID, association=association, **options)


def test_geometry_of_very_many_points(backend):
    options = {"num_points": 4096, "num_realisations": 33, "seed": 3}
    check(backend, "sample_geometry", geometry_network("3"), GRID, **options)


@pytest.mark.parametrize("association", ["strongest", "nearest"])
def test_geometry_of_an_empty_disc(backend, association):
    grid = SinrGrid.make([0.1, 0.3, 3.0], [0.1, 10.0])
    for noise in (0.0, 0.5):
        options = {"num_realisations": 513, "seed": 4, "noise": noise, "association": association, **POINTS}
        result = check(backend, "sample_geometry", geometry_network("disc"), grid, **options)
        no_signal = result.samples[0, :, 0] == -torch.inf
        assert 0.6 < no_signal.double().mean() < 0.85
        assert result.inverse_sinr.mean[0] == torch.inf
        assert result.histogram[0, 0] == no_signal.sum()


# ------------------------------------------------------------------------------------------------ rayleigh_conditional


@pytest.mark.parametrize("association", ["nearest", "strongest"])
@pytest.mark.parametrize("name", ["4", "2.5", "8", "dual slope", "height", "height, tabulated", "min distance", "disc"])
def test_rayleigh_conditional_of_a_network(backend, name, association):
    grid = GRID if association == "nearest" else HIGH
    options = {"association": association, "num_realisations": 300, "seed": 1, **POINTS}
    for noise in (0.0, 0.7):
        check(backend, "rayleigh_conditional", geometry_network(name), grid, noise=noise, **options)


@pytest.mark.parametrize("association", ["nearest", "strongest"])
@pytest.mark.parametrize("num_points", [4, 16, 64])
def test_rayleigh_conditional_points(backend, num_points, association):
    """Few points and high thresholds: what lies beyond the points is no small correction."""
    grid = SinrGrid.make([0.3, 10.0], [1.0, 10.0, 1e4])
    options = {"num_points": num_points, "association": association, "num_realisations": 150, "seed": 2}
    check(backend, "rayleigh_conditional", geometry_network("3"), grid, **options)


def test_rayleigh_conditional_of_very_many_points(backend):
    options = {"num_points": 4096, "num_realisations": 33, "seed": 3}
    check(backend, "rayleigh_conditional", geometry_network("3"), GRID, **options)


# -------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("noise", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("op", OPS)
def test_noise(backend, op, noise):
    check(backend, op, network(op), GRID, num_realisations=300, noise=noise, seed=5, **size(op))


@pytest.mark.parametrize("activity", [0.3, 1e-3, 2.0**-33])
@pytest.mark.parametrize("op", OPS[:2])
def test_activity(backend, op, activity):
    """Of 2^-33: no interferer sends, only the residual is left."""
    for residual in RESIDUALS:
        options = {"num_realisations": 300, "activity": activity, "residual": residual, "seed": 6}
        check(backend, op, network(op), GRID, **options, **size(op))


@pytest.mark.parametrize("activity", [0.3, 1e-3])
def test_activity_of_the_nearest(backend, activity):
    options = {"num_realisations": 300, "activity": activity, "association": "nearest", "seed": 7, **POINTS}
    check(backend, "sample_geometry", geometry_network("4"), GRID, **options)


@pytest.mark.parametrize("num_realisations", [1, 31, 255, 1023, 1025, 16385])
@pytest.mark.parametrize("op", OPS)
def test_num_realisations(backend, op, num_realisations):
    """Cells and batches that are not full."""
    grid = SinrGrid.make([1.0], [2.0])
    result = check(backend, op, network(op), grid, num_realisations=num_realisations, seed=8, **size(op))
    assert result.sums.shape[0] == (num_realisations + 16383) // 16384
    assert result.histogram.sum() == num_realisations


def grid_of(num_densities: int, num_thresholds: int) -> SinrGrid:
    return SinrGrid.make([1.3**i for i in range(num_densities)], [1.5**i / 20 for i in range(num_thresholds)])


@pytest.mark.parametrize("num_thresholds", [0, 1, 37])
@pytest.mark.parametrize("num_densities", [1, 3, 9, 17])
@pytest.mark.parametrize("op", OPS)
def test_grid_sizes(backend, op, num_densities, num_thresholds):
    """More than any kernel takes at once."""
    grid = grid_of(num_densities, num_thresholds or (8 if op == "rayleigh_conditional" else 0))
    check(backend, op, network(op), grid, num_realisations=70, noise=0.05, seed=9, **size(op))


@pytest.mark.no_launch
def test_rayleigh_conditional_without_thresholds(backend):
    result = sample(backend, OPS[2], network(OPS[2]), grid_of(3, 0), num_realisations=20_000, keep_samples=True)
    assert result.sums.shape == (2, 3, 0, 2) and result.samples.shape == (3, 0, 20_000)
    assert result.histogram.shape == (3, 0, 256)


@pytest.mark.parametrize("num_thresholds", [0, 37])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.no_launch
def test_no_densities(backend, op, num_thresholds):
    result = sample(backend, op, network(op), grid_of(0, num_thresholds), num_realisations=20_000, **size(op))
    assert result.sums.shape[:2] == (2, 0) and result.histogram.shape[0] == 0 and result.samples.shape[0] == 0
    assert result.coverage.mean.shape == (0, num_thresholds)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**32])
@pytest.mark.parametrize("op", OPS)
def test_seeds_and_high_realisation_numbers(backend, op, seed):
    options = {"num_realisations": 64, "first_realisation": FAR_AWAY, "seed": seed}
    check(backend, op, network(op), GRID, **options, **size(op))


@pytest.mark.parametrize("op", OPS)
def test_lookups_outside_of_the_tables(backend, op):
    """The ends of a table go on for ever: densities and thresholds that it was not made for."""
    grid = SinrGrid.make([1e-25, 1e-12, 1e9, 1e15, 1e25], [1e-18, 1.0, 1e18])
    check(backend, op, network(op), grid, num_realisations=150, seed=10, **size(op))


@pytest.mark.parametrize(("op", "name"), [(OPS[0], "20"), (OPS[0], "flat"), (OPS[1], "8")])
def test_the_ends_of_the_histogram(backend, op, name):
    """SINRs beyond 64 octaves fall into the outer bins."""
    table = power_network(name) if op == "sample_power_domain" else geometry_network(name)
    grid = SinrGrid.make([0.3, 100.0], [1.0])
    ends = []
    for noise in (0.0, 1e-35, 1e35):
        counts = check(backend, op, table, grid, num_realisations=600, noise=noise, seed=11, **size(op)).histogram
        ends.append((counts[:, 0].sum().item(), counts[:, -1].sum().item()))
    assert ends[2][0] > 0, "below 2^-64"
    assert name != "20" or ends[0][1] > 0, "above 2^64"


@pytest.mark.parametrize("name", ["2.5", "3", "4", "8"])
@pytest.mark.parametrize("op", OPS[:2])
def test_sir_to_2e_5_db(backend, op, name):
    """What the contract says of the arithmetic as a whole, for moderate path-loss exponents."""
    table = power_network(name) if op == "sample_power_domain" else geometry_network(name)
    options = {"num_realisations": 1000, "seed": 12, **size(op)}
    result = sample(backend, op, table, GRID, keep_samples=True, **options)
    sir = (result.samples[..., 0] - result.samples[..., 1]).double()
    assert ((sir - getattr(reference, op)(table, GRID, **options).log2_sinr).abs() * DB).max() < 2e-5
