"""torch's own view of the ops: opcheck, fake tensors, torch.compile with fullgraph, what schemas say is written."""

from __future__ import annotations

import pytest
import torch
from decode_oracle import ALL_FEATURES, MASK, Inputs, copied, family, make_inputs

OPS = ["decode_step_", "confidence_scan", "select_and_commit_"]


def sample(backend, rows: bool = False) -> Inputs:
    inputs = make_inputs(2, 6, 40, policy=["local_leap", "klass"], features=ALL_FEATURES, masked=1.0, radius=0)
    if rows:
        inputs = inputs.but(rows=torch.arange(12).view(2, 6).flip(1), forbidden=torch.tensor([3, 4]))
    return inputs.on(backend.device)


def arguments(backend, op: str, rows: bool = False) -> tuple:
    i = sample(backend, rows)
    r, options = i.requests, i.options
    scanned = (options.get("rows"), options.get("forbidden"), None, options["previous_logits"], MASK, 40, 15, False)
    if op == "confidence_scan":
        return (
            i.logits, i.tokens, r.block_start, r.threshold, r.relaxed_threshold, r.temperature, r.seed, r.step,
            r.stable_steps, r.tickets, *scanned,
        )  # fmt: skip
    selected = (r.policy, r.threshold, r.relaxed_threshold, r.radius, r.temperature)
    state = (r.step, r.steps_left, r.stable_steps)
    if op == "select_and_commit_":
        candidates = torch.full((2, 6), 7, device=backend.device)
        statistics = torch.rand(2, 6, 4, device=backend.device)
        return candidates, statistics, i.tokens, r.block_start, *selected, *state, MASK, 15
    return i.logits, i.tokens, r.block_start, *selected, r.seed, *state, r.tickets, *scanned


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op, rows):
    torch.library.opcheck(getattr(backend.ops, op).default, arguments(backend, op, rows))


@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_have_the_real_metadata(backend, op):
    inputs = arguments(backend, op, rows=True)
    fakes = [copied(value, "meta") if isinstance(value, torch.Tensor) else value for value in inputs]
    real, fake = (getattr(backend.ops, op)(*given) for given in (inputs, fakes))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert other.device.type == "meta"


@pytest.mark.no_launch
def test_schemas_mark_what_is_written(backend):
    written = {
        op: [argument.name for argument in getattr(backend.ops, op).default._schema.arguments if argument.is_write]
        for op in OPS
    }
    assert written == {
        "decode_step_": ["tokens", "step", "steps_left", "stable_steps", "tickets"],
        "confidence_scan": ["tickets"],
        "select_and_commit_": ["tokens", "step", "steps_left", "stable_steps"],
    }


def two_steps(logits, tokens, requests, previous):
    """A slice of a decoding loop: something before, two steps, something after that reads what they wrote."""
    logits = logits * 2
    first = family.decode_step_(logits, tokens, requests, mask_id=MASK, previous_logits=previous)
    found = family.confidence_scan(logits, tokens, requests, mask_id=MASK, previous_logits=previous)
    second = family.select_and_commit_(found, tokens, requests, mask_id=MASK)
    return tokens + 1, first.num_committed + second.num_remaining, first.statistics.nan_to_num(), requests.step * 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph_equals_eager(backend, dynamic):
    given = [sample(backend) for _ in range(2)]
    torch._dynamo.reset()
    with backend.use(family):
        compiled = torch.compile(
            two_steps, fullgraph=True, dynamic=dynamic, backend="inductor" if backend.name != "simt" else "aot_eager"
        )
        results = [
            function(i.logits, i.tokens, i.requests, i.options["previous_logits"])
            for function, i in zip((two_steps, compiled), given, strict=True)
        ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    for name in ("step", "steps_left", "stable_steps", "tickets"):
        assert torch.equal(*(getattr(i.requests, name) for i in given)), name
    assert torch.equal(given[0].tokens, given[1].tokens)
    assert (given[0].requests.step == 2).any(), "the second step found masks"


def test_autograd_notices_the_tokens_were_overwritten(backend):
    """A tensor saved for a backward pass and then decoded into is an error, not a wrong gradient."""
    i = sample(backend)
    table = torch.randn(41, 3, device=backend.device, requires_grad=True)
    loss = table[i.tokens].sum()
    with backend.use(family):
        family.decode_step_(i.logits, i.tokens, i.requests, mask_id=MASK, **i.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
