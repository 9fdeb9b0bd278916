"""The benchmarks of samplers: how a statistic is judged, and that every contestant computes what it says."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from bench import harness, machines, sinr_field
from bench import sinr_formulations as formulations
from bench.sinr_formulations import Problem


def problem(n=10_000, has_rate=False):
    exact = np.array([[0.9] * has_rate + [0.3]])
    return Problem((1.0,), (1.0,), n, 16, exact, has_rate=has_rate)


def sums(mean, deviation, n=10_000):
    return np.array([[[mean * n, (mean**2 + deviation**2) * n]]])


def test_a_statistic_is_judged_by_its_own_error_and_the_bias_that_is_stated():
    """Standard error 0.002: 5 of them and a bias of 0.005 allow 0.015."""
    judged = formulations.judge(problem(), 0.005, sums(0.306, 0.2))
    assert judged.item() == pytest.approx(0.4, rel=1e-3)
    assert formulations.judge(problem(), 0.0, sums(0.306, 0.2)).item() == pytest.approx(0.6, rel=1e-3)
    assert formulations.judge(problem(), 0.005, sums(0.32, 0.2)).item() > 1


def test_noise_does_not_pass_for_agreement():
    assert formulations.judge(problem(), 0.0, sums(0.3, 0.9)).item() < 1
    assert formulations.judge(problem(), 0.0, sums(0.3, 1.1)).item() == math.inf
    assert formulations.judge(problem(), 0.0, sums(math.nan, 0.2)).isnan().all()


@pytest.fixture(scope="module")
def machine():
    return machines.CpuMachine(memory_cap=256 << 20)


@pytest.mark.parametrize("index", range(3))
def test_every_contestant_is_right_and_a_shifted_one_is_not(machine, index, monkeypatch):
    """One case of each sampler, cut to one batch; compiled formulations are those of eager."""
    monkeypatch.setattr(sinr_field, "BATCH", 4096)
    case = [
        sinr_field._power_case("power", "cpu", 1, thresholds=(1.0,)),
        sinr_field._geometry_case("geometry", "cpu", 1, num_points=64),
        sinr_field._conditional_case("conditional", "cpu", 1, 64, "nearest", sinr_field.THRESHOLDS_8),
    ][index]
    (buffers,) = machines.allocate(case.buffers, 1, machine)
    checker = harness.Checker(case, {name: tensor.clone() for name, tensor in buffers.items()}, machine)
    names = [contestant.name for contestant in case.contestants]
    assert names[0] == "tokenweave" and {"numpy", "eager", "numpy_loop"} <= set(names)
    for contestant in case.contestants:
        if contestant.name != "compile":
            assert checker.error(contestant, buffers) <= case.tolerance, contestant.name
    ours = case.contestants[0]
    shifted = harness.Contestant(
        "shifted", "-", ours.bind, ours.outputs, result=lambda found: ours.result(found._replace(sums=1.2 * found.sums))
    )
    assert checker.error(shifted, buffers) > case.tolerance


def test_slots_of_a_case_count_every_realisation_and_density():
    one, two = (sinr_field._geometry_case("-", "cpu", n, num_densities=2) for n in (1, 2))
    assert two.flops == 2 * one.flops and one.counts["station"] == 256 * one.counts["realisation"]
