"""Logits that stand for "not this one": the large negative numbers that grammar masks and padded heads leave."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from decode_oracle import MASK, Inputs, assert_matches_reference, decode, peaked_logits, scan, select

from tokenweave_ops import DecodeRequests, RowScan

SENTINELS = [-1e9, -1e10, -1e30, torch.finfo(torch.float32).min]
POLICY_NAMES = ["threshold", "entropy_threshold", "margin", "topk"]


def requests(batch: int, block_length: int, **changes) -> DecodeRequests:
    return DecodeRequests.make(
        batch, block_length, policy=[POLICY_NAMES[i % 4] for i in range(batch)], threshold=0.5, **changes
    )


@pytest.mark.parametrize("sentinel", SENTINELS)
@pytest.mark.parametrize("where", ["all but three", "the mask id", "a whole segment", "every other"])
def test_a_sentinel_is_no_more_than_improbable(backend, sentinel, where):
    """Such a row once came out as certain: its exponents had no fraction left, and NaN was taken for 1."""
    vocab = 4500
    logits = peaked_logits(4, 3, vocab, seed=3)
    keep = logits.clone()
    if where == "all but three":
        logits[:] = sentinel
        logits[..., [5, 700, 4400]] = keep[..., [5, 700, 4400]].clamp(-3, 3)
    elif where == "the mask id":
        logits[..., MASK] = sentinel
    elif where == "a whole segment":
        logits[..., :4096] = sentinel
    else:
        logits[..., ::2] = sentinel
    inputs = Inputs(logits, torch.full((4, 3), MASK), requests(4, 3))
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert (outcome.counts[:, 2] == 0).all(), "no bad row"


@pytest.mark.parametrize("level", [-1e10, 1e10])
def test_a_row_of_sentinels_is_bad(backend, level):
    logits = torch.full((4, 2, 300), level)
    inputs = Inputs(logits, torch.full((4, 2), MASK), requests(4, 2))
    outcome = decode(backend, inputs)
    assert (outcome.counts[:, 2] == 2).all()
    assert (outcome.candidates == 0).all() and (outcome.statistics[..., 0] == 0).all()
    assert_matches_reference(outcome, inputs)


def test_a_segment_that_was_possible_before_counts_in_the_divergence(backend):
    """All of it is -inf now; the other segments keep the row alive. Its share of the row before must not be lost."""
    vocab = 9000
    now = peaked_logits(2, 2, vocab, seed=4)
    before = now.clone()
    now[..., :4096] = -torch.inf
    before[..., 17] = now.amax(-1)  # about half of the mass was there
    given = DecodeRequests.make(2, 2, policy="klass")
    given.stable_steps[:] = 1
    inputs = Inputs(now, torch.full((2, 2), MASK), given, options={"previous_logits": before})
    outcome = decode(backend, inputs)
    assert (outcome.statistics[..., 3] > 0.1).all()
    assert (outcome.stable_steps == 0).all(), "not stable"
    assert_matches_reference(outcome, inputs)


def test_a_sequence_without_candidates_keeps_its_step(backend):
    """All masked positions wait for rows: no noise has been used up and no scheduled step."""
    options = {"rows": torch.full((1, 3), -1)}
    inputs = Inputs(peaked_logits(1, 3, 40, seed=5), torch.full((1, 3), MASK), requests(1, 3), options=options)
    outcome = decode(backend, inputs)
    assert outcome.counts.tolist() == [[0, 3, 0, 0]]
    assert outcome.step.tolist() == [0] and outcome.steps_left.tolist() == [3]


def test_a_row_in_which_nothing_is_allowed_has_no_candidate(backend):
    options = {"forbidden": torch.tensor([0, 2])}
    inputs = Inputs(torch.zeros(1, 2, 3), torch.full((1, 2), MASK), requests(1, 2), options=options)
    outcome = decode(backend, inputs)
    assert (outcome.candidates == -1).all() and outcome.statistics.isnan().all()
    assert outcome.counts.tolist() == [[0, 2, 0, 0]]


def test_a_lost_row_of_a_scan_is_told_by_the_selection(backend):
    """-2 in a scan's candidates: a CPU raises, a GPU skips the request."""
    given = requests(1, 3)
    inputs = Inputs(peaked_logits(1, 3, 40, seed=6), torch.full((1, 3), MASK), given)
    found = scan(backend, inputs)
    lost = RowScan(torch.tensor([[-2, 5, 6]]), found.statistics)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match="select_and_commit_: request 0: rows must name rows of logits"):
            select(backend, lost, inputs.tokens, given)
    else:
        outcome = select(backend, lost, inputs.tokens, given)
        assert outcome.counts.tolist() == [[0, 3, 0, 128]] and torch.equal(outcome.tokens, inputs.tokens)


OFFSETS = """
import torch, tokenweave_ops as tw
base = torch.randn(1, 8, 3000, generator=torch.Generator().manual_seed(0)).mul(2).round(decimals=2)
for offset in (0.0, 1024.0, 16384.0):
    logits = base + offset
    step = tw.decode_step_(logits, torch.full((1, 8), 1), tw.DecodeRequests.make(1, 8), mask_id=1)
    exact = logits.double().softmax(-1).gather(-1, step.candidates.unsqueeze(-1)).squeeze(-1)
    error = ((step.statistics[..., 0] - exact).abs() / exact).max().item()
    assert error < 1e-5, (offset, error)
"""


@pytest.mark.no_launch
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_a_constant_added_to_a_row_costs_no_accuracy(isa):
    """Without a fused multiply-add a large logit times log2(e) loses what its size rounds away."""
    environment = os.environ | {"TOKENWEAVE_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", OFFSETS], env=environment, check=True)
