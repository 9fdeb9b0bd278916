"""What follows from a sweep's means, and that files give back what was put into them."""

import csv
import json
from dataclasses import replace
from math import inf, log, nan

import numpy as np
import pytest
from tokenweave_models.densification.accumulate import Groups
from tokenweave_models.densification.fading import Pareto, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope
from tokenweave_models.densification.regime import classify
from tokenweave_models.densification.result import Result
from tokenweave_models.densification.sweep import sweep

BATCH = 16384


def power_law_result(exponent, noise=0.0, groups=32, seed=0, regime=None):
    """Coverage and rate that are powers of density, with errors that all densities share."""
    densities = np.geomspace(1.0, 1e6, 25)
    errors = 1 + noise * np.random.default_rng(seed).normal(size=(groups, 1, 2))
    tilts = (densities[None, :, None] / 1e5) ** (noise * np.random.default_rng(seed + 1).normal(size=(groups, 1, 2)))
    exponents = np.array([exponent + 0.25, exponent])  # of rate and of coverage
    sums = densities[None, :, None] ** exponents * errors * tilts * BATCH
    sizes = np.full(groups, BATCH)
    means = Groups(sums, sizes).means
    return Result(
        densities_per_km2=densities,
        thresholds_db=np.array([0.0]),
        coverage=means[:, 1:],
        coverage_se=0.01 * means[:, 1:],
        rate_nats=means[:, 0],
        rate_se=0.01 * means[:, 0],
        truncation_bias_bound=np.full(25, 1e-4),
        histogram=np.zeros((25, 512), dtype=np.int64),
        groups=Groups(sums, sizes),
        regime=regime or classify(MultiSlope([1.5, 4], [10.0]), Rayleigh()),
        provenance={"method": "power", "seed": 1},
    )


def test_products_and_units():
    result = power_law_result(-0.5)
    density = result.densities_per_km2
    np.testing.assert_allclose(result.coverage_density[:, 0], density * result.coverage[:, 0])
    np.testing.assert_allclose(result.coverage_density_se[:, 0], density * result.coverage_se[:, 0])
    np.testing.assert_allclose(result.ase, density * result.rate_nats)
    np.testing.assert_allclose(result.ase_se, density * result.rate_se)
    np.testing.assert_allclose(result.rate_bits * log(2), result.rate_nats)
    np.testing.assert_allclose(result.ase_bits * log(2), result.ase)


def test_slopes_are_fitted_over_the_last_two_decades_and_judged():
    result = power_law_result(-1 / 3)  # rho = 4/3: coverage falls with -1/3, the rate with -1/4
    bent = result.groups.sums.copy()
    bent[:, result.densities_per_km2 < 0.99e4] = 1e-9 * BATCH  # what came before must not matter
    slopes = replace(result, groups=Groups(bent, result.groups.sizes)).slopes()
    assert [slope.quantity for slope in slopes] == ["coverage", "rate", "coverage_density", "ase"]
    assert [slope.threshold_db for slope in slopes] == [0.0, None, 0.0, None]
    for slope, value in zip(slopes, (-1 / 3, -1 / 12, 2 / 3, 11 / 12), strict=True):
        assert slope.value == pytest.approx(value, abs=1e-9)
    assert [slope.predicted for slope in slopes] == pytest.approx([-1 / 3, -1 / 4, 2 / 3, 3 / 4])
    assert [slope.verdict for slope in slopes] == ["agrees", "differs", "agrees", "differs"]


def test_intervals_of_slopes_hold_the_true_one():
    held = 0
    for seed in range(200):
        slope = power_law_result(-1 / 3, noise=0.05, seed=2 * seed).slopes()[0]
        held += slope.low <= -1 / 3 <= slope.high
        assert slope.high - slope.low == pytest.approx(2 * 2.04 * slope.standard_error, rel=0.01)
        assert 0.005 < slope.standard_error < 0.015  # the tilt's 0.05 over the root of 32 groups
    assert 180 <= held <= 198


def test_without_groups_or_values_nothing_is_claimed():
    result = power_law_result(-1 / 3)
    one = replace(result, groups=Groups(result.groups.sums[:1], result.groups.sizes[:1])).slopes()[0]
    assert one.value == pytest.approx(-1 / 3) and np.isnan(one.standard_error) and one.verdict == "agrees"
    empty = replace(result, groups=Groups(0 * result.groups.sums, result.groups.sizes)).slopes()[0]
    assert np.isnan(empty.value) and empty.verdict == "not measured"
    light = power_law_result(-1 / 3, regime=classify(MultiSlope([0, 4], [10.0]), Rayleigh()))
    assert light.slopes()[0].predicted == -inf and light.slopes()[0].verdict == "no power law"


@pytest.fixture(scope="module")
def swept():
    network = Network(MultiSlope([1.5, 4], [10.0]), Rayleigh(), noise=1e-9)
    options = {"num_realisations": 3 * BATCH, "seed": 5, "command": "sweep", "date": "2026-01-02"}
    return sweep(network, np.geomspace(1e4, 1e8, 9), [0.0, 3.0], **options)


def test_slopes_of_a_sweep_agree_with_the_regime(swept):
    by_name = {(slope.quantity, slope.threshold_db): slope for slope in swept.slopes()}
    coverage = by_name["coverage", 0.0]
    assert coverage.predicted == pytest.approx(-1 / 3)
    assert coverage.verdict == "agrees" and coverage.low < coverage.value < coverage.high
    assert abs(coverage.value + 1 / 3) < 0.05 and 0 < coverage.standard_error < 0.02


def test_groups_hold_what_the_means_are_made_of(swept):
    np.testing.assert_allclose(swept.groups.means[:, 0], swept.rate_nats, rtol=1e-12)
    np.testing.assert_allclose(swept.groups.means[:, 1:], swept.coverage, rtol=1e-12)
    assert swept.groups.sizes.tolist() == [BATCH] * 3


def test_a_slope_that_theory_forbids_differs(swept):
    other = replace(swept, regime=classify(MultiSlope([3, 4], [10.0]), Rayleigh()))
    assert other.slopes()[0].verdict == "differs"


def test_the_ccdf_of_the_histogram_meets_the_coverage(swept):
    edges_db, share, error = swept.sinr_ccdf()
    assert edges_db[0] == pytest.approx(-63.75 * 10 * np.log10(2)) and edges_db.shape == (511,)
    at_0_db = int(np.argmin(np.abs(edges_db)))
    assert edges_db[at_0_db] == pytest.approx(0)
    gap = np.abs(share[:, at_0_db] - swept.coverage[:, 0])
    assert (gap < 4 * np.maximum(error[:, at_0_db], 1 / (3 * BATCH)) + 4 * swept.coverage_se[:, 0]).all()
    assert (np.diff(share, axis=1) <= 0).all()
    with pytest.raises(ValueError, match="the method power leaves no histogram"):
        power_law_result(-1).sinr_ccdf()


def test_npz_gives_back_every_bit(swept, tmp_path):
    path = tmp_path / "run.npz"
    swept.save(path)
    loaded = Result.load(path)
    for name in ("densities_per_km2", "thresholds_db", "coverage", "coverage_se", "rate_nats", "rate_se", "histogram"):
        assert np.array_equal(getattr(loaded, name), getattr(swept, name)), name
    assert np.array_equal(loaded.truncation_bias_bound, swept.truncation_bias_bound)
    assert np.array_equal(loaded.groups.sums, swept.groups.sums)
    assert loaded.regime == swept.regime and loaded.warnings == swept.warnings
    assert loaded.slopes() == swept.slopes()
    assert loaded.provenance == swept.provenance
    wanted = {"version", "method", "seed", "num_realisations", "device", "command", "date", "network", "settings"}
    assert wanted <= loaded.provenance.keys()
    assert loaded.provenance["command"] == "sweep" and loaded.provenance["date"] == "2026-01-02"


def test_csv_has_a_row_for_each_density_and_threshold(swept, tmp_path):
    path = tmp_path / "run.csv"
    swept.save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "# seed: 5" in lines
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len(rows) == 18
    row = rows[5]
    assert float(row["density_per_km2"]) == swept.densities_per_km2[2] and float(row["threshold_db"]) == 3.0
    assert float(row["coverage"]) == swept.coverage[2, 1] and float(row["coverage_se"]) == swept.coverage_se[2, 1]
    assert float(row["rate_nats"]) == swept.rate_nats[2]
    assert float(row["ase_nats_per_km2"]) == swept.ase[2]


def test_json_is_json_even_of_what_is_not_finite(swept, tmp_path):
    path = tmp_path / "run.json"
    infinite = replace(swept, rate_nats=np.array([inf, nan, *[1.0] * 7]))
    infinite.save(path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["rate_nats"][:3] == ["inf", None, 1.0]
    assert report["coverage"] == swept.coverage.tolist()
    assert report["regime"]["name"] == "deficit" and report["slopes"][0]["verdict"] == "agrees"
    assert report["provenance"]["network"]["path_loss"] == "ms:1.5@10m,4"


def test_other_files_are_refused(swept, tmp_path):
    with pytest.raises(ValueError, match="path must end in .npz, .csv, .json, got run.txt"):
        swept.save(tmp_path / "run.txt")
    (tmp_path / "run.npz").write_text("no")
    with pytest.raises(ValueError, match="run.npz is not a result in .npz form"):
        Result.load(tmp_path / "run.npz")
    np.savez(tmp_path / "other.npz", coverage=np.ones(3))
    with pytest.raises(ValueError, match="other.npz is not a result"):
        Result.load(tmp_path / "other.npz")


def test_a_sweep_without_thresholds_has_rates_only(tmp_path):
    network = Network(MultiSlope([1.5, 4], [10.0]), Pareto(1.8))
    result = sweep(network, [1.0, 10.0], [], num_realisations=BATCH)
    assert result.coverage.shape == (2, 0) and result.rate_nats.shape == (2,)
    result.save(tmp_path / "rates.csv")
    lines = (tmp_path / "rates.csv").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 3
