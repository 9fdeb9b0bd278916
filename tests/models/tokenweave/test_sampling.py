"""The next token: greedy, limited and drawn, against plain definitions and the frequencies they promise."""

import re
from math import exp, inf, log, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenweave_models.tokenweave.runner.sampling import (
    SamplingParams,
    distribution,
    greedy,
    next_tokens,
    sample,
    uniform,
)


def plain_distribution(logits, params) -> dict[int, float]:
    """The definition, token by token."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: params.top_k] if params.top_k else order
    weights = [exp((logits[token] - logits[kept[0]]) / params.temperature) for token in kept]
    shares = [weight / sum(weights) for weight in weights]
    reached, count = 0.0, 0
    while count < len(kept) and reached < params.top_p:
        reached += shares[count]
        count += 1
    return {token: share / sum(shares[:count]) for token, share in zip(kept[:count], shares[:count], strict=True)}


# ------------------------------------------------------------------------------------------------------------- greedy


def test_greedy_takes_the_lowest_of_the_largest():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [-inf, -inf, 0.0, -1.0]])
    assert greedy(logits).tolist() == [1, 0, 2]
    assert greedy(logits.to(torch.bfloat16)).tolist() == [1, 0, 2]


def test_nan_is_refused_and_never_a_token():
    logits = torch.tensor([[0.0, nan], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"^greedy: logits must be numbers, got NaN$"):
        greedy(logits)
    for bad in (nan, inf):
        with pytest.raises(ValueError, match=r"^distribution: logits must be numbers"):
            distribution(np.array([0.0, bad]), SamplingParams(temperature=1.0))


# ------------------------------------------------------------------------------------------------------------- limits

# Few values, so that ties are common; multiples of log 2, so that probabilities are not far apart.
LOGITS = st.lists(st.integers(-3, 3).map(lambda i: i * log(2)), min_size=1, max_size=12)


@given(
    logits=LOGITS, temperature=st.sampled_from([0.5, 1.0, 2.0]), top_k=st.integers(0, 14), top_p=st.floats(0.01, 0.999)
)
def test_the_distribution_is_the_definition(logits, temperature, top_k, top_p):
    params = SamplingParams(temperature, top_k, top_p)
    expected = plain_distribution(logits, params)
    # Where the sum reaches top_p within rounding, either count is right; nudged, both sides must agree.
    nudged = [plain_distribution(logits, SamplingParams(temperature, top_k, top_p + d)) for d in (-1e-9, 1e-9 * top_p)]
    tokens, probabilities = distribution(np.array(logits), params)
    if len({len(one) for one in nudged}) == 1:
        assert tokens.tolist() == list(expected)
        np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-12)
    assert probabilities.sum() == pytest.approx(1, rel=1e-12)
    assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize("top_p, count", [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.76, 4), (1.0, 4)])
def test_top_p_takes_the_fewest_that_reach_it(top_p, count):
    """Four tokens of exactly a quarter each."""
    tokens, probabilities = distribution(np.zeros(4), SamplingParams(1.0, top_p=top_p))
    assert tokens.tolist() == list(range(count))
    assert probabilities.tolist() == [1 / count] * count


def test_top_k_keeps_the_lowest_of_equal_tokens():
    logits = np.array([1.0, 0.0, 1.0, 2.0, 1.0])
    assert distribution(logits, SamplingParams(1.0, top_k=2))[0].tolist() == [3, 0]
    assert distribution(logits, SamplingParams(1.0, top_k=3))[0].tolist() == [3, 0, 2]
    assert distribution(logits, SamplingParams(1.0, top_k=9))[0].tolist() == [3, 0, 2, 4, 1]


def test_a_low_temperature_is_greedy_and_a_high_one_even():
    logits = np.array([0.0, 1.0, 0.9])
    tokens, probabilities = distribution(logits, SamplingParams(1e-3))
    assert tokens[0] == 1 and probabilities[0] == 1.0
    assert distribution(logits, SamplingParams(1e9))[1] == pytest.approx([1 / 3] * 3)


def test_masked_tokens_are_never_drawn():
    logits = np.array([-inf, 0.0, -inf, 0.0])
    drawn = {sample(logits, SamplingParams(1.0), 0, position) for position in range(200)}
    assert drawn == {1, 3}


# -------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(0.7, top_k=5), SamplingParams(1.3, top_p=0.8)])
def test_draws_have_the_frequencies_of_the_distribution(params):
    """A seed is a fixed set of draws: the chance that a right sampler was given one this odd is one in ten thousand."""
    logits = np.random.default_rng(3).normal(size=8)
    num_draws = 20_000
    drawn = [sample(logits, params, request=1, position=position) for position in range(num_draws)]
    tokens, probabilities = distribution(logits, params)
    counts = np.bincount(drawn, minlength=logits.size)
    assert counts.sum() == counts[tokens].sum() == num_draws
    assert chisquare(counts[tokens], probabilities * num_draws).pvalue > 1e-4


@settings(max_examples=200)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_draw_is_its_own_seed_request_and_position(seed, request, position):
    here = uniform(seed, request, position)
    assert 0 <= here < 1
    assert here == uniform(seed, request, position)
    others = [uniform(seed ^ 1, request, position), uniform(seed, request + 1, position)]
    assert here not in [*others, uniform(seed, request, position + 1), uniform(seed, position + 1, request)]


def test_draws_stay_what_they_were():
    """Who notes a seed gets the same text from it later and elsewhere."""
    assert uniform(0, 0, 0) == PINNED[0]
    assert uniform(2**64 - 1, 5, 7) == PINNED[1]


PINNED = (0.011546754286331562, 0.9587320438271981)


def test_rows_are_drawn_each_for_its_request():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator)
    params = SamplingParams(1.0, seed=9)
    together = next_tokens(logits, params, [4, 7, 5], [10, 1, 3])
    assert together == [
        sample(row.double().numpy(), params, *where)
        for row, where in zip(logits, [(4, 10), (7, 1), (5, 3)], strict=True)
    ]
    assert next_tokens(logits, SamplingParams(), [4, 7, 5], [10, 1, 3]) == logits.argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": nan}, "temperature must be at least 0, got nan"),
        ({"top_k": -1}, "top_k must be at least 0 (0: all tokens), got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"seed": -1}, "seed must be from 0 to 2**64 - 1, got -1"),
    ],
)
def test_bad_parameters_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^SamplingParams: {re.escape(message)}$"):
        SamplingParams(**values)
