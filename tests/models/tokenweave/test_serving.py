"""Continuous batching: what the scheduler promises, for any requests; and that batching changes no token."""

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.reduction import EagerAddition
from tokenweave_models.tokenweave.runner.engine import Engine
from tokenweave_models.tokenweave.runner.random_weights import random_share
from tokenweave_models.tokenweave.runner.sampling import SamplingParams, next_tokens
from tokenweave_models.tokenweave.runner.serving import Chunk, Request, Scheduler

STOP = 7


def token_after(request: Request) -> int:
    """Some token, sometimes the one that stops."""
    return (31 * request.number + 17 * request.num_tokens) % 11


@dataclass
class Load:
    num_slots: int
    budget: int
    requests: list[Request]
    arrivals: list[int]  # the pass before which each comes


@st.composite
def loads(draw) -> Load:
    num_slots = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=12))
    requests = [Request(n, [n + i for i in range(p)], new, {STOP}) for n, (p, new) in enumerate(sizes)]
    arrivals = sorted(draw(st.lists(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes))))
    return Load(num_slots, num_slots + draw(st.integers(0, 30)), requests, arrivals)


@settings(max_examples=300, deadline=None)
@given(loads())
def test_every_token_is_scheduled_once_in_order_and_nobody_starves(load):
    scheduler = Scheduler(load.num_slots, load.budget, max_len=50)
    to_come = list(zip(load.arrivals, load.requests, strict=True))
    cached = dict.fromkeys(load.requests, 0)
    begun: list[Request] = []
    count = 0
    while to_come or not scheduler.is_idle:
        while to_come and to_come[0][0] <= count:
            scheduler.add(to_come.pop(0)[1])
        generating = [request for request in scheduler.running if request.generated]
        prefilling = [request for request in scheduler.running if not request.generated]
        chunks = scheduler.schedule()
        count += 1
        assert count <= 30 + sum(len(r.prompt) + r.max_new_tokens for r in load.requests)

        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        assert num_tokens <= load.budget
        # Whoever generates goes on, first; the oldest prompt advances.
        assert chunks[: len(generating)] == [Chunk(request, request.num_cached, 1) for request in generating]
        assert all(chunk.num_tokens >= 1 for chunk in chunks)
        assert not prefilling or chunks[len(generating)].request is prefilling[0]
        if num_tokens < load.budget:  # then nothing that could run was left out
            assert all(chunk.is_last_known for chunk in chunks)
            assert not scheduler.waiting or len(scheduler.running) == load.num_slots

        slots = [request.slot for request in scheduler.running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(load.num_slots))
        assert {chunk.request for chunk in chunks} <= set(scheduler.running)
        for chunk in chunks:
            assert chunk.begin == cached[chunk.request], "a token was left out or scheduled twice"
            cached[chunk.request] = chunk.end
            if chunk.request not in begun:
                begun.append(chunk.request)
        scheduler.advance(chunks, [token_after(chunk.request) for chunk in chunks if chunk.is_last_known])
        assert all(request.slot is None for request in load.requests if request.is_finished)

    assert [request.number for request in begun] == list(range(len(load.requests)))  # first come, first served
    for request in load.requests:
        assert request.is_finished
        assert cached[request] == request.num_tokens - 1  # nothing reads the last one
        assert STOP not in request.generated[:-1]
        assert len(request.generated) == request.max_new_tokens or request.generated[-1] == STOP


@given(st.integers(1, 9), st.integers(0, 9), st.data())
def test_a_request_knows_its_tokens_by_position(num_prompt, num_generated, data):
    everything = list(range(num_prompt + num_generated))
    request = Request(0, everything[:num_prompt], 20, generated=everything[num_prompt:])
    begin = data.draw(st.integers(0, len(everything)))
    end = data.draw(st.integers(begin, len(everything)))
    assert request.tokens(begin, end) == everything[begin:end]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Scheduler(0, 8, 8), "Scheduler: num_slots must be at least 1, got 0"),
        (
            lambda: Scheduler(4, 3, 8),
            "Scheduler: token_budget must be at least num_slots=4, so that all requests advance, got 3",
        ),
        (lambda: Request(3, [], 1), "Request 3: prompt must have at least one token, got none"),
        (lambda: Request(3, [1], 0), "Request 3: max_new_tokens must be at least 1, got 0"),
        (
            lambda: Scheduler(1, 8, max_len=8).add(Request(3, [1] * 6, 4)),
            "Scheduler: a request must fit 8 tokens, got 6 of prompt and 4 new ones for request 3",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_a_request_that_just_fits_is_served():
    Scheduler(1, 8, max_len=9).add(Request(3, [1] * 6, 4))


# ------------------------------------------------------------------------------------------------------------- engine

CONFIG = ModelConfig(vocab_size=97, hidden=32, intermediate=48, num_layers=2, num_heads=4, num_kv_heads=2)
PROMPTS = [[5, 4, 3, 2, 1] * 4, [9], [8, 8, 1], list(range(33))]
NUM_NEW = [6, 9, 1, 7]
# In float64 the order of additions decides no token.
MODEL = random_share(CONFIG, 0, 1, seed=2, dtype=torch.float64, device=torch.device("cpu"))


def executor(num_slots: int, max_tokens: int) -> Executor:
    cache = KVCache(CONFIG, num_slots, 48, dtype=torch.float64)
    return Executor(MODEL, cache, EagerAddition(max_tokens, CONFIG.hidden, torch.float64))


@torch.inference_mode()
def alone(number: int, sampling: SamplingParams) -> list[int]:
    """The request's tokens by definition: the whole of it again for each of them, and nothing cached."""
    tokens = list(PROMPTS[number])
    for _ in range(NUM_NEW[number]):
        runner, count = executor(1, 48), len(tokens)
        rows = runner.forward(Batch.of(torch.tensor(tokens), [count], [count], [0]))
        tokens += next_tokens(runner.logits(rows[-1:]), sampling, [number], [count])
    return tokens[len(PROMPTS[number]) :]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.5, top_k=40, top_p=0.95, seed=3)])
def test_batching_changes_no_token(sampling):
    expected = [alone(number, sampling) for number in range(len(PROMPTS))]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for num_slots, chunk in ((1, 48), (1, 3), (2, 5), (3, 7), (4, 48)):
        scheduler = Scheduler(num_slots, chunk, 48)
        engine = Engine(executor(num_slots, chunk), scheduler, sampling)
        requests = [Request(n, prompt, NUM_NEW[n]) for n, prompt in enumerate(PROMPTS)]
        for request in requests[:3]:
            scheduler.add(request)
        told: dict[int, list[int]] = {n: [] for n in range(len(PROMPTS))}
        count = 0
        while not scheduler.is_idle:
            if count == 2:  # one comes late
                scheduler.add(requests[3])
            for request, token in engine.step():
                told[request.number].append(token)
            count += 1
        assert [request.generated for request in requests] == expected, (num_slots, chunk)
        assert list(told.values()) == expected
    assert engine.step() == []


def test_a_stop_token_ends_its_request_only():
    expected = [alone(number, SamplingParams()) for number in (0, 1)]
    last = next(i for i in range(1, 8) if expected[1][i] not in expected[0] + expected[1][:i])
    stop = expected[1][last]
    scheduler = Scheduler(2, 16, 48)
    requests = [Request(n, PROMPTS[n], NUM_NEW[n], {stop}) for n in (0, 1)]
    engine = Engine(executor(2, 16), scheduler, SamplingParams())
    for request in requests:
        scheduler.add(request)
    while not scheduler.is_idle:
        engine.step()
    assert [request.generated for request in requests] == [expected[0], expected[1][: last + 1]]
