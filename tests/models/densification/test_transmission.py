"""Coverage of several antennas, against a simulation and where it reduces to what is known."""

import numpy as np
import pytest
from tokenweave_models.densification import transmission
from tokenweave_models.densification.exact import nearest
from tokenweave_models.densification.fading import Gamma, Rayleigh
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.path_loss import MultiSlope

DUAL = MultiSlope([1.5, 4], [10.0])
NETWORK = Network(DUAL, Rayleigh(), association="nearest", noise=1e-3, activity=0.7)
THRESHOLDS_DB = [-5.0, 0.0, 5.0]


def test_one_antenna_is_rayleigh_fading():
    laws = DUAL, MultiSlope([2.5]), MultiSlope([1.5, 4], [10.0], r_inf_m=100.0), MultiSlope([4], height_m=20.0)
    for law in laws:
        network = Network(law, Rayleigh(), association="nearest", noise=1e-3, activity=0.7)
        found = transmission.coverage(network, transmission.single_antenna(), [10.0, 1e4], THRESHOLDS_DB)
        densities, thresholds = network.scaled_density([10.0, 1e4]), 10 ** (np.array(THRESHOLDS_DB) / 10)
        exact = nearest.coverage(law, densities, thresholds, noise=network.scaled_noise(), activity=0.7)
        np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_two_antennas_follow_from_one():
    """Given the distances, coverage is L(s) of one antenna and L(s) - s L'(s) of two, s in proportion to T; here where
    the far field weighs most."""
    network = Network(MultiSlope([2.3]), Rayleigh(), association="nearest")
    threshold, step = 0.7, 1e-4
    one = nearest.coverage_single_slope(threshold * np.exp([-step, 0, step]), 2.3)
    two = one[1] - (one[2] - one[0]) / (2 * step)
    found = transmission.coverage(network, transmission.maximum_ratio(2), [5.0], [10 * np.log10(threshold)])
    assert found[0, 0] == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(
    "scheme", [transmission.maximum_ratio(4), transmission.space_time_code(2), transmission.zero_forcing(6, 3)]
)
def test_a_simulation_agrees(scheme):
    """The 200 nearest cells and the mean of all others, each with its own mark."""
    rng, count, points, density = np.random.default_rng(1), 40000, 200, 0.5
    r = np.sqrt(np.cumsum(rng.exponential(size=(count, points)), axis=1) / (np.pi * density))
    gain = np.exp(-DUAL.log_loss(np.log(r)))
    marks = rng.gamma(scheme.interferer_shape, scheme.interferer_scale, size=(count, points))
    marks *= rng.random((count, points)) < NETWORK.activity
    far = 0.7 * density * np.pi * r[:, -1] ** -2  # beyond the breakpoint, at r = 1, the loss is r^4
    interference = (marks * gain)[:, 1:].sum(axis=1) + far + NETWORK.scaled_noise()
    sinr = rng.gamma(scheme.signal_shape, scheme.signal_scale, size=count) * gain[:, 0] / interference
    share = (sinr[:, None] > 10 ** (np.array(THRESHOLDS_DB) / 10)).mean(axis=0)
    found = transmission.coverage(NETWORK, scheme, [density * 1e4], THRESHOLDS_DB)[0]
    assert (np.abs(found - share) < 4 * np.sqrt(share * (1 - share) / count)).all()


def test_schemes_are_ordered_as_theory_says():
    """Of a Rayleigh signal, interferers of more even marks are worse: coverage is their Laplace transform."""
    schemes = [transmission.Transmission("even", 1, 1.0, shape, 1 / shape) for shape in (0.5, 1.0, 4.0, 64.0)]
    found = [transmission.coverage(NETWORK, scheme, [3e3], THRESHOLDS_DB)[0] for scheme in schemes]
    assert (np.diff(found, axis=0) < -1e-4).all()
    # And more users share the power of the same antennas, and leave fewer of them to strengthen each.
    users = [
        transmission.coverage(NETWORK, transmission.zero_forcing(4, k), [3e3], THRESHOLDS_DB)[0] for k in (1, 2, 4)
    ]
    assert (np.diff(users, axis=0) < -1e-2).all()


def test_bad_arguments_are_refused():
    for other in (Network(DUAL, Rayleigh()), Network(DUAL, Gamma(2.0), association="nearest")):
        with pytest.raises(ValueError, match="^transmission: the network must be of association nearest and Rayleigh"):
            transmission.coverage(other, transmission.single_antenna(), [1.0], [0.0])
    with pytest.raises(ValueError, match="users must be a whole number from 1 to 4, got 5"):
        transmission.zero_forcing(4, 5)
    with pytest.raises(ValueError, match="antennas must be a whole number from 1 to 64, got 0"):
        transmission.maximum_ratio(0)
