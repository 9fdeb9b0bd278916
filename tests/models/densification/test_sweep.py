"""A sweep answers with the right method, to the error asked for, and its bits do not depend on how it was run."""

from math import inf, pi
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tokenweave_models.common.ranks import run_ranks
from tokenweave_models.densification import run as run_module
from tokenweave_models.densification.exact import saturation
from tokenweave_models.densification.fading import Gamma, LogNormal, LogPareto, Pareto, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope, PathLossTable
from tokenweave_models.densification.samplers import Settings, choose_method
from tokenweave_models.densification.sweep import sweep

BATCH = 16384
SINGLE = MultiSlope([4])
DUAL = MultiSlope([0.5, 4], [10.0])
DISC = MultiSlope([0.5, 4], [10.0], r_inf_m=1000.0)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))  # spawned ranks take over sys.path
    import sweep_work

    return sweep_work


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_power_method_meets_the_exact_law_of_a_single_slope():
    result = sweep(Network(SINGLE, Rayleigh()), [1.0, 1e4], [-10, -3, 0, 10], num_realisations=1 << 17, seed=1)
    assert result.provenance["method"] == "power"
    exact = saturation.coverage(0.5, 10 ** (result.thresholds_db / 10))
    assert (np.abs(result.coverage - exact) < 4 * result.coverage_se).all()
    assert (np.abs(result.rate_nats - saturation.rate(0.5)) < 4 * result.rate_se).all()
    assert (result.coverage_se < 2e-3).all() and (result.coverage_se > 1e-6).all()
    # One realisation serves all densities, and without noise this law does not depend on them.
    np.testing.assert_allclose(result.coverage[0], result.coverage[1], rtol=1e-4)


def test_power_and_geometry_agree_on_noise_units_and_load():
    network = Network(MultiSlope([1.5, 4], [10.0]), Gamma(2.0), noise=3e-3, activity=0.6)
    options = {"num_realisations": 1 << 15, "seed": 2}
    power, geometry = (
        sweep(network, [3000.0], [-3, 0, 5], method=method, **options) for method in ("power", "geometry")
    )
    error = np.hypot(power.coverage_se, geometry.coverage_se)
    assert (np.abs(power.coverage - geometry.coverage) < 4 * error).all()
    assert abs(power.rate_nats - geometry.rate_nats)[0] < 4 * np.hypot(power.rate_se, geometry.rate_se)[0]
    silent = sweep(Network(network.path_loss, network.fading, activity=0.6), [3000.0], [-3, 0, 5], **options)
    assert (power.coverage < silent.coverage - 10 * power.coverage_se).all()  # the noise is felt
    busy = sweep(Network(network.path_loss, network.fading, noise=3e-3), [3000.0], [-3, 0, 5], **options)
    assert (busy.coverage < power.coverage - 10 * power.coverage_se).all()  # and so is the load


def test_the_conditional_method_meets_the_closed_form_of_the_nearest_cell():
    network = Network(SINGLE, Rayleigh(), association="nearest")
    result = sweep(network, [10.0], [0.0], num_realisations=1 << 15, rate=False)
    assert result.provenance["method"] == "conditional"
    assert abs(result.coverage[0, 0] - 1 / (1 + pi / 4)) < 4 * result.coverage_se[0, 0] < 0.02
    assert np.isnan([result.rate_nats, result.rate_se, result.truncation_bias_bound]).all()
    assert result.histogram.shape == (1, 1, 256) and result.histogram.sum() == 1 << 15
    counted = sweep(network, [10.0], [0.0], num_realisations=1 << 15, method="geometry")
    assert abs(counted.coverage[0, 0] - 1 / (1 + pi / 4)) < 4 * counted.coverage_se[0, 0]
    assert result.coverage_se[0, 0] < counted.coverage_se[0, 0] / 1.5


def test_the_bias_of_few_terms_is_below_its_bound():
    """Against 64 terms on the same realisations, where bounded gains leave much to the residual."""
    network = Network(MultiSlope([0, 4], [10.0]), Rayleigh())

    def terms(count, residual="gauss"):
        options = {"num_realisations": 1 << 20, "rate": False, "settings": Settings(count, residual=residual)}
        return sweep(network, [1e4], [-6.0, 0.0], **options)

    exact, few = terms(64).coverage[0], terms(4)
    bias = np.abs(few.coverage[0] - exact).max()
    assert 1e-3 < bias < few.truncation_bias_bound[0] < 10 * bias
    # Where no bound is known none is given, and the bias is there.
    for residual, least in (("mean", 3e-3), ("none", 0.1)):
        other = terms(4, residual)
        assert np.isnan(other.truncation_bias_bound[0])
        assert np.abs(other.coverage[0] - exact).max() > least


def test_a_count_of_none_is_uncertain():
    network = Network(MultiSlope([0.5, 4], [10.0]), Rayleigh())
    options = {"num_realisations": BATCH, "method": "geometry", "settings": Settings(num_points=64, residual="mean")}
    result = sweep(network, [1e6], [-100, 0], **options)
    assert result.coverage.tolist() == [[1.0, 0.0]]
    assert result.coverage_se.tolist() == [[1 / BATCH, 1 / BATCH]]


def test_formulas_and_samples_agree():
    """The strongest cell by each of its laws, and the nearest one."""
    networks = [
        Network(SINGLE, Gamma(2.0)),
        Network(SINGLE, Gamma(2.0), noise=1e-10),
        Network(MultiSlope([1.5, 4], [10.0]), Rayleigh(), noise=1e-5),
        Network(MultiSlope([1.5, 4], [10.0]), Gamma(2.0), activity=0.5),
        Network(MultiSlope([1.5, 4], [10.0]), Rayleigh(), association="nearest", noise=1e-5, activity=0.5),
    ]
    for network in networks:
        rate = network.association == "strongest"
        exact = sweep(network, [300.0, 1e4], [0.0, 6.0], method="exact", rate=rate)
        assert exact.provenance["method"] == "exact" and (exact.coverage_se == 0).all()
        options = {"num_realisations": 1 << 16, "settings": Settings(num_points=64), "rate": rate}
        sampled = sweep(network, [300.0, 1e4], [0.0, 6.0], **options)
        assert (np.abs(sampled.coverage - exact.coverage) < 4 * sampled.coverage_se).all()
        if rate:
            assert (np.abs(sampled.rate_nats - exact.rate_nats) < 4 * sampled.rate_se).all()
    below = sweep(networks[0], [1.0], [-10.0], method="exact")
    assert below.coverage[0, 0] == saturation.coverage(0.5, 0.1)
    assert np.isnan(sweep(networks[4], [1.0], [0.0], method="exact", rate=False).rate_nats).all()


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5, "7"])
def test_seeds_beyond_64_bits_are_refused(seed):
    with pytest.raises(ValueError, match="^sweep: seed must be an integer, -2.63 to 2.63 - 1, got "):
        sweep(Network(SINGLE, Rayleigh()), [1.0], [0.0], num_realisations=64, seed=seed)


@pytest.mark.parametrize(
    "network, threshold_db, words",
    [
        (Network(DUAL, Rayleigh()), -1.0, "thresholds_db must be at least 0 for method exact.* got -1; use .* power"),
        (Network(SINGLE, Rayleigh(), noise=1e-9), -1.0, "thresholds_db must be at least 0 for method exact"),
        (Network(DUAL, Gamma(2.0), association="nearest"), 0.0, "exact knows the nearest cell under Rayleigh"),
    ],
)
def test_what_no_formula_answers_is_refused(network, threshold_db, words):
    with pytest.raises(ValueError, match=f"^sweep: .*{words}"):
        sweep(network, [1.0], [threshold_db], method="exact")


# ---------------------------------------------------------------------------------------------------------- how it ran


def test_a_target_error_is_met_by_doubling(work):
    seen = []
    result = work.small_sweep(num_realisations=None, target_se=8e-4, progress=seen.append)
    assert (result.coverage_se <= 8e-4).all()
    count = result.provenance["num_realisations"]
    assert count in [BATCH << k for k in range(1, 12)]
    half = work.small_sweep(num_realisations=count // 2)
    assert (half.coverage_se > 8e-4).any()
    assert work.bits_of(result) == work.bits_of(work.small_sweep(num_realisations=count))
    assert seen[-1].num_realisations == count and [p.num_realisations for p in seen] == sorted(
        p.num_realisations for p in seen
    )


def test_a_relative_target_is_relative(work):
    result = work.small_sweep(num_realisations=None, target_se=2e-3, relative_se=True)
    assert (result.coverage_se <= 2e-3 * result.coverage).all() and result.coverage.min() < 0.1
    absolute = work.small_sweep(num_realisations=None, target_se=2e-3)
    assert result.provenance["num_realisations"] > absolute.provenance["num_realisations"]


def test_a_target_that_is_out_of_reach_is_given_up_with_a_warning(work):
    result = work.small_sweep(num_realisations=None, target_se=1e-9, most_realisations=3 * BATCH)
    assert result.provenance["num_realisations"] == 3 * BATCH
    assert any("1e-09 was not reached with 49152 realisations" in warning for warning in result.warnings)


class Stop:
    """Ctrl-C during the so many-th call."""

    def __init__(self, call):
        self.calls_left = call

    def __call__(self, progress):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("amount", [{}, {"num_realisations": None, "target_se": 8e-4}])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(work, tmp_path, amount, monkeypatch):
    whole = work.small_sweep(**amount)
    path = tmp_path / "state.npz"
    for call in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            work.small_sweep(checkpoint=path, progress=Stop(call), **amount)
    seen = []
    monkeypatch.setattr(run_module, "CALL_S", 0.0)  # every call is of one batch: another cut of the same run
    result = work.small_sweep(checkpoint=path, progress=seen.append, **amount)
    assert seen[0].num_realisations > 2 * BATCH  # it did go on
    assert work.bits_of(result) == work.bits_of(whole)
    # What is there can also be extended, past the short batch at its end.
    longer = work.small_sweep(checkpoint=path, num_realisations=40 * BATCH)
    assert work.bits_of(longer) == work.bits_of(work.small_sweep(num_realisations=40 * BATCH))


# Draws of hypothesis: one batch, the same random numbers on both sides.
near, far = st.just(0.0) | st.floats(1e-4, 3.0), st.floats(3.2, 5.0)


@settings(max_examples=6, deadline=None)
@given(near=near, far=far, scale=st.floats(0.01, 100.0), density=st.floats(0.1, 1e4))
def test_density_counts_per_square_of_the_breakpoint(near, far, scale, density):
    """Samples, without noise: lengths times s and densities over s^2 change nothing."""
    one, other = (Network(MultiSlope([near, far], [10.0 * s]), Rayleigh()) for s in (1.0, scale))
    first = sweep(one, [density], [-5, 5], num_realisations=BATCH)
    second = sweep(other, [density / scale**2], [-5, 5], num_realisations=BATCH)
    np.testing.assert_allclose(first.coverage, second.coverage, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.rate_nats, second.rate_nats, rtol=1e-4)


@settings(max_examples=6, deadline=None)
@given(exponent=far, shape=st.floats(0.3, 8.0), sigma_db=st.floats(1.0, 10.0))
def test_no_fading_changes_the_sir_of_one_slope(exponent, shape, sigma_db):
    """Propagation invariance of samples: every fading is a factor of the density, which changes nothing."""
    laws = (Rayleigh(), Gamma(shape), LogNormal(sigma_db))
    swept = [sweep(Network(MultiSlope([exponent]), law), [7.0], [-5, 5], num_realisations=BATCH) for law in laws]
    for other in swept[1:]:
        np.testing.assert_allclose(other.coverage, swept[0].coverage, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other.rate_nats, swept[0].rate_nats, rtol=1e-4)


def test_a_checkpoint_of_another_sweep_is_refused(work, tmp_path):
    path = tmp_path / "state.npz"
    work.small_sweep(checkpoint=path, num_realisations=2 * BATCH)
    with pytest.raises(ValueError, match="must be of the same sweep, got state.npz of another seed, settings$"):
        work.small_sweep(checkpoint=path, seed=4, settings=Settings(num_terms=32))
    with pytest.raises(ValueError, match="num_realisations must be at least the 32768 that the checkpoint holds"):
        work.small_sweep(checkpoint=path, num_realisations=BATCH)
    whole = path.read_bytes()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="checkpoint state.npz cannot be read"):
        work.small_sweep(checkpoint=path)
    path.write_bytes(whole[:700])
    with pytest.raises(ValueError, match="checkpoint state.npz cannot be read"):
        work.small_sweep(checkpoint=path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="checkpoint state.npz cannot be read"):
        work.small_sweep(checkpoint=path)


def test_a_checkpoint_knows_its_laws_by_their_values(tmp_path):
    """Two tables of the same name."""
    path, tables = tmp_path / "state.npz", ([1e2, 1e6], [1e4, 1e9])
    networks = [Network(PathLossTable([1, 10, 100], [1.0, *table]), Rayleigh()) for table in tables]
    assert networks[0].describe() == networks[1].describe()
    sweep(networks[0], [1.0], [0.0], num_realisations=BATCH, checkpoint=path)
    with pytest.raises(ValueError, match="must be of the same sweep, got state.npz of another laws"):
        sweep(networks[1], [1.0], [0.0], num_realisations=BATCH, checkpoint=path)


def test_a_power_domain_with_too_few_active_terms_is_refused():
    network = Network(MultiSlope([4.0]), Rayleigh(), activity=0.01)
    with pytest.raises(ValueError, match=r"at most 1 %, got a bound of 100% with 16 terms and activity 0.01 at 1/km2"):
        sweep(network, [1.0], [20.0], num_realisations=BATCH)


def test_two_ranks_find_the_bits_of_one(work, tmp_path):
    one = work.bits_of(work.small_sweep())
    path = tmp_path / "state.npz"
    work.small_sweep(checkpoint=path, num_realisations=2 * BATCH)  # rank 0 hands on what is there already
    ranks = []
    found = run_ranks(work.bits_of_rank, 2, path, timeout_s=120, on_report=ranks.append)
    assert found == [one, one]
    assert set(ranks) == {0, 1}


# ---------------------------------------------------------------------------------------------------- what is refused

NEAREST = {"association": "nearest"}


@pytest.mark.parametrize(
    "network, method, rate, chosen",
    [
        (Network(DUAL, Rayleigh()), "auto", True, "power"),
        (Network(DISC, Pareto(0.5)), "auto", True, "power"),
        (Network(DUAL, Rayleigh(), **NEAREST), "auto", False, "conditional"),
        (Network(DUAL, Rayleigh(), **NEAREST), "auto", True, "geometry"),
        (Network(DUAL, Rayleigh(), activity=0.5, **NEAREST), "auto", False, "geometry"),
        (Network(DUAL, Gamma(2.0), **NEAREST), "auto", False, "geometry"),
        (Network(DUAL, Rayleigh()), "geometry", True, "geometry"),
    ],
)
def test_the_method_fits_the_question(network, method, rate, chosen):
    assert choose_method(network, method, rate) == chosen


@pytest.mark.parametrize(
    "network, method, rate, words",
    [
        (Network(DUAL, Rayleigh(), **NEAREST), "power", True, "method must be geometry for association nearest"),
        (Network(DUAL, Gamma(2.0), **NEAREST), "conditional", False, "conditional needs Rayleigh fading, got gamma:2"),
        (Network(DUAL, Rayleigh(), activity=0.5, **NEAREST), "conditional", False, "conditional needs activity 1"),
        (Network(DUAL, Rayleigh(), **NEAREST), "conditional", True, "conditional gives no rate: pass rate=False"),
        (Network(DISC, Pareto(0.5)), "geometry", True, "finite mean.*, got pareto:0.5; use method power"),
        (Network(DISC, Pareto(0.5), **NEAREST), "auto", True, "finite mean.*; nothing samples the nearest cell"),
        (Network(DISC, LogPareto(1.0)), "auto", True, "rate must not be asked for where E ln.1 . mark. is infinite"),
        (Network(DUAL, Rayleigh()), "best", True, "method must be auto, power, .*, got 'best'"),
    ],
)
def test_a_method_that_cannot_answer_is_refused(network, method, rate, words):
    with pytest.raises(ValueError, match=f"^sweep: .*{words}"):
        choose_method(network, method, rate)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "num_realisations or target_se must be given, not both, got None and None"),
        ({"num_realisations": 10, "target_se": 0.1}, "num_realisations or target_se must be given, not both"),
        ({"num_realisations": 0}, "num_realisations must be 1 to 2.53, got 0"),
        ({"num_realisations": 2**54}, "num_realisations must be 1 to 2.53, got 18014398509481984"),
        ({"num_realisations": 1.5}, "num_realisations must be 1 to 2.53, got 1.5"),
        ({"target_se": 0.0}, "target_se must be positive, got 0"),
        ({"target_se": np.nan}, "target_se must be positive, got nan"),
        ({"num_realisations": 10, "device": "meta"}, "device must be cpu or cuda, got meta"),
        (
            {"num_realisations": 10, "thresholds_db": [np.nan]},
            "thresholds_db must be .* numbers from -180 to 180",
        ),
        ({"num_realisations": 10, "thresholds_db": [1e3]}, "thresholds_db must be .* numbers from -180 to 180"),
        ({"num_realisations": 10, "densities_per_km2": []}, "densities_per_km2 must be a list of numbers"),
        ({"num_realisations": 10, "method": "exact"}, "must be left out for method exact"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    given = {"densities_per_km2": [1.0], "thresholds_db": [0.0]} | options
    with pytest.raises(ValueError, match=f"^sweep: .*{words}"):
        sweep(Network(DUAL, Rayleigh()), **given)


@pytest.mark.parametrize("density", [0.0, -2.0, np.nan, inf])
def test_densities_must_be_positive(density):
    with pytest.raises(ValueError, match="densities_per_km2 must be positive and finite"):
        sweep(Network(DUAL, Rayleigh()), [1.0, density], [0.0], num_realisations=10)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_terms": 6}, "num_terms must be a multiple of 4 from 4 to 64, got 6"),
        ({"num_terms": 68}, "num_terms must be a multiple of 4 from 4 to 64, got 68"),
        ({"num_points": 0}, "num_points must be a multiple of 4 from 4 to 1048576, got 0"),
        ({"rate_nodes": 17}, "rate_nodes must be 0 to 16, got 17"),
        ({"residual": "some"}, "residual must be none, mean, gauss, got 'some'"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=f"^sweep: {words}"):
        Settings(**options)


def test_cuda_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="cuda was asked for and there is none"):
        sweep(Network(DUAL, Rayleigh()), [1.0], [0.0], num_realisations=10, device="cuda")


def test_a_far_field_that_matters_is_refused():
    """Of marks so uneven that 64 points leave a residual of more than 1 %, before the run is long."""
    seen = []
    network = Network(MultiSlope([2.5]), Rayleigh())
    options = {"num_realisations": 100 * BATCH, "settings": Settings(num_points=16), "progress": seen.append}
    with pytest.raises(ValueError, match="num_points must leave a far field .* at most 1 %.* with 16 at 1/km2.*power"):
        sweep(network, [1.0], [0.0], method="geometry", **options)
    assert len(seen) == 0
    sweep(network, [1.0], [0.0], num_realisations=BATCH)  # the power method takes it


def test_marks_without_variance_need_the_mean_residual():
    network = Network(DUAL, Pareto(1.5), association="nearest")
    with pytest.raises(ValueError, match="residual must be mean or none .* no variance, got gauss for pareto:1.5$"):
        sweep(network, [100.0], [0.0], num_realisations=BATCH)
    result = sweep(network, [100.0], [0.0], num_realisations=BATCH, settings=Settings(residual="mean"))
    assert 0 < result.coverage[0, 0] < 1


# ------------------------------------------------------------------------------------------------------------ warnings


def test_empty_realisations_are_told():
    result = sweep(Network(DISC, Rayleigh(), noise=1e-9), [1.0, 100.0], [0.0], num_realisations=BATCH)
    assert any("4.3% of realisations at 1/km2 have no base station" in warning for warning in result.warnings)
    full = sweep(Network(DISC, Rayleigh(), noise=1e-9), [2.0], [0.0], num_realisations=BATCH)
    assert not any("no base station" in warning for warning in full.warnings)


def test_an_infinite_rate_is_told():
    result = sweep(Network(DISC, Rayleigh()), [0.5], [0.0], num_realisations=BATCH)
    assert result.rate_nats[0] == inf
    assert any("mean rate is infinite at 0.5/km2: without noise" in warning for warning in result.warnings)


def test_a_logarithmic_boundary_is_told():
    result = sweep(Network(MultiSlope([2, 4], [10.0]), Rayleigh()), [1.0], [0.0], num_realisations=100)
    assert any("logarithmic" in warning for warning in result.warnings)


def test_without_a_rate_coverage_of_slowly_varying_marks_exists():
    result = sweep(Network(DISC, LogPareto(1.0)), [1000.0], [0.0], num_realisations=BATCH, rate=False)
    assert 0.9 < result.coverage[0, 0] <= 1 and np.isnan(result.rate_nats[0])
