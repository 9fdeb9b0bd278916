"""What is kept of a run depends on how many batches there were, and on nothing else."""

import numpy as np
import pytest
from tokenweave_models.densification.accumulate import Accumulator, Groups, jackknife

from tokenweave_ops.sinr_field import BATCH

DENSITIES, ITEMS = 2, 3


def batches(count, seed=0):
    """Sums of value and of value squared, as of so many batches."""
    values = np.random.default_rng(seed).exponential(size=(count, DENSITIES, ITEMS))
    return np.stack([values, values**2], axis=-1) * BATCH


def accumulated(sums, cuts):
    total = Accumulator((DENSITIES, ITEMS), (DENSITIES, 4))
    for part in np.split(sums, cuts):
        total.add(part, np.full((DENSITIES, 4), len(part)))
    return total


def same_bits(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("count", [1, 63, 127, 128, 129, 256, 300, 1001])
def test_the_cut_into_calls_does_not_show(count):
    sums = batches(count)
    one = accumulated(sums, [])
    assert same_bits(one, accumulated(sums, [1]))
    assert same_bits(one, accumulated(sums, sorted(np.random.default_rng(1).integers(0, count, 9))))
    assert same_bits(one, accumulated(sums, range(1, count)))
    for mine, other in zip(one.estimate(), accumulated(sums, [1]).estimate(), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("stop", [1, 100, 128, 200, 255, 256, 700])
def test_one_that_is_saved_goes_on_as_if_it_had_not_been(stop):
    sums = batches(1000)
    first = accumulated(sums[:stop], [])
    second = Accumulator((DENSITIES, ITEMS), (DENSITIES, 4))
    second.load_state_dict(first.state_dict())
    second.add(sums[stop:], np.full((DENSITIES, 4), 1000 - stop))
    assert same_bits(second, accumulated(sums, []))


def test_a_state_of_another_shape_is_refused():
    state = accumulated(batches(3), []).state_dict()
    with pytest.raises(ValueError, match="of another run"):
        Accumulator((DENSITIES, ITEMS + 1), (DENSITIES, 4)).load_state_dict(state)


def test_means_errors_and_groups_are_those_of_all_values():
    sums = batches(300)
    total = accumulated(sums, [])
    last = batches(1, seed=5)[0] / BATCH * 100
    total.add_last(last, np.full((DENSITIES, 4), 7), 100)
    count = 300 * BATCH + 100
    all_sums = sums.sum(axis=0) + last
    mean, error = total.estimate()
    np.testing.assert_allclose(mean, all_sums[..., 0] / count, rtol=1e-14)
    variance = all_sums[..., 1] / count - mean**2
    np.testing.assert_allclose(error, np.sqrt(variance / (count - 1)), rtol=1e-12)
    np.testing.assert_allclose(total.mean_square(), all_sums[..., 1] / count, rtol=1e-14)
    groups = total.groups()
    assert groups.sizes.sum() == count == total.num_realisations
    assert groups.sizes.tolist() == [4 * BATCH] * 75 + [100]
    np.testing.assert_allclose(groups.means, mean, rtol=1e-14)
    np.testing.assert_allclose(groups.sums[3], sums[12:16, ..., 0].sum(axis=0), rtol=1e-14)
    assert (total.histogram() == 307).all()


def test_the_error_of_a_mean_whose_square_is_no_number():
    scale = 1e-210
    sums = batches(100)
    tiny = sums * [scale, 0.0]  # the squares underflow
    error = accumulated(tiny, []).estimate()[1]
    between = (sums[..., 0] / BATCH).std(axis=0, ddof=1) / np.sqrt(100) * scale
    np.testing.assert_allclose(error, between, rtol=1e-9)
    assert np.isnan(accumulated(tiny[:1], []).estimate()[1]).all()


def test_a_short_batch_is_the_last_one_and_is_not_saved():
    total = accumulated(batches(2), [])
    saved = total.state_dict()
    total.add_last(batches(1)[0], np.ones((DENSITIES, 4), dtype=np.int64), 5)
    assert np.array_equal(saved["node_sums"], total.state_dict()["node_sums"])
    with pytest.raises(ValueError, match="nothing can follow a short batch"):
        total.add(batches(1), np.zeros((DENSITIES, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="1 to 16383 realisations, got 16384"):
        total.add_last(batches(1)[0], np.zeros((DENSITIES, 4), dtype=np.int64), BATCH)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    rng = np.random.default_rng(2)
    equal = Groups(rng.normal(size=(5, 1, 1)), np.full(5, 10))
    error = (equal.sums / 10).std(ddof=1) / np.sqrt(5)
    assert jackknife(lambda means: means[0, 0], equal).standard_error == pytest.approx(error, rel=1e-9)
    sizes = np.array([100] * 40 + [30])
    values = rng.normal(3, 1, size=(41, 1, 1)) * np.sqrt(1 / sizes)[:, None, None] + 2
    groups = Groups(values * sizes[:, None, None], sizes)
    found = jackknife(lambda means: means[0, 0], groups)
    between = ((sizes * (values[:, 0, 0] - groups.means[0, 0]) ** 2) / 40).sum()  # of one value, from group means
    assert found.value == pytest.approx(groups.means[0, 0])
    assert found.standard_error == pytest.approx(np.sqrt(between / sizes.sum()), rel=0.02)
    assert found.high - found.value == pytest.approx(2.02 * found.standard_error, rel=0.01)  # Student's, 40 degrees


def test_the_jackknife_covers_what_it_says():
    """The interval of a ratio of means holds the true one 95 times in 100."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        values = rng.exponential([[1.0, 2.0]], size=(20, 200, 2))
        groups = Groups(values.sum(axis=1)[:, None, :], np.full(20, 200))
        found = jackknife(lambda means: means[0, 0] / means[0, 1], groups)
        hits += found.low <= 0.5 <= found.high
    assert 366 <= hits <= 393  # 380, of standard deviation 4.4


def test_one_group_has_no_interval():
    found = jackknife(lambda means: means[0], Groups(np.ones((1, 1, 2)), np.array([10])))
    assert found.value.tolist() == [0.1, 0.1] and np.isnan([found.standard_error, found.low, found.high]).all()
