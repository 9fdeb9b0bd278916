"""Exact decisions at a threshold, and rows that are out of the ordinary: huge, infinite, NaN, tied."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from decode_oracle import (
    MASK,
    Inputs,
    all_policies,
    assert_matches_reference,
    assert_selected,
    decode,
    make_inputs,
    peaked_logits,
)

from tokenweave_ops import POLICIES, DecodeRequests

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
inf, nan = math.inf, math.nan


# ---------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [9, 4099])
def test_exact_decides_as_float64_does(backend, vocab, dtype):
    """Thresholds are the fp32 numbers nearest to the float64 confidences: closer than 1e-7, above some, below others.
    The rows in question stand beside an anchor, so local_leap holds them against its relaxed threshold."""
    num_rows = 24
    rows = peaked_logits(num_rows, vocab, seed=vocab, dtype=dtype, least=0.3)
    confidence = rows.double().softmax(dim=-1).amax(dim=-1)
    near = confidence.float()
    sure = torch.zeros(num_rows, vocab, dtype=dtype)
    sure[:, 3] = 40.0
    names = ["threshold", "local_leap", "klass"] * (num_rows // 3)
    is_relaxed = torch.tensor([name == "local_leap" for name in names])
    requests = DecodeRequests.make(
        num_rows, 2, policy=names, threshold=torch.where(is_relaxed, 0.9999, near),
        relaxed_threshold=torch.where(is_relaxed, near, 0.01),
    )  # fmt: skip
    requests.stable_steps[:] = 1  # for klass: with this step, stable for two
    logits = torch.stack([rows, sure], dim=1)
    options = {"exact": True, "previous_logits": logits}
    inputs = Inputs(logits, torch.full((num_rows, 2), MASK), requests, options=options)
    outcome = decode(backend, inputs)
    passes = confidence >= near.double()
    for kind in passes.view(-1, 3).unbind(dim=1):
        assert kind.any() and not kind.all(), "both sides must occur"
    assert torch.equal(outcome.committed, torch.stack([passes, torch.ones_like(passes)], dim=1))
    toward_zero = torch.where(passes, near, torch.from_numpy(numpy.nextafter(near.numpy(), numpy.float32(0))))
    assert torch.equal(outcome.statistics[:, 0, 0], toward_zero), "float64, rounded toward zero"
    assert_matches_reference(outcome, inputs)


def test_exact_changes_nothing_elsewhere(backend):
    inputs = all_policies(9, 300, seed=12)
    assert decode(backend, inputs) == decode(backend, inputs.but(exact=True))


# ------------------------------------------------------------------------------------------------------------- extremes


def extreme_rows(vocab: int, dtype) -> torch.Tensor:
    rows = peaked_logits(14, vocab, seed=2)
    rows[0] = rows[0] * 0 - 3e4
    rows[1] = torch.where(torch.arange(vocab) % 2 == 0, 3e4, -3e4)
    rows[2, 5], rows[2, 6] = 3e4, 3e4 - 16
    rows[3] = -inf
    rows[4] = nan
    rows[5, 7] = inf
    rows[6, 7], rows[6, 4] = inf, inf
    rows[7, MASK] = inf
    rows[8, MASK] = rows[8].max() + 3  # the mask id is the largest, and counts in the sum
    rows[9, ::3] = nan
    rows[10, ::2] = -inf
    rows[11] = -inf
    rows[11, MASK] = 2.0  # nothing is left but the mask
    rows[12] = -inf
    rows[12, vocab - 1] = -5.0
    rows[13, MASK] = nan
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [8, 4097])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_rows(backend, vocab, dtype, temperature):
    rows = extreme_rows(vocab, dtype)
    requests = DecodeRequests.make(
        1, 14, policy="local_leap", features=("entropy", "margin", "sampling"), temperature=temperature, seed=3
    )  # fmt: skip
    inputs = Inputs(rows[None], torch.full((1, 14), MASK), requests)
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert outcome.counts[0, 2] == 6, "rows without a finite maximum"
    assert (outcome.statistics[0, [3, 4, 5, 6, 7, 11]] == torch.tensor([0.0, inf, 0.0, nan]))[:, :3].all()
    assert outcome.candidates[0, [3, 4, 5, 6, 7, 11]].tolist()[:4] == [0, 0, 7, 4]


@pytest.mark.parametrize("vocab", [8, 4097])
def test_extreme_rows_of_the_step_before(backend, vocab):
    """The divergence is inf where the row before lacks a finite maximum, or an id that now has a probability."""
    logits = peaked_logits(1, 9, vocab, seed=1)
    previous = logits.clone()
    previous[0, 0] = -inf
    previous[0, 1] = nan
    previous[0, 2, 5] = inf
    previous[0, 3, MASK] = inf
    previous[0, 4, 2] = -inf
    previous[0, 5, 3] = nan
    previous[0, 6, MASK] = -inf
    logits[0, 7, ::2] = previous[0, 7, ::2] = -inf  # what is impossible in both does not count
    previous[0, 8] = 30.0
    requests = DecodeRequests.make(1, 9, policy="klass", relaxed_threshold=100.0)
    requests.stable_steps[:] = 0
    inputs = Inputs(logits, torch.full((1, 9), MASK), requests, options={"previous_logits": previous})
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert outcome.statistics[0, :, 3].isinf().tolist() == [True] * 7 + [False] * 2
    assert outcome.stable_steps[0].tolist() == [0] * 7 + [1] * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_of_bad_rows_still_ends(backend, policy):
    """Each step commits something, whatever the rows hold."""
    inputs = make_inputs(2, 5, 30, policy=policy, masked=1.0, steps=5)
    inputs.logits[0], inputs.logits[1] = nan, inf
    for _ in range(5):
        outcome = decode(backend, inputs)
        assert (
            outcome.counts[:, 0] >= (inputs.tokens == MASK)[:, :].any(dim=1).long() * (outcome.counts[:, 2] > 0)
        ).all()
        assert_selected(outcome, inputs)
        inputs = inputs.but(
            tokens=outcome.tokens, step=outcome.step, steps_left=outcome.steps_left, stable_steps=outcome.stable_steps
        )
    assert (outcome.counts[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_take_the_lowest_id(backend, dtype):
    """Ties within a vector, across vectors, warps and pieces."""
    vocab = 4097
    ties = [(0, 4096), (2, 3), (7, 8), (31, 32), (255, 256), (1023, 3000), (2047, 2048), (4095, 4096), (5, 4000)]
    logits = torch.zeros(1, len(ties) + 1, vocab, dtype=dtype)
    for j, pair in enumerate(ties):
        logits[0, j, list(pair)] = 8.0
    requests = DecodeRequests.make(1, len(ties) + 1, policy="topk_margin")
    inputs = Inputs(logits, torch.full((1, len(ties) + 1), MASK), requests)
    outcome = decode(backend, inputs)
    assert outcome.candidates[0].tolist() == [low for low, _ in ties] + [0]
    assert (outcome.statistics[0, :, 2] == 0).all(), "two equal largest: margin 0"
    assert_matches_reference(outcome, inputs)


def test_equal_logits_of_a_vocabulary_with_many_pieces(backend):
    """More than 32 of 4096 ids: a lane folds two pieces, and must keep the first."""
    vocab = 33 * 4096
    logits = torch.zeros(1, 1, vocab, dtype=torch.bfloat16)
    logits[0, 0, [5, 32 * 4096 + 3]] = 8.0
    outcome = decode(backend, Inputs(logits, torch.full((1, 1), MASK), DecodeRequests.make(1, 1)))
    assert outcome.candidates.tolist() == [[5]]


@pytest.mark.parametrize("mask_id", [0, 1, 4096, 2500])
def test_the_mask_is_never_committed(backend, mask_id):
    """Even as the largest logit by far; then everything else has little confidence, as it counts in the sum."""
    logits = peaked_logits(1, 4, 4097, seed=3)
    logits[..., mask_id] = 25.0
    requests = DecodeRequests.make(1, 4, policy="threshold", threshold=0.5, features=("entropy", "margin"))
    inputs = Inputs(logits, torch.full((1, 4), mask_id), requests, mask_id=mask_id)
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert not (outcome.candidates == mask_id).any() and (outcome.statistics[..., 0] < 1e-3).all()
