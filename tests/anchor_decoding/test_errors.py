"""Bad input: one sentence each, the same on every backend, and nothing written.

Arguments of decode_step_, confidence_scan and select_and_commit_ are checked before any kernel runs. The numbers that a
request holds are data on the device: test_requests.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from decode_oracle import ALL_FEATURES, MASK, Inputs, copied, family, make_inputs

from tokenweave_ops import RowScan


def good(backend) -> Inputs:
    """Two requests, every option given."""
    inputs = make_inputs(2, 4, 40, policy=["local_leap", "klass"], features=ALL_FEATURES, masked=1.0)
    return inputs.but(
        rows=torch.arange(8).view(2, 4), forbidden=torch.tensor([3]), deferred=torch.tensor([4, 5]), vocab_limit=39
    ).on(backend.device)


def tensors_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    named = {"logits": inputs.logits, "tokens": inputs.tokens, **vars(inputs.requests), **inputs.options}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def assert_refused(backend, inputs: Inputs, message: str, ops=("decode_step_", "confidence_scan")) -> None:
    """The first line of the error is the op and the message; no tensor has changed."""
    before = {name: tensor.clone() for name, tensor in tensors_of(inputs).items() if not tensor.is_meta}
    for op in ops:
        with backend.use(family), pytest.raises(RuntimeError) as error:
            getattr(family, op)(
                inputs.logits, inputs.tokens, inputs.requests, mask_id=inputs.mask_id, **inputs.options
            )  # fmt: skip
        device = "cuda:0" if backend.name == "cuda" else "cpu"
        assert str(error.value).splitlines()[0] == f"{op}: {message}".replace("{device}", device)
    for name, tensor in before.items():
        now = tensors_of(inputs)[name]
        assert torch.equal(now.nan_to_num(), tensor.nan_to_num()), f"{name} was written"


def with_tensor(inputs: Inputs, name: str, value: torch.Tensor) -> Inputs:
    """The same inputs but for this very tensor."""
    if name in ("logits", "tokens"):
        setattr(inputs, name, value)
    elif hasattr(inputs.requests, name):
        setattr(inputs.requests, name, value)
    else:
        inputs.options[name] = value
    return inputs


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a wider tensor."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


# ------------------------------------------------------------------------------------------------- tensors, one by one

# name -> (its dtype in words, what its shape must be)
PER_REQUEST = {
    "block_start": "int64", "policy": "int64", "threshold": "fp32", "relaxed_threshold": "fp32", "radius": "int64",
    "temperature": "fp32", "seed": "int64", "step": "int64", "steps_left": "int64",
}  # fmt: skip
# What the scan alone does not take.
OF_THE_SELECTION = ("policy", "radius", "steps_left")
OTHER_DTYPE = {"int64": (torch.int32, "int32"), "fp32": (torch.float64, "fp64"), "int32": (torch.int64, "int64")}


def ops_with(name: str) -> tuple[str, ...]:
    return ("decode_step_",) if name in OF_THE_SELECTION else ("decode_step_", "confidence_scan")


@pytest.mark.no_launch
@pytest.mark.parametrize("name", PER_REQUEST)
def test_a_tensor_per_request(backend, name):
    dtype = PER_REQUEST[name]
    other, other_name = OTHER_DTYPE[dtype]

    def refused(change, message):
        inputs = good(backend)
        value = change(getattr(inputs.requests, name))
        assert_refused(backend, with_tensor(inputs, name, value), f"{name} must {message}", ops_with(name))

    where = f"(dtype {dtype}, device {{device}})"
    refused(lambda t: t.to(other), f"be {dtype}, got {other_name} (dtype {other_name}, device {{device}})")
    refused(lambda t: t[:1].clone(), f"have shape [batch]=[2], got [1] {where}")
    refused(lambda t: t[:, None].clone(), f"have shape [batch]=[2], got [2, 1] {where}")
    refused(spread, f"be contiguous, got strides [2] {where}")


@pytest.mark.no_launch
@pytest.mark.parametrize(
    ("name", "dtype", "shape", "meaning"),
    [
        ("tickets", "int32", [2, 5], "[batch, block_length + 1]"),
        ("rows", "int64", [2, 4], "[batch, block_length]"),
    ],
)
def test_a_tensor_per_position(backend, name, dtype, shape, meaning):
    other, other_name = OTHER_DTYPE[dtype]

    def refused(change, message):
        inputs = good(backend)
        value = change(tensors_of(inputs)[name])
        assert_refused(backend, with_tensor(inputs, name, value), f"{name} must {message}")

    where = f"(dtype {dtype}, device {{device}})"
    refused(lambda t: t.to(other), f"be {dtype}, got {other_name} (dtype {other_name}, device {{device}})")
    smaller = [shape[0], shape[1] - 1]
    refused(lambda t: t[:, :-1].clone(), f"have shape {meaning}={shape}, got {smaller} {where}")
    refused(spread, f"be contiguous, got strides [{2 * shape[1]}, 2] {where}")


BAD = {
    "logits dtype": ("logits", lambda t: t.double(), "be bf16, fp16 or fp32, got fp64 (dtype fp64, device {device})"),
    "logits columns": (
        "logits", spread,
        "have a contiguous last dimension, got strides [320, 80, 2] (dtype fp32, device {device})",
    ),
    "logits strides": (
        "logits", lambda t: t.new_zeros(4, 4, 4, 80)[:2, :2, :2, :40],
        "have rows at one or two strides (call .contiguous()), got shape [2, 2, 2, 40] with strides [1280, 320, 80, 1] "
        "(dtype fp32, device {device})",
    ),
    "vocabulary of one": (
        "logits", lambda t: t[..., :1].clone(),
        "have a last dimension, the vocabulary, of 2 to 1073741824, got [2, 4, 1] (dtype fp32, device {device})",
    ),
    "previous dtype": (
        "previous_logits", lambda t: t.half(),
        "have the dtype of logits, fp32, got fp16 (dtype fp16, device {device})",
    ),
    "previous shape": (
        "previous_logits", lambda t: t[:, :3].clone(),
        "have the shape of logits, [2, 4, 40], got [2, 3, 40] (dtype fp32, device {device})",
    ),
    "previous columns": (
        "previous_logits", spread,
        "have a contiguous last dimension, got strides [320, 80, 2] (dtype fp32, device {device})",
    ),
    "tokens dtype": ("tokens", lambda t: t.int(), "be int64, got int32 (dtype int32, device {device})"),
    "tokens rank": (
        "tokens", lambda t: t[0].clone(),
        "have shape [batch, length] with batch=2, got [11] (dtype int64, device {device})",
    ),
    "tokens batch": (
        "tokens", lambda t: t[:1].clone(),
        "have shape [batch, length] with batch=2, got [1, 11] (dtype int64, device {device})",
    ),
    "tokens columns": (
        "tokens", spread, "have a contiguous last dimension, got strides [22, 2] (dtype int64, device {device})",
    ),
    "tokens expanded": (
        "tokens", lambda t: t[:1].expand(2, 11),
        "have rows that do not overlap, got strides [0, 1] (dtype int64, device {device})",
    ),
    "tokens overlap": (
        "tokens", lambda t: t.new_full((40,), MASK).as_strided((2, 11), (10, 1)),
        "have rows that do not overlap, got strides [10, 1] (dtype int64, device {device})",
    ),
    "forbidden dtype": ("forbidden", lambda t: t.int(), "be int64, got int32 (dtype int32, device {device})"),
    "forbidden rank": (
        "forbidden", lambda t: t[None].clone(),
        "have shape [n] with n up to 16, got [1, 1] (dtype int64, device {device})",
    ),
    "forbidden too many": (
        "forbidden", lambda t: t.new_zeros(17),
        "have shape [n] with n up to 16, got [17] (dtype int64, device {device})",
    ),
    "forbidden stride": (
        "forbidden", lambda t: spread(t.new_zeros(3)), "be contiguous, got strides [2] (dtype int64, device {device})",
    ),
    "deferred dtype": ("deferred", lambda t: t.float(), "be int64, got fp32 (dtype fp32, device {device})"),
    "deferred too many": (
        "deferred", lambda t: t.new_zeros(17),
        "have shape [n] with n up to 16, got [17] (dtype int64, device {device})",
    ),
    "stable_steps dtype": (
        "stable_steps", lambda t: t.int(), "be int64, got int32 (dtype int32, device {device})"
    ),
    "stable_steps rank": (
        "stable_steps", lambda t: t[0].clone(),
        "have shape [batch, block_length], got [4] (dtype int64, device {device})",
    ),
    "stable_steps stride": (
        "stable_steps", spread, "be contiguous, got strides [8, 2] (dtype int64, device {device})"
    ),
    "block too long": (
        "stable_steps", lambda t: t.new_zeros(2, 1025),
        "have a block_length of 1 to 1024, got 1025 (dtype int64, device {device})",
    ),
    "no block": (
        "stable_steps", lambda t: t.new_zeros(2, 0),
        "have a block_length of 1 to 1024, got 0 (dtype int64, device {device})",
    ),
}  # fmt: skip


@pytest.mark.no_launch
@pytest.mark.parametrize("case", BAD)
def test_bad_tensor(backend, case):
    name, change, message = BAD[case]
    inputs = good(backend)
    assert_refused(backend, with_tensor(inputs, name, change(tensors_of(inputs)[name])), f"{name} must {message}")


@pytest.mark.no_launch
def test_rows_are_missing(backend):
    inputs = good(backend)
    del inputs.options["rows"]
    inputs.logits, inputs.options["previous_logits"] = inputs.logits[:, :3], inputs.options["previous_logits"][:, :3]
    assert_refused(
        backend, inputs,
        "logits must have a row for each of 2 x 4 positions (or pass rows), got 6 rows (dtype fp32, device {device})",
    )  # fmt: skip


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "name", ["tokens", "threshold", "stable_steps", "tickets", "rows", "forbidden", "previous_logits"]
)
def test_a_meta_tensor_among_real_ones(backend, name):
    inputs = good(backend)
    inputs = with_tensor(inputs, name, tensors_of(inputs)[name].to("meta"))
    with (
        backend.use(family),
        pytest.raises(RuntimeError, match=f"decode_step_: {name} must be on the device of logits"),
    ):
        family.decode_step_(inputs.logits, inputs.tokens, inputs.requests, mask_id=MASK, **inputs.options)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.no_launch
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_id": -1}, "mask_id must be an id of the vocabulary, 0 to 39, got -1"),
        ({"mask_id": 40}, "mask_id must be an id of the vocabulary, 0 to 39, got 40"),
        ({"vocab_limit": 0}, "vocab_limit must be 1 to the vocabulary's size 40, got 0"),
        ({"vocab_limit": 41}, "vocab_limit must be 1 to the vocabulary's size 40, got 41"),
        (
            {"previous_logits": None},
            "previous_logits must be given where features has divergence, got None",
        ),
    ],
)
def test_bad_number(backend, changes, message):
    inputs = good(backend)
    inputs.mask_id = changes.get("mask_id", MASK)
    inputs.options |= {name: value for name, value in changes.items() if name != "mask_id"}
    assert_refused(backend, inputs, message)


@pytest.mark.no_launch
@pytest.mark.parametrize("features", [-1, 16])
def test_bad_feature_bits(backend, features):
    i = good(backend)
    r = i.requests
    arguments = (
        i.logits, i.tokens, r.block_start, r.policy, r.threshold, r.relaxed_threshold, r.radius, r.temperature, r.seed,
        r.step, r.steps_left, r.stable_steps, r.tickets, None, None, None, i.logits, MASK, 40, features, False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=f"decode_step_: features must be a sum of 1, 2, 4 and 8, got {features}"):
        backend.ops.decode_step_(*arguments)


@pytest.mark.no_launch
def test_logits_that_require_grad(backend):
    inputs = good(backend)
    before = inputs.tokens.clone()
    inputs.logits.requires_grad_()
    for op in ("decode_step_", "confidence_scan"):
        with backend.use(family), pytest.raises(RuntimeError, match=f"^{op}: logits require grad, but choosing tokens"):
            getattr(family, op)(inputs.logits, inputs.tokens, inputs.requests, mask_id=MASK, **inputs.options)
    assert torch.equal(inputs.tokens, before)


def test_no_grad_mode_accepts_them(backend):
    inputs = good(backend)
    inputs.logits.requires_grad_()
    with backend.use(family), torch.no_grad():
        step = family.decode_step_(inputs.logits, inputs.tokens, inputs.requests, mask_id=MASK, **inputs.options)
    assert (step.num_committed > 0).all()


@pytest.mark.no_launch
def test_select_and_commit_checks_its_own(backend):
    """What it shares with decode_step_ goes through the same code; this is the rest."""
    inputs = good(backend)
    candidates = torch.zeros(2, 4, dtype=torch.int64, device=backend.device)
    statistics = torch.rand(2, 4, 4, device=backend.device)
    where = "(dtype fp32, device cuda:0)" if backend.name == "cuda" else "(dtype fp32, device cpu)"
    before = inputs.tokens.clone()
    for found, message in [
        (RowScan(candidates.int(), statistics), "candidates must be int64, got int32"),
        (RowScan(candidates[0], statistics), "candidates must have shape [batch, block_length], got [4]"),
        (RowScan(spread(candidates), statistics), "candidates must be contiguous, got strides [8, 2]"),
        (
            RowScan(candidates.new_zeros(2, 1025), statistics),
            "candidates must have a block_length of 1 to 1024, got 1025",
        ),
        (RowScan(candidates, statistics.half()), "statistics must be fp32, got fp16"),
        (
            RowScan(candidates, statistics[..., :3].clone()),
            f"statistics must have shape [batch, block_length, 4]=[2, 4, 4], got [2, 4, 3] {where}",
        ),
        (RowScan(candidates, spread(statistics)), "statistics must be contiguous, got strides [32, 8, 2]"),
    ]:
        with backend.use(family), pytest.raises(RuntimeError, match="^" + re.escape(f"select_and_commit_: {message}")):
            family.select_and_commit_(found, inputs.tokens, inputs.requests, mask_id=MASK)
    found = RowScan(candidates, statistics)
    for change, message in [
        ({"tokens": inputs.tokens[:1].expand(2, 11)}, "tokens must have rows that do not overlap, got strides [0, 1]"),
        ({"mask_id": -1}, "mask_id must be an id of the vocabulary"),
    ]:
        arguments = {"tokens": inputs.tokens, "requests": inputs.requests, "mask_id": MASK} | change
        with backend.use(family), pytest.raises(RuntimeError, match="^" + re.escape(f"select_and_commit_: {message}")):
            family.select_and_commit_(found, **arguments)
    assert torch.equal(inputs.tokens, before)


def test_requests_of_another_device(cuda):
    inputs = good(cuda)
    inputs.requests = copied(inputs.requests, "cpu")
    with pytest.raises(RuntimeError, match="stable_steps must be on the device of logits, cuda:0, got cpu"):
        family.decode_step_(inputs.logits, inputs.tokens, inputs.requests, mask_id=MASK, **inputs.options)
