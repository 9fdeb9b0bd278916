"""Temperature: the noise is that of the reference, and draws from the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from decode_oracle import (
    MASK,
    Inputs,
    assert_matches_reference,
    decode,
    make_inputs,
    scan,
)

from tokenweave_ops import DecodeRequests
from tokenweave_ops.reference import anchor_decoding as reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
inf, nan = math.inf, math.nan


SEEDS = [5, -6, 2**40 + 7, -(2**63)]


def sampled_inputs(block_length, vocab, temperature, *, seed=0, dtype=torch.float32) -> Inputs:
    """Masked everywhere; no two noisy logits of a row are within 1e-3 of each other at the top."""
    inputs = make_inputs(
        4, block_length, vocab, masked=1.0, temperature=temperature, noise_seed=SEEDS, dtype=dtype,
        features=("sampling",),
    )  # fmt: skip
    inputs.requests.step = torch.tensor([0, 1, 2**31, 2**33 + 5])
    inputs.logits = torch.randn(inputs.logits.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for b, j in [(b, j) for b in range(4) for j in range(block_length)]:
        noise = reference.gumbel_noise(vocab, SEEDS[b], j, int(inputs.requests.step[b]))
        noisy = inputs.logits[b, j].double() + float(inputs.requests.temperature[b]) * noise
        noisy[MASK] = -inf
        top = noisy.topk(2)
        if top.values[0] - top.values[1] < 1e-3:
            inputs.logits[b, j, top.indices[0]] += 1.0
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 63, 1001, 4097])
def test_sampled_tokens_are_those_of_the_reference(backend, vocab, dtype):
    inputs = sampled_inputs(3, vocab, [0.0, 0.3, 1.0, 5.0], dtype=dtype, seed=vocab)
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    if vocab > 63:
        assert not torch.equal(outcome.candidates[3], inputs.logits[3].argmax(dim=-1)), "noise must change some"


def test_noise_is_new_in_every_step_and_place_and_seed(backend):
    vocab = 500
    inputs = make_inputs(
        4, 16, vocab, masked=1.0, policy="topk", temperature=1.0, noise_seed=[7, 7, 8, 7 + 2**32], steps=16,
        features=("sampling",),
    )  # fmt: skip
    inputs.logits = torch.zeros(4, 16, vocab)
    inputs.requests.block_start = torch.tensor([2, 5, 2, 2])
    first = scan(backend, inputs).candidates
    assert torch.equal(first[0], first[1]), "the same place in the block, wherever the block begins"
    others = [first[2], first[3], first[0].roll(1)]
    for step in (1, 2**32):
        inputs.requests.step[:] = step
        others.append(scan(backend, inputs).candidates[0])
    for other in others:
        assert (other == first[0]).sum() <= 2, "equal by chance, in one of 500"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_are_those_of_the_softmax(backend, temperature):
    """Chi-square over 12 ids, one of them the mask, one forbidden; the 99.9 % quantile of 9 degrees is 27.9."""
    vocab, draws = 12, 2048 if backend.name == "simt" else 8192
    block = 1024
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    logits = row.expand(1, 1, vocab)
    requests = DecodeRequests.make(
        draws // block, block, policy="topk", temperature=temperature, seed=list(range(draws // block))
    )  # fmt: skip
    tokens = torch.full((draws // block, block), MASK)
    rows = torch.zeros(draws // block, block, dtype=torch.int64)
    options = {"rows": rows, "forbidden": torch.tensor([4])}
    found = scan(backend, Inputs(logits.contiguous(), tokens, requests, options=options)).candidates
    count = torch.bincount(found.flatten(), minlength=vocab)
    assert count[MASK] == 0 and count[4] == 0
    allowed = torch.ones(vocab, dtype=torch.bool)
    allowed[[MASK, 4]] = False
    wanted = draws * (row.double()[allowed] / temperature).softmax(dim=0)
    assert ((count[allowed] - wanted) ** 2 / wanted).sum() < 27.9


def test_confidence_is_that_of_the_untempered_row(backend):
    inputs = sampled_inputs(4, 40, 3.0)
    outcome = decode(backend, inputs)
    p = inputs.logits.double().softmax(dim=-1).gather(-1, outcome.candidates[..., None])[..., 0]
    torch.testing.assert_close(outcome.statistics[..., 0].double(), p, rtol=1e-5, atol=0)
