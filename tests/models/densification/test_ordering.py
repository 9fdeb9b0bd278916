"""Pairs that theory orders have no realisation the other way round; pairs that it does not are not called ordered."""

import numpy as np
import pytest
from tokenweave_models.densification.exact import saturation
from tokenweave_models.densification.fading import (
    Gamma,
    LogNormal,
    LogPareto,
    Nakagami,
    NoFading,
    Pareto,
    Rayleigh,
    Suzuki,
    Weibull,
)
from tokenweave_models.densification.network import Network
from tokenweave_models.densification.ordering import compare, proven_order, star_ordered
from tokenweave_models.densification.path_loss import MultiSlope

BATCH = 16384
DISC = MultiSlope([3], r_inf_m=100.0)
FLAT = MultiSlope([0, 4], [10.0])
OPTIONS = {"num_realisations": 3 * BATCH + 50, "seed": 4}


def test_a_steeper_single_slope_is_better_in_every_realisation():
    steep, shallow = Network(MultiSlope([4]), Gamma(2.0)), Network(MultiSlope([3]), LogNormal(6))
    found = compare(steep, shallow, [1.0, 1e4], [-3.0, 0.0, 10.0], **OPTIONS)
    assert found.theorem == "single slopes, and exponent 4 is at least 3"
    assert found.violations.tolist() == [0, 0] and found.worst_db.tolist() == [0, 0]
    assert found.star_ordered.all() and found.num_realisations == 3 * BATCH + 50 and found.tolerance_db < 2e-3
    thresholds = 10 ** np.array([-0.3, 0.0, 1.0])
    exact = saturation.coverage(0.5, thresholds) - saturation.coverage(2 / 3, thresholds)
    assert (np.abs(found.coverage.value - exact) < 4 * found.coverage.standard_error + 1e-4).all()
    exact_rate = saturation.rate(0.5) - saturation.rate(2 / 3)
    assert (np.abs(found.rate_nats.value - exact_rate) < 4 * found.rate_nats.standard_error + 1e-3).all()
    assert "better in every realisation" in found.words and "0 of" in found.words
    # The other way round nearly all realisations are violations, and nothing says that there should be none.
    back = compare(shallow, steep, [1.0], [0.0], **OPTIONS)
    assert back.theorem == "" and not back.star_ordered.any()
    assert back.violations[0] > 0.99 * back.num_realisations and back.worst_db[0] > 1


def test_more_even_marks_are_worse_in_every_realisation():
    """Channel hardening hurts the strongest cell, here on a single slope in a disc."""
    better, worse = Network(DISC, Nakagami(1.0)), Network(DISC, Gamma(4.0))
    found = compare(better, worse, [1e3, 1e5], [0.0], **OPTIONS)
    assert found.theorem == "marks in the star order: gamma shapes 1 and 4"
    assert found.star_ordered.all() and found.violations.sum() == 0
    assert (found.coverage.low > 0).all() and (found.rate_nats.low > 0).all()


def test_a_flat_near_field_breaks_the_order():
    """Next to a flat near field more uneven marks are better on average only: far cells lose more than near ones."""
    found = compare(Network(FLAT, Rayleigh()), Network(FLAT, Gamma(4.0)), [1e3, 1e4], [0.0], **OPTIONS)
    assert found.theorem == "" and not found.star_ordered.any()
    assert (found.violations > 0).all() and (found.worst_db > 0.01).all()
    assert (found.coverage.low > 0).all() and found.words.startswith("neither is better in every realisation")


def test_an_order_may_hold_without_a_theorem():
    """A near field of smaller exponent evens out the strongest powers."""
    options = OPTIONS | {"num_realisations": BATCH}
    single, dual = Network(MultiSlope([4]), NoFading()), Network(MultiSlope([1.5, 4], [10.0]), NoFading())
    found = compare(single, dual, [1e3, 1e5], [0.0], **options)
    assert found.theorem == "" and found.star_ordered.all() and found.violations.sum() == 0
    assert "no theorem is known" in found.words


def test_unordered_networks_are_called_so():
    """Steep near and shallow far, against the reverse of that: which is better depends on where the cells are."""
    a, b = Network(MultiSlope([3, 3.2], [10.0]), NoFading()), Network(MultiSlope([0, 6], [10.0]), NoFading())
    found = compare(a, b, [3e3], [0.0], **OPTIONS)
    assert not found.star_ordered.any() and found.theorem == ""
    assert 0 < found.violations[0] < found.num_realisations
    assert found.words.startswith("neither is better")


def test_noise_counts():
    quiet, noisy = (Network(DISC, Rayleigh(), noise=noise) for noise in (0.0, 1e-5))
    found = compare(quiet, noisy, [1e3], [0.0], **OPTIONS)
    assert found.theorem == "" and found.violations.sum() == 0 and found.coverage.low[0, 0] > 0
    other = compare(noisy, quiet, [1e3], [0.0], **OPTIONS)
    assert other.violations[0] > BATCH and not other.star_ordered.any()
    assert "a is better" not in other.words and "L1^-1" not in found.words


@pytest.mark.parametrize("change", [{"noise": 1e-3}, {"activity": 0.5}])
def test_a_worse_network_is_never_declared_better(change):
    slopes = MultiSlope([1, 4], [10.0])
    few = {"a": {"noise": 1e-9} | change, "b": {"noise": 1e-9}}
    if "activity" in change:
        few["a"], few["b"] = few["b"], few["a"]
    found = compare(*(Network(slopes, Rayleigh(), **one) for one in few.values()), [10.0], [0.0], **OPTIONS)
    assert found.violations[0] > 0.99 * found.num_realisations and "a is better" not in found.words
    assert not found.star_ordered.any()


@pytest.mark.parametrize(
    "better, worse",
    [
        (Weibull(0.7), Weibull(1.5)),
        (Pareto(1.2), Pareto(2.5)),
        (LogNormal(8), LogNormal(4)),
        (LogPareto(1.5), LogPareto(3)),
        (Gamma(0.5), Rayleigh()),
        (Suzuki(4), NoFading()),
    ],
)
@pytest.mark.parametrize("law", [DISC, MultiSlope([3.5], height_m=5.0, r_inf_m=100.0)])
def test_each_proven_family_is_star_ordered(better, worse, law):
    """The theorem, against the computed L1^-1 of both networks."""
    a, b = Network(law, better), Network(law, worse)
    assert proven_order(a, b) != "" and proven_order(b, a) == ""
    assert all(star_ordered(a, b, density) for density in (10.0, 1e3, 1e5))
    assert not all(star_ordered(b, a, density) for density in (10.0, 1e3, 1e5))


@pytest.mark.parametrize(
    "a, b",
    [
        (Network(FLAT, Rayleigh()), Network(FLAT, Gamma(4.0))),  # an atom of gains
        (Network(DISC, Rayleigh()), Network(DISC, LogNormal(1))),  # of two families
        (Network(DISC, Rayleigh(), noise=1e-9), Network(DISC, Gamma(4.0))),
        (Network(DISC, Rayleigh(), activity=0.5), Network(DISC, Gamma(4.0))),
        (Network(DISC, Rayleigh(), association="nearest"), Network(DISC, Gamma(4.0), association="nearest")),
        (Network(DISC, Rayleigh()), Network(MultiSlope([3], r_inf_m=90.0), Gamma(4.0))),
        (Network(MultiSlope([3], min_distance_m=1, r_inf_m=9), Rayleigh()),) * 2,
    ],
)
def test_no_theorem_is_claimed_outside_its_conditions(a, b):
    assert proven_order(a, b) == ""


def test_bad_arguments_are_refused():
    network = Network(DISC, Rayleigh())
    with pytest.raises(ValueError, match="^compare: num_realisations must be at least 1, got 0"):
        compare(network, network, [1.0], [0.0], num_realisations=0)
    other = Network(DISC, Rayleigh(), association="nearest")
    with pytest.raises(ValueError, match="^compare: method must be power or geometry, the same for both"):
        compare(network, other, [1.0], [0.0], num_realisations=10)
