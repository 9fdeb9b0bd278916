"""DecodeRequests: what is made of names and numbers, how a block begins, and what becomes of numbers without sense."""

from __future__ import annotations

import math
import re

import pytest
import torch
from decode_oracle import ALL_FEATURES, MASK, Inputs, decode, family, make_inputs, scan, select

from tokenweave_ops import POLICIES, DecodeRequests
from tokenweave_ops.anchor_decoding import PROBLEMS


def test_defaults_are_the_published_numbers():
    r = DecodeRequests.make(len(POLICIES), 32, policy=list(POLICIES))
    assert r.policy.tolist() == list(range(len(POLICIES)))
    numbers = dict(zip(POLICIES, zip(r.threshold.tolist(), r.relaxed_threshold.tolist(), strict=True), strict=True))
    expected = {
        "topk": (0, 0), "threshold": (0.9, 0), "factor": (1, 0), "local_leap": (0.9, 0.75), "eb": (0.001, 0),
        "entropy_threshold": (0.45, 0), "margin": (0.9, 0), "klass": (0.6, 0.01), "topk_margin": (0, 0),
        "topk_entropy": (0, 0),
    }  # fmt: skip
    assert numbers == {name: pytest.approx(pair) for name, pair in expected.items()}
    assert (r.radius == 4).all() and (r.temperature == 0).all() and (r.steps_left == 32).all()


def test_shapes_types_and_state():
    r = DecodeRequests.make(3, 5, steps=[1, 2, 3], block_start=torch.tensor([4, 5, 6]), seed=9)
    assert (r.batch, r.block_length) == (3, 5)
    for name in ("block_start", "policy", "radius", "seed", "step", "steps_left"):
        assert getattr(r, name).dtype == torch.int64 and getattr(r, name).shape == (3,), name
    for name in ("threshold", "relaxed_threshold", "temperature"):
        assert getattr(r, name).dtype == torch.float32 and getattr(r, name).shape == (3,), name
    assert r.steps_left.tolist() == [1, 2, 3] and r.block_start.tolist() == [4, 5, 6] and (r.seed == 9).all()
    assert r.stable_steps.shape == (3, 5) and (r.stable_steps == -1).all()
    assert r.tickets.shape == (3, 6) and r.tickets.dtype == torch.int32 and (r.tickets == 0).all()
    assert all(t.is_contiguous() for t in vars(r).values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"policy": "local_leap"}, set()),
        ({"policy": ["eb", "margin"]}, {"entropy", "margin"}),
        ({"policy": ["klass", "topk"], "temperature": [0.0, 0.5]}, {"divergence", "sampling"}),
        ({"policy": "topk_entropy", "features": ["margin"]}, {"margin"}),
        ({"policy": "eb", "features": []}, set()),
    ],
)
def test_features_follow_the_policies(options, expected):
    r = DecodeRequests.make(2, 4, **options)
    assert r.features == expected
    bits = {"entropy": 1, "margin": 2, "sampling": 4, "divergence": 8}
    assert r.feature_mask == sum(bits[name] for name in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "greedy"},
            "DecodeRequests: policy must be one of topk, threshold, factor, local_leap, eb, entropy_threshold, margin, "
            "klass, topk_margin, topk_entropy, got 'greedy'",
        ),
        ({"policy": ["eb", "Threshold"]}, "policy must be one of topk, threshold"),
        ({"policy": ["eb"]}, "DecodeRequests: policy must be a name or 2 of them, got 1"),
        ({"threshold": [0.5, 0.6, 0.7]}, "DecodeRequests: threshold must be a number or 2 of them, got shape [3]"),
        ({"radius": [1]}, "DecodeRequests: radius must be a number or 2 of them, got shape [1]"),
        ({"temperature": torch.zeros(2, 1)}, "temperature must be a number or 2 of them, got shape [2, 1]"),
        ({"steps": [1, 2, 3]}, "DecodeRequests: steps must be a number or 2 of them"),
        (
            {"features": ["entropy", "kl"]},
            "DecodeRequests: features must be of entropy, margin, sampling, divergence, got 'kl'",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DecodeRequests.make(2, 4, **options)


def test_an_unknown_policy_of_an_empty_batch():
    with pytest.raises(ValueError, match="policy must be one of"):
        DecodeRequests.make(0, 4, policy="nothing")
    assert DecodeRequests.make(0, 4).batch == 0


def test_begin_block():
    r = DecodeRequests.make(3, 4, block_start=[0, 4, 8], steps=2)
    pointers = r.block_start.data_ptr(), r.steps_left.data_ptr(), r.stable_steps.data_ptr()
    r.step += 5
    r.stable_steps.fill_(2)
    r.begin_block_(r.block_start + 4, [7, 8, 9], where=torch.tensor([True, False, True]))
    assert r.block_start.tolist() == [4, 4, 12] and r.steps_left.tolist() == [7, 2, 9]
    assert r.stable_steps.tolist() == [[-1] * 4, [2] * 4, [-1] * 4]
    r.begin_block_(16, 3)
    assert r.block_start.tolist() == [16] * 3 and r.steps_left.tolist() == [3] * 3 and (r.stable_steps == -1).all()
    assert r.step.tolist() == [5, 5, 5], "the noise goes on"
    assert pointers == (r.block_start.data_ptr(), r.steps_left.data_ptr(), r.stable_steps.data_ptr())


def test_begin_block_refuses_other_lengths():
    r = DecodeRequests.make(3, 4)
    with pytest.raises(ValueError, match=re.escape("block_start must be a number or 3 of them, got shape [2]")):
        r.begin_block_([0, 4], 4)
    assert (r.block_start == 0).all()


def test_a_clone_shares_nothing():
    r = DecodeRequests.make(2, 3, policy="klass")
    copy = r.clone()
    for name, value in vars(copy).items():
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() != getattr(r, name).data_ptr() and torch.equal(value, getattr(r, name)), name
    assert copy.features == r.features


def test_numbers_given_as_tensors_are_copied():
    """Else begin_block_ and the ops would write into the caller's tensors."""
    start = torch.tensor([1, 2])
    r = DecodeRequests.make(2, 3, block_start=start)
    r.begin_block_(9, 1)
    assert start.tolist() == [1, 2]
    r.begin_block_(start, 1)
    start += 5
    assert r.block_start.tolist() == [1, 2]


# ---------------------------------------------------------------------------- numbers that make no sense, on the device
#
# A CPU raises before it writes anything; a GPU skips the request, and the step says so when it is asked.

# What to write into request 1, and the place in PROBLEMS.
BAD_REQUESTS = {
    "block before the sequence": ({"block_start": -1}, 0),
    "block behind the sequence": ({"block_start": 8}, 0),
    "block far away": ({"block_start": 2**63 - 1}, 0),
    "policy below": ({"policy": -1}, 1),
    "policy above": ({"policy": len(POLICIES)}, 1),
    "policy far away": ({"policy": 2**40}, 1),
    "NaN threshold": ({"threshold": math.nan}, 3),
    "NaN relaxed threshold": ({"relaxed_threshold": math.nan}, 3),
    "negative radius": ({"radius": -1}, 4),
    "negative temperature": ({"temperature": -0.5}, 5),
    "NaN temperature": ({"temperature": math.nan}, 5),
    "infinite temperature": ({"temperature": math.inf}, 5),
    "no steps left": ({"steps_left": 0}, 6),
    "a row too far": ({"rows": 12}, 7),
    "a row far away": ({"rows": 2**62}, 7),
}


def tensors_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    named = {"logits": inputs.logits, "tokens": inputs.tokens, **vars(inputs.requests), **inputs.options}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def bad_request(changes: dict) -> Inputs:
    inputs = make_inputs(3, 4, 40, masked=1.0, features=ALL_FEATURES).but(rows=torch.arange(12).view(3, 4))
    for name, value in changes.items():
        tensors_of(inputs)[name][(1, 2) if name == "rows" else 1] = value
    return inputs


def assert_skipped(backend, inputs: Inputs, place: int) -> None:
    """On a CPU the op raises and writes nothing; elsewhere the others decode, and the step says who was left out."""
    sentence = re.escape(f"decode_step_: request 1: {PROBLEMS[place]}")
    if backend.name == "cpu":
        given = inputs.on("cpu")
        before = {name: tensor.clone() for name, tensor in tensors_of(given).items()}
        with pytest.raises(RuntimeError, match=f"^{sentence}"):
            family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
        for name, tensor in before.items():
            assert torch.equal(tensors_of(given)[name].nan_to_num(), tensor.nan_to_num()), f"{name} was written"
        return
    given = inputs.on(backend.device)
    with backend.use(family):
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
    assert step.counts[:, 3].tolist() == [0, 1 << place, 0]
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        step.raise_problems()
    assert step.counts[1, 0] == 0 and not step.committed[1].any()
    assert torch.equal(given.tokens[1].cpu(), inputs.tokens[1])
    for name in ("step", "steps_left", "stable_steps"):
        assert torch.equal(getattr(given.requests, name)[1].cpu(), getattr(inputs.requests, name)[1]), name
    assert not given.requests.tickets.any()
    others = decode(backend, sequences(inputs, [0, 2]))
    assert torch.equal(step.counts[[0, 2]].cpu(), others.counts)
    assert torch.equal(given.tokens[[0, 2]].cpu(), others.tokens)


def sequences(inputs: Inputs, chosen: list[int]) -> Inputs:
    """Some of the requests, with their own rows of the whole table."""
    table, previous = inputs.logits, inputs.options.get("previous_logits")
    rows = inputs.options["rows"][chosen].clone()
    few = inputs.of(*chosen)
    few.logits = table
    few.options |= {"rows": rows, "previous_logits": previous}
    return few


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request(backend, case):
    changes, place = BAD_REQUESTS[case]
    assert_skipped(backend, bad_request(changes), place)


@pytest.mark.parametrize("case", ["block far away", "NaN threshold", "negative radius", "a row too far"])
def test_the_halves_skip_it_too(backend, case):
    changes, place = BAD_REQUESTS[case]
    inputs = bad_request(changes)
    if backend.name != "cpu":
        whole, halves = decode(backend, inputs), select(backend, scan(backend, inputs), inputs.tokens, inputs.requests)
        for name in ("counts", "committed", "tokens", "step", "steps_left", "stable_steps"):
            assert torch.equal(getattr(halves, name), getattr(whole, name)), name
        return
    found = scan(backend, bad_request({}))
    if "rows" not in changes:
        with pytest.raises(RuntimeError, match=f"^select_and_commit_: request 1: {PROBLEMS[place]}"):
            select(backend, found, inputs.tokens, inputs.requests)
    if changes.keys() & {"block_start", "threshold", "rows"}:  # what the scan reads
        with pytest.raises(RuntimeError, match=f"^confidence_scan: request 1: {PROBLEMS[place]}"):
            scan(backend, inputs)


@pytest.mark.parametrize(
    ("policy", "features", "temperature"),
    [
        ("eb", ("margin", "sampling"), 0.0),
        ("entropy_threshold", (), 0.0),
        ("topk_entropy", ("margin",), 0.0),
        ("margin", ("entropy",), 0.0),
        ("topk_margin", (), 0.0),
        ("klass", ("entropy", "margin", "sampling"), 0.0),
        ("topk", ("entropy", "margin"), 0.5),
    ],
)
def test_a_feature_that_is_lacking(backend, policy, features, temperature):
    inputs = make_inputs(
        3, 4, 40, masked=1.0, policy=["topk", policy, "topk"], features=features, temperature=[0.0, temperature, 0.0]
    ).but(rows=torch.arange(12).view(3, 4))
    assert_skipped(backend, inputs, 2)


def test_several_problems_of_several_requests(backend):
    """The first request and its first problem are named."""
    inputs = bad_request({"radius": -3, "steps_left": -1})
    inputs.requests.threshold[2] = math.nan
    given = inputs.on(backend.device)

    def decode_and_ask():
        step = family.decode_step_(given.logits, given.tokens, given.requests, mask_id=MASK, **given.options)
        assert step.counts[:, 3].tolist() == [0, 1 << 4 | 1 << 6, 1 << 3]
        step.raise_problems()

    with backend.use(family), pytest.raises(RuntimeError, match=re.escape(f"decode_step_: request 1: {PROBLEMS[4]}")):
        decode_and_ask()


def test_no_problems_raise_nothing(backend):
    inputs = make_inputs(2, 4, 40).on(backend.device)
    with backend.use(family):
        step = family.decode_step_(inputs.logits, inputs.tokens, inputs.requests, mask_id=MASK)
    step.raise_problems()
    assert (step.counts[:, 3] == 0).all()


def test_a_bad_request_has_no_candidates(backend):
    """confidence_scan of a request whose rows or block make no sense."""
    for changes, place in (BAD_REQUESTS["block behind the sequence"], BAD_REQUESTS["a row too far"]):
        inputs = bad_request(changes)
        if backend.name == "cpu":
            with pytest.raises(RuntimeError, match=re.escape(f"confidence_scan: request 1: {PROBLEMS[place]}")):
                scan(backend, inputs)
            continue
        found = scan(backend, inputs)
        assert (found.candidates[[0, 2]] >= 0).all()
        if place == 0:
            assert (found.candidates[1] == -1).all() and found.statistics[1].isnan().all()
        else:
            assert found.candidates[1, 2] == -2 and found.statistics[1, 2].isnan().all()


def test_numbers_a_policy_does_not_read_do_not_matter(backend):
    """Infinite thresholds are numbers like any other; a huge radius covers the block."""
    inputs = make_inputs(2, 4, 40, masked=1.0, threshold=[math.inf, -math.inf], relaxed_threshold=0.0)
    inputs.requests.radius[:] = 2**62
    assert decode(backend, inputs).counts[:, 0].tolist() == [1, 4]
