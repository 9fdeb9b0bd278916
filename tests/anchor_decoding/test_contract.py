"""What the ops promise besides their values: determinism, rows that are not read, strides, state, offsets, streams."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
from decode_oracle import (
    ALL_FEATURES,
    MASK,
    Outcome,
    copied,
    decode,
    expect,
    family,
    make_inputs,
    peaked_logits,
    scan,
    select,
)

from tokenweave_ops import POLICIES, testing

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(5, 40), (4, 4097), (2, 9001)]  # block_length, vocab: one piece of a row, two, three


def mixed_inputs(block_length=7, vocab=300, **options):
    """Every policy once, half of the sequences sampled."""
    n = len(POLICIES)
    return make_inputs(
        n, block_length, vocab, policy=list(POLICIES), features=ALL_FEATURES, temperature=[0.0, 0.8] * (n // 2),
        noise_seed=list(range(n)), **options,
    )  # fmt: skip


@contextlib.contextmanager
def emulator_options(**options):
    emulator = testing.host().simt
    saved = emulator.options()
    emulator.set_options(**{**saved, **options})
    try:
        yield
    finally:
        emulator.set_options(**saved)


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_length", "vocab"), SIZES)
def test_same_bits_every_run(backend, block_length, vocab, dtype):
    inputs = mixed_inputs(block_length, vocab, dtype=dtype)
    first = decode(backend, inputs)
    assert all(decode(backend, inputs) == first for _ in range(2))


@pytest.mark.parametrize(("block_length", "vocab"), SIZES)
def test_a_sequence_does_not_depend_on_its_batch(backend, block_length, vocab):
    """Bit for bit: alone, in another order, twice in a batch."""
    inputs = mixed_inputs(block_length, vocab, dtype=torch.bfloat16)
    together = decode(backend, inputs)
    for request in (0, 3, 9):
        assert decode(backend, inputs.of(request)) == together.of(request)
    order = [9, 2, 2, 0, 5, 9, 9]
    assert decode(backend, inputs.of(*order)) == together.of(*order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_length", "vocab"), SIZES)
def test_a_sequence_does_not_depend_on_what_others_ask_for(backend, block_length, vocab, dtype):
    """Features, needed by whomever, add statistics and change no bit of the others."""
    inputs = make_inputs(3, block_length, vocab, dtype=dtype, policy="local_leap", features=ALL_FEATURES)
    everything = decode(backend, inputs)
    for features in ((), ("sampling",), ("entropy", "margin"), ("divergence",)):
        fewer = inputs.on("cpu")
        fewer.requests.features = frozenset(features)
        outcome = decode(backend, fewer)
        asked = ~outcome.statistics.isnan()
        assert torch.equal(outcome.statistics[asked], everything.statistics[asked])
        assert torch.equal(outcome.candidates, everything.candidates)
        assert torch.equal(outcome.tokens, everything.tokens)


def test_same_bits_for_every_schedule(simt):
    inputs = mixed_inputs(3, 4500, dtype=torch.bfloat16)
    expected = decode(simt, inputs)
    for seed in range(6):
        with emulator_options(seed=seed, resident_blocks=1 + 3 * seed):
            assert decode(simt, inputs) == expected


@pytest.mark.parametrize("max_grid", [1, 2, 7])
@pytest.mark.parametrize(("block_length", "vocab"), SIZES)
def test_same_bits_for_every_grid(simt, block_length, vocab, max_grid):
    """Blocks that take several rows, or several pieces of a row."""
    inputs = mixed_inputs(block_length, vocab, dtype=torch.bfloat16)
    expected = decode(simt, inputs)
    with emulator_options(seed=max_grid, max_grid=max_grid):
        assert decode(simt, inputs) == expected


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize(("block_length", "vocab"), [*SIZES, (2, 126464)])
def test_thread_count_does_not_change_bits(backend, block_length, vocab):
    inputs = mixed_inputs(block_length, vocab, dtype=torch.bfloat16).of(*([0, 3, 7] if vocab > 10_000 else range(10)))
    saved = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outcomes.append(decode(backend, inputs))
    finally:
        torch.set_num_threads(saved)
    assert all(outcome == outcomes[0] for outcome in outcomes)


ISA_SCRIPT = """
import contextlib, sys, types, torch
sys.path.insert(0, sys.argv[1])
from decode_oracle import ALL_FEATURES, assert_matches_reference, decode, make_inputs
cpu = types.SimpleNamespace(device="cpu", use=lambda family: contextlib.nullcontext())
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for vocab in (2, 31, 1000, 4097):
        inputs = make_inputs(4, 6, vocab, dtype=dtype, policy=["eb", "klass", "margin", "local_leap"],
                             features=ALL_FEATURES)
        assert_matches_reference(decode(cpu, inputs), inputs)
print("matches")
"""


def test_every_instruction_set_matches_the_reference():
    """Baseline, AVX2 and AVX-512 kernels; sets that this machine lacks fall back to what it has."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ISA_SCRIPT, os.path.dirname(__file__)],
            env={**os.environ, "TOKENWEAVE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for isa in ("baseline", "avx2", "avx512")
    ]  # fmt: skip
    for process in processes:
        printed, error = process.communicate()
        assert printed.strip() == "matches", error


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("block_length", "vocab"), SIZES)
def test_the_halves_equal_the_whole(backend, block_length, vocab, exact):
    inputs = mixed_inputs(block_length, vocab, dtype=torch.bfloat16).but(exact=exact)
    assert select(backend, scan(backend, inputs), inputs.tokens, inputs.requests) == decode(backend, inputs)


# --------------------------------------------------------------------------------------------- what is read and written


def test_rows_that_are_not_masked_are_not_read(backend):
    """NaN in them changes nothing, and is not counted."""
    inputs = mixed_inputs(9, 500, masked=0.5)
    expected = decode(backend, inputs)
    position = inputs.requests.block_start[:, None] + torch.arange(9)
    masked = inputs.tokens.gather(1, position) == MASK
    assert 20 < masked.sum() < 70
    poisoned = inputs.logits.masked_fill(~masked[..., None], math.nan)
    previous = inputs.options["previous_logits"].masked_fill(~masked[..., None], math.nan)
    assert decode(backend, inputs.but(logits=poisoned, previous_logits=previous)) == expected


def test_a_finished_sequence_is_left_alone(backend):
    inputs = mixed_inputs(6, 80)
    finished = [0, 3, 7, 9]
    inputs.tokens[finished] = inputs.tokens[finished].masked_fill(inputs.tokens[finished] == MASK, 5)
    inputs.tokens[finished, 0] = MASK  # a mask before the block, or in front of it, is not the block's
    inputs.requests.block_start[finished] = 1
    inputs.logits[finished] = math.nan
    outcome = decode(backend, inputs)
    assert (outcome.counts[finished] == 0).all() and not outcome.committed[finished].any()
    assert (outcome.candidates[finished] == -1).all() and outcome.statistics[finished].isnan().all()
    for name in ("step", "steps_left", "stable_steps"):
        assert torch.equal(getattr(outcome, name)[finished], getattr(inputs.requests, name)[finished])
    assert torch.equal(outcome.tokens[finished], inputs.tokens[finished])
    others = [i for i in range(10) if i not in finished]
    assert (outcome.counts[others, 0] > 0).all()
    assert outcome.of(*others) == decode(backend, inputs.of(*others))


def test_what_is_written(backend):
    """Tokens of committed positions, and the three tensors of state; nothing else."""
    inputs = mixed_inputs(6, 80)
    given = inputs.on(backend.device)
    before = inputs.on(backend.device)
    with backend.use(family):
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
    assert torch.equal(given.logits, before.logits)
    assert torch.equal(given.options["previous_logits"], before.options["previous_logits"])
    for name, value in vars(before.requests).items():
        if isinstance(value, torch.Tensor) and name not in ("step", "steps_left", "stable_steps"):
            assert torch.equal(getattr(given.requests, name), value), name
    position = before.requests.block_start[:, None] + torch.arange(6, device=backend.device)
    expected = before.tokens.scatter(
        1, position, torch.where(step.committed, step.candidates, before.tokens.gather(1, position))
    )
    assert torch.equal(given.tokens, expected)
    assert torch.equal(step.num_committed, step.committed.sum(dim=1))
    assert torch.equal(step.num_remaining, (given.tokens.gather(1, position) == MASK).sum(dim=1))
    assert torch.equal(step.num_bad_rows, torch.zeros_like(step.num_bad_rows))


def test_steps_are_counted(backend):
    inputs = make_inputs(2, 9, 30, policy="topk", masked=1.0, steps=[2, 40])
    left, committed = [], []
    for _ in range(3):
        outcome = decode(backend, inputs)
        left.append(outcome.steps_left.tolist())
        committed.append(outcome.counts[:, 0].tolist())
        inputs = inputs.but(tokens=outcome.tokens, step=outcome.step, steps_left=outcome.steps_left)
    assert left == [[1, 39], [1, 38], [1, 37]] and outcome.step.tolist() == [2, 3], "the first took part twice"
    assert committed == [[5, 1], [4, 1], [0, 1]]


def test_mask_tokens_outside_the_block_stay(backend):
    inputs = make_inputs(3, 4, 30, masked=1.0, policy="threshold", threshold=0.0)
    outcome = decode(backend, inputs)
    start = inputs.requests.block_start
    for b in range(3):
        inside = slice(int(start[b]), int(start[b]) + 4)
        assert (outcome.tokens[b, inside] != MASK).all()
        outcome.tokens[b, inside] = MASK
    assert (outcome.tokens == MASK).all()


@pytest.mark.no_launch
def test_an_empty_batch(backend):
    for shape in [(0, 4, 30), (0, 30)]:
        inputs = make_inputs(0, 4, 30)
        inputs.logits = inputs.logits.reshape(shape)
        options = {"rows": torch.empty(0, 4, dtype=torch.int64)} if len(shape) == 2 else {}
        outcome = decode(backend, inputs.but(**options))
        assert outcome.counts.shape == (0, 4) and outcome.statistics.shape == (0, 4, 4)
        assert outcome.committed.shape == outcome.candidates.shape == (0, 4)


# ------------------------------------------------------------------------------------------------------- strided inputs


def decode_as_given(backend, logits, tokens, inputs, **options) -> Outcome:
    """decode_step_ on these very tensors; the requests and other options are copies."""
    given = inputs.on(backend.device)
    with backend.use(family):
        step = family.decode_step_(logits, tokens, given.requests, mask_id=MASK, **(given.options | options))
    r = given.requests
    return Outcome(*(t.cpu() for t in (*step, tokens, r.step, r.steps_left, r.stable_steps)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [31, 4099])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_strided_and_misaligned_rows(backend, offset, vocab, dtype):
    """Rows inside a wider buffer of NaN, at every alignment: the same bits as in rows of their own."""
    inputs = mixed_inputs(3, vocab, dtype=dtype)
    expected = decode(backend, inputs)
    pitch = vocab + offset + 5
    wide = torch.full((10, 3, pitch), math.nan, dtype=dtype, device=backend.device)
    logits = wide[..., offset : offset + vocab].copy_(inputs.logits)
    before = torch.full((10, 3, pitch + 2), math.nan, dtype=dtype, device=backend.device)
    previous = before[..., 3 : 3 + vocab].copy_(inputs.options["previous_logits"])
    tokens = torch.full((10, 40), -7, device=backend.device)
    inside = tokens[:, 5 : 5 + inputs.tokens.shape[1]].copy_(inputs.tokens)
    assert decode_as_given(backend, logits, inside, inputs, previous_logits=previous) == expected
    assert (tokens[:, :5] == -7).all() and (tokens[:, 5 + inside.shape[1] :] == -7).all()


def test_logits_with_two_strides(backend):
    """The block's rows of the whole sequence's logits, and a transposed batch."""
    inputs = mixed_inputs(4, 50)
    expected = decode(backend, inputs)
    whole = torch.full((10, 9, 50), math.nan, device=backend.device)
    part = whole[:, 3:7].copy_(inputs.logits)
    assert decode_as_given(backend, part, copied(inputs.tokens, backend.device), inputs) == expected
    turned = copied(inputs.logits.transpose(0, 1).contiguous(), backend.device).transpose(0, 1)
    assert decode_as_given(backend, turned, copied(inputs.tokens, backend.device), inputs) == expected


def test_rows_of_one_expanded_row(backend):
    """Stride 0: every position reads the same row."""
    inputs = make_inputs(2, 5, 40, masked=1.0, policy="topk")
    row = peaked_logits(1, 1, 40, seed=4)
    expected = decode(backend, inputs.but(logits=row.expand(2, 5, 40).contiguous()))
    logits = copied(row, backend.device).expand(2, 5, 40)
    assert decode_as_given(backend, logits, copied(inputs.tokens, backend.device), inputs) == expected


def test_offsets_beyond_32_bits(backend):
    """Rows 2^32 elements apart: signed and unsigned 32 bits wrap. What lies between is reserved, not touched."""
    inputs = make_inputs(2, 3, 70, dtype=torch.bfloat16, masked=1.0)
    expected = decode(backend, inputs)
    stride = 2**32
    wide = torch.empty(stride + 3 * 128, dtype=torch.bfloat16, device=backend.device)
    logits = wide.as_strided((2, 3, 70), (stride, 128, 1)).copy_(inputs.logits)
    assert decode_as_given(backend, logits, copied(inputs.tokens, backend.device), inputs) == expected


def test_plan_shares_out_every_row(host):
    for vocab in (2, 2048, 2049, 126464, 152064, 2**30):
        segments = -(-vocab // 2048)
        for batch, block_length in ((1, 1), (1, 32), (4, 32), (8, 32), (64, 32), (3, 1024)):
            p = host.plan_decode_step(batch, block_length, vocab)
            assert (p.blocks_per_row - 1) * p.segments_per_block < segments <= p.blocks_per_row * p.segments_per_block
            assert p.grid == batch * block_length * p.blocks_per_row < 2**31, "a block for each share"
            assert p.block_x % 32 == 0 and p.block_x <= 1024
            assert host.plan_decode_step(batch, block_length, vocab, 0, 5).grid == min(5, p.grid)


def test_plan_gives_blocks_more_of_a_row_as_rows_multiply(host):
    plans = [host.plan_decode_step(batch, 32, 126464) for batch in (1, 4, 16, 64, 512)]
    shares = [plan.segments_per_block for plan in plans]
    assert shares[0] == plans[0].block_x // 32, "few rows: a segment a warp"
    assert shares == sorted(shares) and shares[1] < shares[3]
    assert all(plan.grid >= 2112 for plan in plans[2:]), "four waves of four blocks on 132 SMs"
    assert plans[-1].blocks_per_row == 1, "no ticket where rows alone fill the GPU"
    assert host.plan_decode_step(1, 32, 2048).blocks_per_row == 1


def test_plan_beyond_32_bits_without_allocating(host):
    assert host.plan_decode_step(2**22, 1024, 152064).grid == 2**31 - 1, "blocks stride over the rest"
    assert host.plan_decode_step(2**40, 1024, 2**30).grid == 2**31 - 1


def test_plan_covers_the_features(host):
    compiled = [host.plan_decode_step(1, 32, 1000, features).features for features in range(16)]
    assert all(features & ~chosen == 0 for features, chosen in enumerate(compiled))
    entropy, margin, sampling = 1, 2, 4
    assert compiled[0] == 0 and compiled[sampling] == sampling, "the common sets pay for nothing else"
    assert compiled[entropy] == compiled[margin] == entropy | margin


# ------------------------------------------------------------------------------------------------------------ CUDA only


def test_runs_on_the_current_stream(cuda):
    inputs = mixed_inputs(32, 4096, dtype=torch.bfloat16)
    expected = decode(cuda, inputs)
    given = inputs.on("cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the op must wait behind this, and the copy behind the op
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
        tokens = given.tokens.clone()
    assert not stream.query(), "the op must not have run on another stream, or synchronised"
    stream.synchronize()
    assert torch.equal(tokens.cpu(), expected.tokens) and torch.equal(step.counts.cpu(), expected.counts)


def test_a_captured_step_follows_the_requests(cuda):
    """One graph, replayed until the block is full, while policies and numbers change under it."""
    inputs = mixed_inputs(8, 1000, dtype=torch.bfloat16)
    given = inputs.on("cuda")
    family.decode_step_(given.logits, given.tokens.clone(), given.requests.clone(), mask_id=MASK, **given.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
    for replay in range(4):
        inputs.requests.policy = inputs.requests.policy.roll(1)
        inputs.requests.threshold = inputs.requests.threshold.roll(1)
        inputs.logits = peaked_logits(*inputs.logits.shape, seed=50 + replay, dtype=torch.bfloat16)
        given.requests.policy.copy_(inputs.requests.policy)
        given.requests.threshold.copy_(inputs.requests.threshold)
        given.logits.copy_(inputs.logits)
        graph.replay()
        expected = decode(cuda, inputs)
        r = given.requests
        assert Outcome(*(t.cpu() for t in (*step, given.tokens, r.step, r.steps_left, r.stable_steps))) == expected
        inputs = inputs.but(
            tokens=expected.tokens, step=expected.step, steps_left=expected.steps_left,
            stable_steps=expected.stable_steps,
        )  # fmt: skip


def test_device_guard(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = mixed_inputs()
    given = inputs.on("cuda:1")
    with torch.cuda.device(0):
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
        assert torch.cuda.current_device() == 0
    assert torch.equal(step.counts.cpu(), expect(inputs).counts)
