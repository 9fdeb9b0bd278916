"""Laws of decoding that hold over generated inputs: progress, confinement, and how policies include one another. A file
of its own: a GPU server may have pytest and no hypothesis."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from decode_oracle import (
    ALL_FEATURES,
    MASK,
    Inputs,
    assert_selected,
    decode,
    make_inputs,
    peaked_logits,
    select,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tokenweave_ops import POLICIES, DecodeRequests, RowScan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

seeds = st.integers(0, 2**20)
fractions = st.integers(0, 32).map(lambda n: n / 32)
radii = st.integers(0, 12)
# The backend fixture holds no state that an example could leave behind.
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
some = settings(few, max_examples=30)


@st.composite
def steps(draw, most_positions: int = 9, most_ids: int = 40) -> Inputs:
    """A batch of any policies and numbers over random rows."""
    batch = draw(st.integers(1, 3))
    names = draw(st.lists(st.sampled_from(POLICIES), min_size=batch, max_size=batch))
    return make_inputs(
        batch, draw(st.integers(1, most_positions)), draw(st.integers(2, most_ids)), policy=names,
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(seeds), masked=draw(st.sampled_from([0.1, 0.5, 1.0])),
        threshold=[draw(fractions) for _ in names], relaxed_threshold=[draw(fractions) for _ in names],
        radius=draw(radii), steps=draw(st.integers(1, 12)), features=ALL_FEATURES,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the step as a whole


@few
@given(inputs=steps())
def test_progress_and_confinement(backend, inputs):
    """Each step commits a token wherever a mask is left, into masked positions of the block alone, never the mask, and
    for good; a block of n masks takes at most n steps."""
    start, block = inputs.requests.block_start, inputs.requests.block_length
    position = start[:, None] + torch.arange(block)
    total = (inputs.tokens.gather(1, position) == MASK).sum(dim=1)
    committed = torch.zeros_like(total)
    for _ in range(int(total.max())):
        outcome = decode(backend, inputs)
        assert_selected(outcome, inputs)
        masked = inputs.tokens.gather(1, position) == MASK
        assert torch.equal(outcome.counts[:, 0] > 0, masked.any(dim=1)), "progress"
        assert not (outcome.committed & ~masked).any(), "only masked positions"
        after = outcome.tokens.gather(1, position)
        assert torch.equal(after != MASK, ~masked | outcome.committed), "a committed token is not the mask"
        changed = torch.zeros_like(inputs.tokens, dtype=torch.bool).scatter_(1, position, outcome.committed)
        assert torch.equal(outcome.tokens[~changed], inputs.tokens[~changed]), "nothing else changes"
        assert ((outcome.tokens[changed] >= 0) & (outcome.tokens[changed] < inputs.logits.shape[-1])).all()
        committed += outcome.counts[:, 0]
        inputs = inputs.but(
            tokens=outcome.tokens, step=outcome.step, steps_left=outcome.steps_left, stable_steps=outcome.stable_steps
        )
    assert torch.equal(committed, total)


@few
@given(inputs=steps(most_ids=300), order=st.randoms(use_true_random=False))
def test_a_sequence_is_the_same_in_any_batch(backend, inputs, order):
    """Bit for bit: alone, duplicated, in another order."""
    inputs.requests.temperature[::2] = 0.7
    together = decode(backend, inputs)
    chosen = [order.randrange(inputs.requests.batch) for _ in range(5)]
    assert decode(backend, inputs.of(*chosen)) == together.of(*chosen)
    assert decode(backend, inputs.of(0)) == together.of(0)


@few
@given(seed=seeds, vocab=st.integers(2, 300), block=st.integers(1, 8))
def test_permuting_the_vocabulary_permutes_the_tokens(backend, seed, vocab, block):
    """Without ties; the confidence keeps its value up to the order of additions."""
    inputs = make_inputs(1, block, vocab, policy="topk", masked=1.0, seed=seed)
    assume((inputs.logits.topk(2, dim=-1).values.diff() < 0).all())
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    moved = inputs.but(logits=inputs.logits[..., order], mask_id=int(place[MASK]))
    moved.tokens = torch.full_like(inputs.tokens, moved.mask_id)
    one, other = decode(backend, inputs), decode(backend, moved)
    assert torch.equal(other.candidates, place[one.candidates])
    torch.testing.assert_close(other.statistics[..., 0], one.statistics[..., 0], rtol=1e-5, atol=0)


@few
@given(inputs=steps(), shift=st.integers(-64, 64))
def test_a_constant_added_to_a_row_changes_nothing(backend, inputs, shift):
    """Logits that are multiples of 1/8 keep all their digits, so every difference between them is the same number."""
    inputs = inputs.but(logits=(inputs.logits.float() * 8).round().clamp(-160, 160) / 8)
    inputs.options["previous_logits"] = inputs.options["previous_logits"].float()
    one, other = decode(backend, inputs), decode(backend, inputs.but(logits=inputs.logits + shift))
    assert torch.equal(one.candidates, other.candidates)
    torch.testing.assert_close(one.statistics[..., :3], other.statistics[..., :3], rtol=1e-5, atol=1e-6, equal_nan=True)


@few
@given(inputs=steps(), exponent=st.integers(-30, -12))
def test_a_temperature_near_zero_equals_zero(backend, inputs, exponent):
    """Where the gap to the second logit is wider than the noise, which is below 23 in fp32."""
    inputs = inputs.but(logits=peaked_logits(*inputs.logits.shape, seed=3, dtype=inputs.logits.dtype))
    two = inputs.logits.index_fill(-1, torch.tensor([MASK]), -math.inf).topk(2, dim=-1).values
    assume(((two[..., 0] - two[..., 1]) > 30 * 2.0**-12).all())
    cold = decode(backend, inputs)
    warm = inputs.but(temperature=torch.full((inputs.requests.batch,), 2.0**exponent))
    assert decode(backend, warm) == cold


# -------------------------------------------------------------------------------- the selection, from any confidences


@st.composite
def blocks(draw) -> tuple[RowScan, torch.Tensor]:
    """Confidences with many ties, and tokens of which some are masked, at least one."""
    block = draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(seeds))
    steps_of_confidence = draw(st.sampled_from([8, 64, 2**20]))
    statistics = torch.randint(steps_of_confidence + 1, (1, block, 4), generator=generator) / steps_of_confidence
    tokens = torch.where(torch.rand(1, block, generator=generator) < draw(fractions), MASK, 0)
    tokens[0, draw(st.integers(0, block - 1))] = MASK
    return RowScan(torch.randint(2, 99, (1, block), generator=generator), statistics), tokens


def committed(backend, found: RowScan, tokens: torch.Tensor, policy: str, threshold, relaxed=0.0, radius=0) -> set[int]:
    requests = DecodeRequests.make(
        1, tokens.shape[1], policy=policy, threshold=threshold, relaxed_threshold=relaxed, radius=radius,
        features=ALL_FEATURES,
    )  # fmt: skip
    return set(select(backend, found, tokens, requests).committed[0].nonzero().flatten().tolist())


@some
@given(given_block=blocks(), kappa=fractions, tau=fractions, radius=radii)
def test_local_leap_between_two_thresholds(backend, given_block, kappa, tau, radius):
    def leap(*numbers):
        return committed(backend, *given_block, "local_leap", *numbers)

    def threshold(theta):
        return committed(backend, *given_block, "threshold", theta)

    tau = min(kappa, tau)
    assert leap(kappa, tau, 0) == threshold(kappa), "no neighbours"
    assert leap(kappa, kappa, radius) == threshold(kappa), "neighbours get no discount"
    assert threshold(kappa) <= leap(kappa, tau, radius) <= threshold(tau)


@some
@given(given_block=blocks(), tau=fractions, radius=radii)
def test_local_leap_at_the_ends(backend, given_block, tau, radius):
    found, tokens = given_block
    masked = {i for i, token in enumerate(tokens[0].tolist()) if token == MASK}
    first = committed(backend, found, tokens, "topk", 0.0)
    assert len(first) == 1 and first <= masked
    assert committed(backend, found, tokens, "local_leap", 1.5, tau, radius) == first, "no anchor: greedy"
    assert committed(backend, found, tokens, "local_leap", 0.0, 0.0, radius) == masked, "the whole block"
    assert committed(backend, found, tokens, "threshold", 0.0) == masked


@some
@given(given_block=blocks(), numbers=st.tuples(fractions, fractions, fractions), two_radii=st.tuples(radii, radii))
def test_local_leap_is_monotone(backend, given_block, numbers, two_radii):
    """More with a wider window, fewer with a higher tau or kappa."""
    low, middle, high = sorted(numbers)
    narrow, wide = sorted(two_radii)

    def leap(*rest):
        return committed(backend, *given_block, "local_leap", *rest)

    assert leap(high, low, narrow) <= leap(high, low, wide)
    assert leap(high, middle, wide) <= leap(high, low, wide)
    assert leap(high, low, wide) <= leap(middle, low, wide)


@some
@given(given_block=blocks(), kappa=fractions, tau=fractions)
def test_a_window_over_the_whole_block(backend, given_block, kappa, tau):
    found, tokens = given_block
    tau = min(kappa, tau)
    has_anchor = bool(((found.statistics[0, :, 0] >= kappa) & (tokens[0] == MASK)).any())
    for radius in (tokens.shape[1] - 1, 2**40):
        wide = committed(backend, found, tokens, "local_leap", kappa, tau, radius)
        expected = ("threshold", tau) if has_anchor else ("topk", 0.0)
        assert wide == committed(backend, found, tokens, *expected)


@some
@given(given_block=blocks(), policy=st.sampled_from(POLICIES), threshold=fractions, relaxed=fractions, radius=radii)
def test_reflecting_the_block_reflects_the_choice(backend, given_block, policy, threshold, relaxed, radius):
    """Without ties, which go by position."""
    found, tokens = given_block
    n = tokens.shape[1]
    for column in found.statistics[0].unbind(dim=-1):
        assume(len(set(column.tolist())) == n)
    reflected = RowScan(found.candidates.flip(1), found.statistics.flip(1))
    one = committed(backend, found, tokens, policy, threshold, relaxed, radius)
    other = committed(backend, reflected, tokens.flip(1), policy, threshold, relaxed, radius)
    assert other == {n - 1 - i for i in one}


@some
@given(given_block=blocks(), gamma=fractions, theta=fractions)
def test_prefix_policies_commit_the_first_ranks(backend, given_block, gamma, theta):
    """eb and factor commit more with larger numbers, and always the first ranks in their order."""
    found, tokens = given_block
    low, high = sorted((gamma, theta))
    for policy, column, sign in (("eb", 1, 1), ("factor", 0, -1)):
        fewer, more = (committed(backend, found, tokens, policy, number) for number in (low, high))
        values = {i: sign * float(found.statistics[0, i, column]) for i in range(tokens.shape[1])}
        ranked = sorted((i for i in values if tokens[0, i] == MASK), key=lambda i: (values[i], i))
        assert fewer == set(ranked[: len(fewer)]) and more == set(ranked[: len(more)])
        if policy == "eb":  # the published factor rule may commit a last candidate with a small f and not with a larger
            assert fewer <= more
