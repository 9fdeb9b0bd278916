"""Path losses: continuity, units, inverse, integrals over the plane, and refusals."""

from itertools import pairwise
from math import inf, log, pi

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import integrate
from tokenweave_models.densification.path_loss import (
    MultiSlope,
    PathLossFunction,
    PathLossTable,
    StretchedExponential,
)

LAWS = [
    MultiSlope([4]),
    MultiSlope([2.5], height_m=10),
    MultiSlope([0, 4], [10]),
    MultiSlope([0.5, 2, 4], [10, 300], height_m=3, min_distance_m=2),
    MultiSlope([1.5, 4], [10], r_inf_m=4e4),
    MultiSlope([3, 4], [10], min_distance_m=25),
    StretchedExponential(0.9, 0.5),
    StretchedExponential(0.03, 1.2, height_m=5, r_inf_m=2000),
    PathLossFunction(lambda t: 3.5 * np.logaddexp(0, t - 1), 0, 3.5),
    PathLossTable([1, 10, 30, 100], [1, 5, 100, 2e4], height_m=2),
]


def name(law):
    return law.describe()


def test_multislope_is_continuous_and_has_its_slopes():
    law = MultiSlope([0.5, 2, 4], [10, 300])
    assert law.unit_m == 10 and law.near_exponent == 0.5 and law.far_exponent == 4
    np.testing.assert_allclose(law.breakpoints, [1, 30])
    r = np.array([0.1, 1, 5, 30, 900.0])  # in u; losses by hand
    loss = np.array([0.1**0.5, 1, 25, 900, 900 * 30**4])
    np.testing.assert_allclose(np.exp(law.log_loss(np.log(r))), loss, rtol=1e-12)
    # 1 at 1 m, so that the gain at 10 m is 10^-0.5
    assert law.gain_at_unit == pytest.approx(10**-0.5)


def test_units_follow_what_there_is():
    assert MultiSlope([4]).unit_m == 1
    assert MultiSlope([4], height_m=10).unit_m == 10
    assert MultiSlope([4], min_distance_m=5).unit_m == 5
    law = MultiSlope([3, 4], [10], height_m=20, r_inf_m=1000)
    assert (law.unit_m, law.height, law.r_inf) == (10, 2, 100)
    assert law.near_exponent == 0 and law.is_bounded and not MultiSlope([3, 4], [10]).is_bounded
    assert np.exp(law.log_loss(np.array([-inf])))[0] == pytest.approx(2**4)  # at height 2 u, beyond the breakpoint
    clipped = MultiSlope([3, 4], [10], min_distance_m=5)
    np.testing.assert_allclose(np.exp(clipped.log_loss(np.log([0.1, 0.5, 2]))), [1 / 8, 1 / 8, 16])


@pytest.mark.parametrize("law", [law for law in LAWS if law.lines()], ids=name)
def test_lines_are_the_loss(law):
    r = np.geomspace(1e-3, 1e5, 50)
    slant = np.log2(np.maximum(r, law.min_distance) ** 2 + law.height**2)
    lines = np.max([a + b * slant for a, b in law.lines()], axis=0)
    np.testing.assert_allclose(lines * log(2), law.log_loss(np.log(r)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS, ids=name)
@settings(max_examples=40, deadline=None)
@given(log_r=st.lists(st.floats(-8, 8), min_size=2, max_size=6))
def test_loss_rises_and_distance_inverts_it(law, log_r):
    log_r = np.sort(np.array(log_r))
    loss = law.log_loss(log_r)
    assert (np.diff(loss) >= 0).all()
    back = law.log_distance(loss)
    rim = log(law.r_inf) if law.r_inf < inf else inf
    # The farthest place of that loss: at least this one, and no lossier.
    assert (back >= np.minimum(log_r, rim) - 1e-7 - (loss == law.log_loss(np.array([-inf]))) * 99).all()
    assert (law.log_loss(back) <= loss + 1e-9 * np.maximum(1, np.abs(loss))).all()
    below = law.log_loss(np.array([-inf]))[0]
    if below > -inf:
        assert law.log_distance(np.array([below - 1e-6]))[0] == -inf


@pytest.mark.parametrize("law", LAWS, ids=name)
@pytest.mark.parametrize("power", [1.0, 2.0, 0.9])
def test_gain_integral_is_the_integral(law, power):
    start = np.array([-3.0, 0.3, 2.5])
    start = start[np.exp(start) < law.r_inf]
    found = law.log_gain_integral(power, start)
    for low, value in zip(start, found, strict=True):
        far = min(log(law.r_inf) if law.r_inf < inf else inf, low + 150)
        edges = np.unique(np.clip([low, *np.linspace(low, low + 8, 33), *law.log_corners(), low + 30, far], low, far))

        def integrand(t):
            return 2 * pi * np.exp(2 * t - power * law.log_loss(np.array([t]))[0])

        with np.errstate(over="ignore"):
            area = sum(
                integrate.quad(integrand, *pair, epsabs=0, epsrel=1e-11, limit=200)[0] for pair in pairwise(edges)
            )
        assert value == pytest.approx(log(area), abs=1e-8)


def test_gain_integral_of_the_whole_plane():
    whole = np.array([-inf])
    # 2 pi (1/2 + 1/2), flat to u and then r^-4
    assert np.exp(MultiSlope([0, 4], [10]).log_gain_integral(1.0, whole))[0] == pytest.approx(2 * pi, rel=1e-10)
    # 2 pi (1 / (2 - 1.98) + 1/2), slow to converge near 0
    steep = np.exp(MultiSlope([1.98, 4], [10]).log_gain_integral(1.0, whole))[0]
    assert steep == pytest.approx(2 * pi * (1 / 0.02 + 0.5), rel=1e-8)
    # slow to converge far away
    far = np.exp(MultiSlope([0, 2.01], [10]).log_gain_integral(1.0, whole))[0]
    assert far == pytest.approx(2 * pi * (0.5 + 1 / 0.01), rel=1e-8)
    assert MultiSlope([3, 4], [10]).log_gain_integral(1.0, whole)[0] == inf
    assert MultiSlope([0, 4], [10]).log_gain_integral(0.5, np.array([0.0]))[0] == inf


def test_function_and_table_agree_with_the_law_they_sample():
    same = PathLossFunction(
        lambda t: np.where(t < log(10), 1.5 * t, 4 * t - 2.5 * log(10)), 1.5, 4, unit_m=10, breakpoints_m=[10]
    )
    table = PathLossTable([10, 20], [10**1.5, 10**1.5 * 2**4])
    law = MultiSlope([1.5, 4], [10])
    log_r = np.linspace(-6, 8, 40)
    np.testing.assert_allclose(same.log_loss(log_r), law.log_loss(log_r), atol=1e-12)
    assert same.gain_at_unit == pytest.approx(law.gain_at_unit)
    np.testing.assert_allclose(same.log_gain_integral(1.0, log_r), law.log_gain_integral(1.0, log_r), atol=1e-10)
    np.testing.assert_allclose(table.log_loss(log_r[log_r > 0]), law.log_loss(log_r[log_r > 0]), atol=1e-12)
    assert table.near_exponent == pytest.approx(4)  # the first segment goes on


def test_words_name_the_law():
    assert MultiSlope([0, 4], [10], height_m=3, r_inf_m=4e4).describe() == "ms:0@10m,4;h=3m;rinf=40000m"
    assert MultiSlope([4], min_distance_m=1).describe() == "slope:4;min=1m"
    assert StretchedExponential(0.9, 0.5).describe() == "stretched:0.9,0.5"


REFUSED = [
    (lambda: MultiSlope([]), "MultiSlope: exponents must be at least one number, got"),
    (lambda: MultiSlope([-1, 4], [10]), "exponents must be 0 to 100, got"),
    (lambda: MultiSlope([1e-5, 4], [10]), "MultiSlope: the first exponent must be 0, or 0.0001 or more, got 1e-05"),
    (lambda: MultiSlope([4, 4], [10]), "exponents must be strictly increasing, got"),
    (lambda: MultiSlope([0, 4], []), "breakpoints_m must be one fewer than the 2 exponents, got"),
    (lambda: MultiSlope([0, 2, 4], [10, 5]), "breakpoints_m must be positive, finite and strictly increasing, got"),
    (lambda: MultiSlope([0, 4], [0]), "breakpoints_m must be positive, finite and strictly increasing, got"),
    (lambda: MultiSlope([2]), "the last exponent must be above 2 on the infinite plane.*r_inf_m.*got 2"),
    (lambda: MultiSlope([0, 4], [10], r_inf_m=10), "r_inf_m must be above the last breakpoint .10 m., got 10"),
    (lambda: MultiSlope([4], height_m=-1), "height_m must be 0, or 1e-09 to 1e\\+12 m, got -1"),
    (lambda: MultiSlope([4], height_m=1e300), "height_m must be 0, or 1e-09 to 1e\\+12 m, got 1e\\+300"),
    (lambda: MultiSlope([4], r_inf_m=1e-300), "r_inf_m must be inf, or 1e-09 to 1e\\+12 m, got 1e-300"),
    (lambda: MultiSlope([0, 4], [1e-300]), "breakpoints_m must be 1e-09 to 1e\\+12 m, got"),
    (lambda: MultiSlope([100], height_m=1e-9), "the first exponent must be such that 1e-09.exponent is a float"),
    (lambda: MultiSlope([4], min_distance_m=np.nan), "min_distance_m must be 0, or 1e-09 to 1e\\+12 m, got nan"),
    (lambda: MultiSlope([4], min_distance_m=5, r_inf_m=4), "r_inf_m must be above min_distance_m=5, got 4"),
    (lambda: StretchedExponential(0, 1), "StretchedExponential: a must be 1e-12 to 1e6, got 0"),
    (lambda: StretchedExponential(1, inf), "b must be 0.05 to 2, got inf"),
    (lambda: PathLossFunction(lambda t: -t, 0, 4), "log_loss_m must be nowhere falling, got one that falls"),
    (lambda: PathLossFunction(lambda t: t * np.nan, 0, 4), "log_loss_m must be finite, got nan"),
    (lambda: PathLossFunction(lambda t: t, 1e-5, 4), "near_exponent must be 0, or 0.0001 or more, got 1e-05"),
    (lambda: PathLossFunction(lambda t: t, -1, 4), "near_exponent must be 0 to 100, got -1"),
    (lambda: PathLossFunction(lambda t: t, 1, 1), "far_exponent must be above 2 on the infinite plane"),
    (lambda: PathLossTable([1], [1]), "r_m must be at least 2 distances, got"),
    (lambda: PathLossTable([2, 1], [1, 9]), "r_m must be positive, finite and strictly increasing, got"),
    (lambda: PathLossTable([1, 2], [9, 1]), "loss must be positive, finite and nowhere falling, got"),
    (lambda: PathLossTable([1, 2], [1, 2, 3]), "loss must be one for each of the 2 distances, got"),
    (lambda: PathLossTable([1, 2], [1, 3]), "far_exponent must be above 2 on the infinite plane"),
]


@pytest.mark.parametrize("build, message", REFUSED)
def test_refusals_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
