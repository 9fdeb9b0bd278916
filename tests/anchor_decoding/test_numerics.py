"""Values against the float64 reference: every policy, dtypes, sizes, rows that are pointed at, lists of ids, klass.

decode_step_ is tested throughout; of its halves, select_and_commit_ by random statistics, and confidence_scan in
test_sampling.py and, as both must equal the whole bit for bit, in test_contract.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from decode_oracle import (
    ALL_FEATURES,
    MASK,
    Inputs,
    all_policies,
    assert_matches_reference,
    assert_selected,
    assert_statistics_close,
    decode,
    expect,
    expect_selection,
    make_inputs,
    peaked_logits,
    select,
)

from tokenweave_ops import POLICIES, DecodeRequests, RowScan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
inf, nan = math.inf, math.nan


# ----------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_matches_the_reference(backend, policy):
    number = POLICIES.index(policy)
    inputs = make_inputs(4, 13, 300, policy=policy, dtype=DTYPES[number % 3], seed=number)
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    if not policy.startswith("topk"):
        assert 4 < outcome.counts[:, 0].sum() < (inputs.tokens == MASK).sum(), "the numbers must let some pass"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 3, 31, 1000, 4096, 4097, 5003])
def test_statistics_of_every_vocabulary(backend, vocab, dtype):
    inputs = make_inputs(2, 4, vocab, dtype=dtype, policy=["local_leap", "klass"], features=ALL_FEATURES, seed=vocab)
    assert_matches_reference(decode(backend, inputs), inputs)


@pytest.mark.parametrize("features", [(), ("entropy",), ("margin",), ("divergence",), ("sampling",), ALL_FEATURES])
def test_statistics_of_every_set_of_features(backend, features):
    inputs = make_inputs(2, 5, 700, policy="local_leap", features=features, seed=3)
    assert_matches_reference(decode(backend, inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(backend, dtype):
    """The rows are cut into pieces; the emulator affords a few rows."""
    rows = 1 if backend.name == "simt" else 4
    inputs = make_inputs(2, rows, 126464, dtype=dtype, masked=1.0, policy=["eb", "klass"], features=ALL_FEATURES)
    assert_matches_reference(decode(backend, inputs), inputs)


@pytest.mark.parametrize("block_length", [1, 7, 32, 33, 65])
def test_mixed_policies_in_blocks_of_every_length(backend, block_length):
    inputs = all_policies(block_length, 31, seed=block_length)
    outcome = decode(backend, inputs)
    assert_selected(outcome, inputs)
    assert_statistics_close(outcome.statistics, expect(inputs), inputs)


@pytest.mark.parametrize("block_length", [1000, 1024])
def test_the_longest_blocks(backend, block_length):
    inputs = make_inputs(1, block_length, 8, policy="local_leap", seed=1)
    outcome = decode(backend, inputs)
    assert_selected(outcome, inputs)
    assert_statistics_close(outcome.statistics, expect(inputs), inputs)


@pytest.mark.parametrize("block_length", [1, 2, 31, 32, 33, 64, 127, 1000, 1024])
def test_selection_breaks_ties_by_position(backend, block_length):
    """Statistics of 65 values, so that ties abound, in a batch of every policy; all sums are exact in fp32."""
    for seed in range(3 if block_length < 200 else 1):
        generator = torch.Generator().manual_seed(seed)
        batch = 2 * len(POLICIES)
        names = [*POLICIES, *POLICIES]
        shape = (batch, block_length)
        statistics = torch.randint(65, (*shape, 4), generator=generator) / 64
        statistics[..., 1] *= 2
        statistics[..., 1][torch.rand(shape, generator=generator) < 0.05] = inf
        statistics[..., 3] /= 32
        inputs = make_inputs(
            batch, block_length, 50, policy=names, features=ALL_FEATURES, seed=seed, masked=0.4 + 0.3 * seed,
            threshold=[(1 + i) / 32 if names[i] == "eb" else (10 + i) / 32 for i in range(batch)],
            relaxed_threshold=[15 / 64 if name == "local_leap" else 1 / 64 for name in names],
            radius=[0, 1, 2, 5, 31, 32, 33, 64, 100, 2000] * 2,
            steps=[1, 2, 3, 7, 1000] * 4,
        )  # fmt: skip
        candidates = torch.randint(2, 50, shape, generator=generator)
        for ignored in (-1, MASK):
            candidates[torch.rand(shape, generator=generator) < 0.1] = ignored
        found = RowScan(candidates, statistics)
        outcome = select(backend, found, inputs.tokens, inputs.requests)
        assert outcome == expect_selection(found, inputs.tokens, inputs.requests)


# ------------------------------------------------------------------------------------------------------ rows, id lists


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_shifted_model(backend, dtype):
    """Row p - 1 predicts position p; the first position of a sequence has no row."""
    batch, length, vocab = 3, 9, 130
    logits = peaked_logits(batch, length, vocab, seed=5, dtype=dtype)
    requests = DecodeRequests.make(batch, 4, policy="local_leap", threshold=0.8, block_start=[0, 3, 5])
    tokens = torch.full((batch, length), MASK)
    position = requests.block_start[:, None] + torch.arange(4)
    rows = torch.where(position > 0, torch.arange(batch)[:, None] * length + position - 1, -1)
    inputs = Inputs(logits, tokens, requests, options={"rows": rows})
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert outcome.candidates[0, 0] == -1 and outcome.tokens[0, 0] == MASK and outcome.statistics[0, 0].isnan().all()
    assert outcome.counts[0, 1] == 4 - outcome.counts[0, 0], "a position without a row still waits"


def test_rows_gathered_for_the_head(backend):
    """Only some rows were computed, in any order, and two positions may share one."""
    inputs = make_inputs(3, 8, 90, policy=["local_leap", "klass", "topk_margin"], features=ALL_FEATURES, seed=8)
    generator = torch.Generator().manual_seed(1)
    table = peaked_logits(11, 90, seed=9)
    rows = torch.randint(-2, 11, (3, 8), generator=generator)
    rows[0, :4] = 10
    previous = (table + 0.1 * torch.randn(table.shape, generator=generator)).contiguous()
    inputs = inputs.but(logits=table, rows=rows, previous_logits=previous)
    assert_matches_reference(decode(backend, inputs), inputs)


def test_a_sequence_without_any_row_waits(backend):
    inputs = make_inputs(2, 4, 20, masked=1.0).but(rows=torch.tensor([[-1] * 4, [0, 1, 2, 3]]))
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert outcome.counts[0].tolist() == [0, 4, 0, 0]
    assert outcome.step.tolist() == [0, 1], "it took no part"


@pytest.mark.parametrize(
    "exclude", [{"forbidden": torch.tensor([0, 2])}, {"vocab_limit": 1, "forbidden": torch.tensor([0])}]
)
def test_a_row_of_which_nothing_may_be_chosen_has_no_candidate(backend, exclude):
    inputs = make_inputs(2, 4, 3, masked=1.0, features=ALL_FEATURES, temperature=[0.0, 1.0]).but(**exclude)
    outcome = decode(backend, inputs)
    assert_matches_reference(outcome, inputs)
    assert (outcome.candidates == -1).all() and outcome.counts.tolist() == [[0, 4, 0, 0]] * 2


ID_LISTS = {
    "forbidden": {"forbidden": torch.tensor([0, 7, 8, 298])},
    "forbidden outside": {"forbidden": torch.tensor([-1, 300, 2**40, 5, -(2**33)])},
    "most forbidden": {"forbidden": torch.arange(3, 3 + 16 * 9, 9)},
    "none forbidden": {"forbidden": torch.empty(0, dtype=torch.int64)},
    "deferred": {"deferred": torch.tensor([0, 2, 4, 299])},
    "forbidden and deferred": {"forbidden": torch.tensor([6]), "deferred": torch.tensor([6, 7])},
    "limit": {"vocab_limit": 200},
    "limit at the mask": {"vocab_limit": MASK + 1},
    "limit and forbidden": {"vocab_limit": 131, "forbidden": torch.tensor([130, 131, 4])},
}


@pytest.mark.parametrize("case", ID_LISTS)
def test_id_lists(backend, case):
    """The peak of every row is one of the ids of the list, or beside it."""
    inputs = make_inputs(3, 10, 300, policy=["local_leap", "topk_margin", "eb"], features=ALL_FEATURES, seed=4)
    options = ID_LISTS[case]
    special = [i for ids in options.values() for i in (ids.tolist() if isinstance(ids, torch.Tensor) else [ids])]
    generator = torch.Generator().manual_seed(6)
    beside = [i for one in special for i in (one, one + 1) if 0 <= i < 300 and i != MASK] or [3]
    peak = torch.tensor(beside)[torch.randint(len(beside), (3, 10), generator=generator)]
    inputs.logits.scatter_(-1, peak[..., None], 6.0 + torch.rand(3, 10, 1, generator=generator))
    inputs = inputs.but(**options)
    assert_matches_reference(decode(backend, inputs), inputs)


def test_deferred_ids_come_last(backend):
    """Where it is the only candidate it is committed all the same, with the smallest confidence."""
    logits = peaked_logits(1, 3, 40, seed=1)
    logits[0, :, 9] = torch.tensor([30.0, 0.0, 30.0])
    requests = DecodeRequests.make(1, 3, policy="topk", steps=3)
    inputs = Inputs(logits, torch.full((1, 3), MASK), requests, options={"deferred": torch.tensor([9])})
    for expected in (1, 0, 2):
        outcome = decode(backend, inputs)
        assert outcome.committed[0].nonzero().flatten().tolist() == [expected]
        inputs = inputs.but(tokens=outcome.tokens)
    assert outcome.tokens[0, 0] == outcome.tokens[0, 2] == 9
    assert outcome.statistics[0, 2, 0] == torch.finfo(torch.float32).tiny


# ---------------------------------------------------------------------------------------------------------------- klass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_klass_over_several_steps(backend, dtype):
    """The op's own state from step to step, beside the reference's: rows that settle, at different times."""
    batch, block, vocab = 2, 10, 60
    target = peaked_logits(batch, block, vocab, seed=1, least=0.5).double()
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    settles = torch.randint(1, 4, (batch, block, 1), generator=generator)
    inputs = make_inputs(
        batch, block, vocab, policy="klass", masked=0.9, threshold=0.6, relaxed_threshold=0.01, steps=10
    )  # fmt: skip
    inputs.requests.begin_block_([1, 3], 10)
    previous, counts = None, []
    for step in range(7):
        logits = (target + noise * (1 if step == 0 else 0.02) * (step <= settles)).to(dtype)
        inputs = inputs.but(logits=logits, previous_logits=torch.zeros_like(logits) if previous is None else previous)
        outcome = decode(backend, inputs)
        assert_matches_reference(outcome, inputs)
        counts.append(outcome.counts[:, 0].tolist())
        inputs = inputs.but(
            tokens=outcome.tokens, step=outcome.step, steps_left=outcome.steps_left, stable_steps=outcome.stable_steps
        )
        previous = logits
    assert counts[0] == [1, 1] and max(max(two) for two in counts) > 1, "first the schedule, later what is stable"
