"""Golden vectors of the published rules: confidences and what is committed, logits and their confidence.

Through decode_step_, and through select_and_commit_ from statistics given to it.
"""

from __future__ import annotations

import math

import pytest
import torch
from decode_oracle import (
    MASK,
    Inputs,
    decode,
    rows_of_confidence,
    select,
)

from tokenweave_ops import DecodeRequests, RowScan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
inf, nan = math.inf, math.nan


CONFIDENCE = [0.95, 0.80, 0.70, 0.76, 0.60, 0.91, 0.74, 0.76]

# (kappa, tau, W, which are masked) -> what is committed.
LOCAL_LEAP = [
    ((0.9, 0.75, 0, "11111111"), "10000100"),
    ((0.9, 0.75, 1, "11111111"), "11000100"),
    ((0.9, 0.75, 2, "11111111"), "11010101"),
    ((0.9, 0.75, 2, "01111101"), "00010101"),
    ((0.9, 0.75, 2, "00000000"), "00000000"),
    ((0.99, 0.5, 8, "11111111"), "10000000"),  # no anchor: the first alone
    ((0.9, 0.99, 4, "11111111"), "10000000"),  # anchors too are held against tau
    ((1.1, 0.0, 8, "11111111"), "10000000"),
    ((0.9, 0.0, 1, "11111111"), "11001110"),
    ((0.0, 0.0, 0, "11111111"), "11111111"),
]
FACTOR = [
    ((CONFIDENCE, 0.25), 1),
    ((CONFIDENCE, 0.5), 2),
    ((CONFIDENCE, 1.0), 3),
    ((CONFIDENCE, 1.5), 5),
    ((CONFIDENCE, 2.0), 6),
    (([0.99, 0.98, 0.97, 0.96], 1.0), 4),
    (([0.99, 0.98, 0.97, 0.10], 1.0), 4),  # the last alone fails, and is committed: the published loop
    (([0.99, 0.98, 0.20, 0.10], 1.0), 2),
    (([0.99, 0.10], 1.0), 2),
    (([0.9], 1.0), 1),
    (([0.1], 1.0), 1),
]  # fmt: skip


def bits(text: str) -> list[bool]:
    return [c == "1" for c in text]


def both_ways(backend, confidence: list[float], masked: list[bool], **numbers):
    """The step's commit mask, found by the selection alone from these confidences, and from rows that have them."""
    given = torch.tensor([confidence])
    n = len(confidence)
    requests = DecodeRequests.make(1, n, **numbers)
    tokens = torch.where(torch.tensor([masked]), MASK, 0)
    candidates = torch.arange(2, 2 + n)[None]
    statistics = torch.full((1, n, 4), nan)
    statistics[..., 0] = given
    selected = select(backend, RowScan(candidates, statistics), tokens, requests)
    decoded = decode(backend, Inputs(rows_of_confidence(given), tokens, requests))
    assert torch.equal(selected.committed, decoded.committed)
    assert torch.equal(selected.tokens, torch.where(selected.committed, candidates, tokens))
    found = decoded.statistics[..., 0][torch.tensor([masked])]
    torch.testing.assert_close(found, given[torch.tensor([masked])], rtol=1e-5, atol=0)
    return selected.committed[0].tolist()


@pytest.mark.parametrize(("numbers", "expected"), LOCAL_LEAP, ids=str)
def test_local_leap_goldens(backend, numbers, expected):
    kappa, tau, radius, masked = numbers
    committed = both_ways(
        backend, CONFIDENCE, bits(masked), policy="local_leap", threshold=kappa, relaxed_threshold=tau, radius=radius
    )
    assert committed == bits(expected)


@pytest.mark.parametrize(("numbers", "expected"), FACTOR, ids=str)
def test_factor_goldens(backend, numbers, expected):
    confidence, factor = numbers
    committed = both_ways(backend, confidence, [True] * len(confidence), policy="factor", threshold=factor)
    first = sorted(range(len(confidence)), key=lambda i: -confidence[i])[:expected]
    assert [i for i, is_committed in enumerate(committed) if is_committed] == sorted(first)


@pytest.mark.parametrize(
    ("policy", "threshold", "expected"),
    [("threshold", 0.755, "11010101"), ("threshold", 2.0, "10000000"), ("topk", 0.0, "11000100")],
)
def test_goldens_of_the_simple_policies(backend, policy, threshold, expected):
    steps = 3  # of 8 masks: 3 in the first
    assert both_ways(backend, CONFIDENCE, [True] * 8, policy=policy, threshold=threshold, steps=steps) == bits(expected)


def test_a_lone_logit_over_a_real_vocabulary(backend):
    """c = e^L / (e^L + 126463), from both sides of the published thresholds; every L is a bf16 number."""
    vocab, logits = 126464, [12.8125, 12.875, 13.9375, 14.0, 16.0, 0.0]
    golden = torch.tensor([0.743606, 0.755339, 0.899329, 0.904848, 0.985968, 1 / 126464])
    rows = torch.zeros(1, 6, vocab, dtype=torch.bfloat16)
    ids = torch.tensor([7, 126463, 4096, 0, 65535, 0])
    rows[0, torch.arange(6), ids] = torch.tensor(logits, dtype=torch.bfloat16)
    requests = DecodeRequests.make(1, 6, policy="threshold", threshold=0.9)
    outcome = decode(backend, Inputs(rows, torch.full((1, 6), 126336), requests, mask_id=126336))
    assert torch.equal(outcome.candidates[0], ids)
    torch.testing.assert_close(outcome.statistics[0, :, 0], golden, rtol=2e-6, atol=0)
    exact = torch.tensor([math.exp(x) / (math.exp(x) + vocab - 1) for x in logits])
    torch.testing.assert_close(outcome.statistics[0, :, 0], exact, rtol=1e-5, atol=0)
    assert outcome.committed[0].tolist() == bits("000110")
