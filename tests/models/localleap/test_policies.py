"""Every policy decodes as the plain loop does: the same tokens at the same steps, in any batch, with every cache."""

from __future__ import annotations

import pytest
import torch
from plain_decoding import plain_decode, sharp_model
from small_models import CONFIGS, some_tokens
from tokenweave_models.localleap.generate import generate
from tokenweave_models.localleap.passes import CACHES

from tokenweave_ops import POLICIES

BLOCK, GEN = 8, 16
# Prompts of other lengths, so that all sequences but one are padded, each by another number.
PROMPTS = [some_tokens(1, 1 + 3 * number, seed=number)[0] % 70 for number in range(len(POLICIES))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=("llada", "dream"))
def model(request):
    return sharp_model(CONFIGS[request.param])


def traces_of(model, prompts, **arguments) -> list[tuple[list[int], list[list[tuple[int, int]]]]]:
    """Of each sequence its new tokens, and what each of its passes committed."""
    steps: list[list[list[tuple[int, int]]]] = [[] for _ in prompts]

    def on_commit(commits):
        for sequence in sorted({commit.sequence for commit in commits}):
            steps[sequence].append([(c.position, c.token) for c in commits if c.sequence == sequence])

    found = generate(model, prompts, gen_length=GEN, block_length=BLOCK, on_commit=on_commit, **arguments)
    assert [len(each) for each in steps] == [one.forward_passes for one in found.statistics]
    return [(tokens.tolist(), each) for tokens, each in zip(found.tokens, steps, strict=True)]


def plain_traces_of(model, prompts, numbers, cache):
    traces = []
    for prompt, own in zip(prompts, numbers, strict=True):
        text = torch.cat((prompt, torch.full((GEN,), model.config.mask_id)))
        starts = range(len(prompt), len(text), BLOCK)
        trace = plain_decode(model, text, starts, BLOCK, cache=cache, **own)
        traces.append((trace.tokens[len(prompt) :], trace.steps))
    return traces


@pytest.mark.parametrize("cache", CACHES)
def test_policies_side_by_side_decode_as_alone_in_the_plain_loop(model, cache):
    names = [name for name in POLICIES if name != "klass"]  # which has all logits of a block computed, see below
    prompts = PROMPTS[: len(names)]
    traces = traces_of(model, prompts, policy=names, cache=cache)
    assert traces == plain_traces_of(model, prompts, [{"policy": name} for name in names], cache)
    passes = {name: len(steps) for name, (_, steps) in zip(names, traces, strict=True)}
    assert passes["topk"] == GEN and passes["local_leap"] < GEN and passes["entropy_threshold"] < GEN


@pytest.mark.parametrize("cache", CACHES)
def test_numbers_of_each_request(model, cache):
    """Among them klass, of which a random model needs a wide epsilon."""
    numbers = [
        {"policy": "local_leap", "threshold": 0.6, "relaxed_threshold": 0.2, "radius": 1},
        {"policy": "local_leap", "threshold": 0.6, "relaxed_threshold": 0.2, "radius": 3},
        {"policy": "threshold", "threshold": 0.3, "relaxed_threshold": 0.0, "radius": 0},
        {"policy": "klass", "threshold": 0.1, "relaxed_threshold": 0.5, "radius": 0},
    ]
    prompts = PROMPTS[2:6]
    lists = {name: [own[name] for own in numbers] for name in numbers[0]}
    traces = traces_of(model, prompts, cache=cache, **lists)
    assert traces == plain_traces_of(model, prompts, numbers, cache)
    assert all(len(steps) < GEN for _, steps in traces)
    assert len(traces[3][1]) > 4, "klass never waited for a stable distribution"


@pytest.mark.parametrize("cache", CACHES)
def test_temperature_draws_by_seed_whatever_the_batch(model, cache):
    numbers = [{"temperature": 0.8, "seed": seed} for seed in (1, 2, 2)]
    prompts = [PROMPTS[3], PROMPTS[3], PROMPTS[3], PROMPTS[5]]
    batch = traces_of(
        model, prompts, cache=cache, temperature=[0.8, 0.8, 0.8, 0.0], seed=[1, 2, 2, 7], policy="threshold"
    )  # fmt: skip
    assert batch[1] == batch[2] != batch[0]
    for number, own in enumerate(numbers[:2]):
        assert traces_of(model, prompts[:1], cache=cache, policy="threshold", **own) == [batch[number]]


def test_sampling_is_that_of_the_plain_loop(model):
    numbers = [{"policy": "local_leap", "temperature": 0.5 + seed, "seed": seed} for seed in range(3)]
    lists = {name: [own[name] for own in numbers] for name in numbers[0]}
    prompts = PROMPTS[1:4]
    assert traces_of(model, prompts, **lists) == plain_traces_of(model, prompts, numbers, "none")


def test_threshold_is_local_leap_without_a_window(model):
    prompts = PROMPTS[:4]
    for cache in CACHES:
        threshold = traces_of(model, prompts, policy="threshold", threshold=0.5, cache=cache)
        assert threshold == traces_of(model, prompts, threshold=0.5, relaxed_threshold=0.1, radius=0, cache=cache)
        assert threshold != traces_of(model, prompts, threshold=0.5, relaxed_threshold=0.1, cache=cache)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_topk_spreads_a_block_over_its_steps(model, steps):
    for _, trace in traces_of(model, PROMPTS[:2], policy="topk", steps=steps):
        counts = [len(commits) for commits in trace]
        assert len(counts) == steps * GEN // BLOCK
        assert counts == [BLOCK // steps + (step < BLOCK % steps) for step in range(steps)] * (GEN // BLOCK)


@pytest.mark.parametrize("cache", CACHES)
def test_a_block_that_is_committed_at_once_takes_one_pass(model, cache):
    """Fast-dLLM's cached loops run a second pass, over a block without masks."""
    found = generate(
        model, PROMPTS[:3], policy="threshold", threshold=0.0, gen_length=GEN, block_length=BLOCK, cache=cache
    )
    assert [one.forward_passes for one in found.statistics] == [GEN // BLOCK] * 3
    assert found.steps == GEN // BLOCK
