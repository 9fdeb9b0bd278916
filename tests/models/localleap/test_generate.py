"""generate() and infill(): caches, early stop, what is streamed, what is computed, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from plain_decoding import plain_decode, sharp_model
from small_models import CONFIG, CONFIGS, some_tokens
from tokenweave_models.localleap import passes
from tokenweave_models.localleap.decoding import BlockDecoder, Commit, Rules
from tokenweave_models.localleap.generate import generate, infill, plan_generate
from tokenweave_models.localleap.model import random_model
from tokenweave_models.localleap.passes import CACHES

from tokenweave_ops import DecodeRequests

BLOCK, GEN, MASK, EOS = 8, 24, CONFIG.mask_id, CONFIG.eos_id
PROMPTS = [some_tokens(1, length, seed=length)[0] % 70 for length in (5, 12, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=("llada", "dream"))
def model(request):
    return sharp_model(CONFIGS[request.param])


def with_eos(model, eos_id: int):
    """The same weights, ending texts with another token."""
    return sharp_model(replace(model.config, eos_id=eos_id))


def tokens_of(found) -> list[list[int]]:
    return [tokens.tolist() for tokens in found.tokens]


def passes_of(found) -> list[int]:
    return [one.forward_passes for one in found.statistics]


def masked_text(length: int, share: float, seed: int) -> torch.Tensor:
    hidden = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < share
    return (some_tokens(1, length, seed)[0] % 70).masked_fill(hidden, MASK)


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_first_step_of_a_block_does_not_use_the_cache(model, cache):
    def first_steps(cache):
        steps = []
        generate(model, PROMPTS, gen_length=GEN, block_length=BLOCK, cache=cache, on_commit=steps.append)
        return steps

    cached, uncached = first_steps(cache), first_steps("none")
    assert cached[0] == uncached[0]
    assert cached != uncached, "the cache was never used"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_that_is_the_whole_sequence_decodes_as_uncached(model, cache):
    texts = [masked_text(16, 0.7, seed) for seed in range(3)]
    uncached = infill(model, texts, block_length=16)
    cached = infill(model, texts, block_length=16, cache=cache)
    assert tokens_of(cached) == tokens_of(uncached) and passes_of(cached) == passes_of(uncached)


def test_the_last_block_is_the_same_with_prefix_and_dual_cache(model):
    runs = [generate(model, PROMPTS, gen_length=BLOCK, block_length=BLOCK, cache=cache) for cache in ("prefix", "dual")]
    assert tokens_of(runs[0]) == tokens_of(runs[1])


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_decodes_alike_alone_and_in_any_batch(model, cache):
    """At their own pace: thresholds so different that sequences are in different blocks, and end at different times."""
    arguments = {"gen_length": GEN, "block_length": BLOCK, "cache": cache, "policy": "threshold"}
    thresholds = [0.0, 0.4, 2.0]
    together = generate(model, PROMPTS, threshold=thresholds, **arguments)
    assert passes_of(together)[0] == 3 < passes_of(together)[1] < passes_of(together)[2] == GEN
    for number, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], threshold=thresholds[number], **arguments)
        assert tokens_of(alone)[0] == tokens_of(together)[number]
        assert passes_of(alone)[0] == passes_of(together)[number]
    turned = generate(model, PROMPTS[::-1], threshold=thresholds[::-1], **arguments)
    assert tokens_of(turned) == tokens_of(together)[::-1] and passes_of(turned) == passes_of(together)[::-1]


def test_what_is_computed(model, monkeypatch):
    """The head's rows are the masked positions of current blocks; who is done costs nothing."""
    head_rows, bodies = [], []
    logits, states = model.logits, model.hidden_states
    monkeypatch.setattr(model, "logits", lambda hidden: head_rows.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr(
        model, "hidden_states", lambda tokens, **more: bodies.append(tuple(tokens.shape)) or states(tokens, **more)
    )
    arguments = {"gen_length": GEN, "block_length": BLOCK, "policy": "threshold", "threshold": [0.0, 0.4, 2.0]}
    steps: list[list[Commit]] = []
    found = generate(model, PROMPTS, on_commit=steps.append, **arguments)
    left, rows = [BLOCK] * 3, []
    for commits in steps:
        rows.append(sum(left[sequence] for sequence in {c.sequence for c in commits}))
        for commit in commits:
            left[commit.sequence] = left[commit.sequence] - 1 or BLOCK
    assert head_rows == rows
    length = max(map(len, PROMPTS)) + GEN
    assert bodies == [(len({c.sequence for c in commits}), length) for commits in steps]
    assert sum(batch for batch, _ in bodies) == sum(passes_of(found))

    bodies.clear()
    found = generate(model, PROMPTS, cache="dual", **arguments)
    assert sum(batch for batch, width in bodies if width == length) == 3 * GEN // BLOCK  # one for each block
    window = BLOCK + model.config.shifted
    assert {width for _, width in bodies} == {length, window}
    assert bodies[-1] == (1, window)


# ------------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("cache", CACHES)
def test_commits_are_streamed_once_each_from_the_block_under_way(model, cache):
    steps: list[list[Commit]] = []
    found = generate(model, PROMPTS, gen_length=GEN, block_length=BLOCK, cache=cache, on_commit=steps.append)
    assert len(steps) == found.steps
    texts = [prompt.tolist() + [None] * GEN for prompt in PROMPTS]
    for commits in steps:
        assert commits and commits == sorted(commits)
        for sequence, position, token in commits:
            begin = len(PROMPTS[sequence])
            block = begin + (position - begin) // BLOCK * BLOCK
            assert None not in texts[sequence][:block], "a block began before the one to its left was done"
            assert texts[sequence][position] is None
            texts[sequence][position] = token
    assert [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)] == tokens_of(found)


def test_statistics_add_up(model):
    found = generate(model, PROMPTS, gen_length=GEN, block_length=BLOCK, threshold=0.5)
    for one in found.statistics:
        assert one.committed == GEN and one.tokens_per_forward == GEN / one.forward_passes and one.bad_rows == 0
        assert 0 < one.model_s <= found.model_s and 0 < one.selector_s <= found.selector_s
    assert found.steps == max(passes_of(found))
    slowest = found.statistics[passes_of(found).index(found.steps)]  # it took part in every step
    assert slowest.model_s == pytest.approx(found.model_s) and slowest.selector_s == pytest.approx(found.selector_s)


# ----------------------------------------------------------------------------------------------------------- early stop


@pytest.mark.parametrize("cache", CACHES)
def test_early_stop_ends_a_sequence_behind_the_block_with_the_end(model, cache):
    arguments = {"gen_length": GEN, "block_length": BLOCK, "cache": cache, "threshold": 0.5}
    whole = tokens_of(generate(model, PROMPTS, **arguments))
    # A token that ends the first text in its second block, and others perhaps elsewhere.
    eos = next(token for token in whole[0][BLOCK : 2 * BLOCK] if token not in whole[0][:BLOCK])
    ending = with_eos(model, eos)
    prompts = [*PROMPTS, [eos, *range(9, 2, -1)]]  # an end in the prompt ends nothing
    steps: list[list[Commit]] = []
    found = generate(ending, prompts, early_stop=True, on_commit=steps.append, **arguments)
    unstopped = generate(ending, prompts, **arguments)
    assert tokens_of(unstopped)[:-1] == whole
    assert eos not in tokens_of(unstopped)[-1][:BLOCK]
    for number, tokens in enumerate(tokens_of(unstopped)):
        blocks = [tokens[begin : begin + BLOCK] for begin in range(0, GEN, BLOCK)]
        kept = next((index + 1 for index, block in enumerate(blocks) if eos in block), len(blocks)) * BLOCK
        assert tokens_of(found)[number] == tokens[:kept] + [eos] * (GEN - kept)
        assert sum(commit.sequence == number for commits in steps for commit in commits) == kept
        assert found.statistics[number].committed == kept
    assert passes_of(found)[0] < passes_of(unstopped)[0]


# ----------------------------------------------------------------------------------------------------------- token ids


def test_ids_that_are_forbidden_deferred_or_padding_of_the_vocabulary(model):
    arguments = {"gen_length": BLOCK, "block_length": BLOCK, "threshold": 0.5}
    free = tokens_of(generate(model, PROMPTS, **arguments))
    favourites = {tokens[0] for tokens in free}
    forbidden = generate(model, PROMPTS, forbidden_ids=sorted(favourites), **arguments)
    assert not favourites & {token for tokens in tokens_of(forbidden) for token in tokens}
    limited = generate(model, PROMPTS, vocab_limit=max(favourites), **arguments)
    assert max(token for tokens in tokens_of(limited) for token in tokens) < max(favourites)
    steps: list[list[Commit]] = []
    generate(model, PROMPTS[:1], deferred_ids=[free[0][0]], on_commit=steps.append, **arguments)
    is_deferred = [commit.token == free[0][0] for commits in steps for commit in commits]
    assert is_deferred == sorted(is_deferred), "a deferred token was committed before another"


def test_rows_of_nan_are_counted_and_do_not_hang(model):
    broken = with_eos(model, EOS)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    found = generate(broken, PROMPTS[:1], gen_length=BLOCK, block_length=BLOCK)
    assert found.statistics[0].bad_rows == BLOCK * (BLOCK + 1) // 2  # a token a pass
    assert MASK not in tokens_of(found)[0]


# --------------------------------------------------------------------------------------------------------------- infill


@pytest.mark.parametrize("cache", CACHES)
def test_infill_is_the_plain_loop_over_blocks_with_masks(model, cache):
    texts = [masked_text(21, 0.5, seed) for seed in range(3)]
    texts[0][8:16] = 3  # a block without masks
    found = infill(model, texts, block_length=BLOCK, cache=cache)
    for text, tokens, passes_taken in zip(texts, found.tokens, passes_of(found), strict=True):
        starts = [start for start, end in ((0, 8), (8, 16), (13, 21)) if MASK in text[start:end]]
        starts = [start for start in starts if start != 13 or MASK in text[16:]]  # the last block reaches back
        trace = plain_decode(model, text, starts, BLOCK, cache=cache, policy="local_leap")
        assert tokens.tolist() == trace.tokens and passes_taken == len(trace.steps)
        known = text != MASK
        assert torch.equal(tokens[known], text[known]) and MASK not in tokens


@pytest.mark.parametrize("cache", CACHES)
def test_infill_of_texts_of_any_length(model, cache):
    """Shorter than a block, without masks, beginning with one, nothing but masks."""
    texts = [masked_text(5, 1.0, 0), masked_text(30, 0.0, 1), masked_text(19, 0.6, 2), masked_text(17, 1.0, 3)]
    together = infill(model, texts, block_length=BLOCK, cache=cache)
    assert tokens_of(together)[1] == texts[1].tolist() and passes_of(together)[1] == 0
    for number, text in enumerate(texts):
        alone = infill(model, [text], block_length=BLOCK, cache=cache)
        assert tokens_of(alone)[0] == tokens_of(together)[number]
        assert passes_of(alone)[0] == passes_of(together)[number]
        assert MASK not in together.tokens[number]


def test_generate_is_infill_of_masks_behind_whole_blocks(model):
    prompt = PROMPTS[1][:BLOCK]
    text = torch.cat((prompt, torch.full((GEN,), MASK)))
    filled = infill(model, [text], block_length=BLOCK)
    assert tokens_of(filled)[0][BLOCK:] == tokens_of(generate(model, [prompt], gen_length=GEN, block_length=BLOCK))[0]


# ------------------------------------------------------------------------------------------------------------ the edges


def test_prompts_of_nothing_and_no_prompts(model):
    empty: list[int] = []
    found = generate(model, [empty, [3, 4]], gen_length=BLOCK, block_length=BLOCK, cache="dual")
    assert (
        tokens_of(found)[0]
        == tokens_of(generate(model, [empty], gen_length=BLOCK, block_length=BLOCK, cache="dual"))[0]
    )
    nothing = generate(model, [], gen_length=BLOCK, block_length=BLOCK)
    assert nothing.tokens == [] and nothing.statistics == [] and nothing.steps == 0
    assert passes_of(infill(model, [[1, 2, 3]], cache="dual")) == [0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gen_length": 20}, "gen_length must be a multiple of block_length=8, got 20"),
        ({"gen_length": 0}, "gen_length must be a multiple of block_length=8, got 0"),
        ({"block_length": 0}, "block_length must be 1 to 1024, got 0"),
        ({"gen_length": 2048, "block_length": 2048}, "block_length must be 1 to 1024, got 2048"),
        ({"gen_length": 64}, "a prompt with its new tokens must have at most 64 positions, got 66"),
        ({"cache": "both"}, "cache must be one of none, prefix, dual, got 'both'"),
        ({"policy": "leap"}, "policy must be one of topk, threshold, .*, got 'leap'"),
        ({"policy": ["topk"]}, "policy must be a name or 2 of them, got 1"),
        ({"threshold": [0.5]}, "threshold must be a number or 2 of them"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"cuda_graph": True}, "cuda_graph must be False unless on a GPU with cache 'dual', got cpu, 'none'"),
        ({"prompts": [[1, MASK], [2]]}, f"prompt 0 must not have the mask's id {MASK}; infill"),
        ({"prompts": [[1], [2, 80]]}, "prompt 1 must have tokens 0 to 79, got 2 to 80"),
        ({"prompts": [[1], [-1]]}, "prompt 1 must have tokens 0 to 79, got -1 to -1"),
        ({"prompts": [[0.5], [1]]}, r"prompt 0 must be token ids, \[num_tokens\] int64, got \[1\] torch.float32"),
        ({"prompts": [[[1]], [1]]}, r"prompt 0 must be token ids, \[num_tokens\] int64, got \[1, 1\]"),
    ],
)
def test_what_is_refused(arguments, message):
    model = random_model(CONFIG, 0)
    given = {"prompts": [[1, 2], [3]], "gen_length": GEN, "block_length": BLOCK} | arguments
    with pytest.raises(ValueError, match=message):
        generate(model, given.pop("prompts"), **given)


@pytest.mark.parametrize("numbers", [{"threshold": float("nan")}, {"radius": -1}, {"temperature": -1.0}])
def test_numbers_that_make_no_sense_are_refused_by_the_op(model, numbers):
    lists = {name: [0, value] for name, value in numbers.items()}
    with pytest.raises(RuntimeError, match=f"request 1: .*{next(iter(numbers))}"):
        generate(model, PROMPTS[:2], gen_length=BLOCK, block_length=BLOCK, **lists)


# ----------------------------------------------------------------------------------------------------------- CUDA graph


class FakeGraph:
    """Computes anew at each replay, for a batch of the size that was captured."""

    captures: ClassVar[list[int]] = []

    def __init__(self, compute, device):
        self.compute, self.batch = compute, len(compute())
        self.captures.append(self.batch)

    def replay(self):
        logits = self.compute()
        assert len(logits) == self.batch, "the batch has changed since the capture"
        return logits


@pytest.mark.parametrize("policy", ["threshold", "klass"])
def test_steps_within_blocks_are_replayed_as_a_graph(model, monkeypatch, policy):
    monkeypatch.setattr(passes, "BlockGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "captures", [])
    thresholds = [0.0, 0.2, 0.4, 2.0, 0.3]
    prompts = [*PROMPTS, [4, 4], []]
    texts, blocks = plan_generate(model.config, prompts, GEN, BLOCK)
    requests = DecodeRequests.make(5, BLOCK, policy=policy, threshold=thresholds, relaxed_threshold=0.5)
    graphed = BlockDecoder(model, texts, blocks, requests, Rules(cache="dual", steps=BLOCK, cuda_graph=True))
    steps = list(graphed)
    eager: list[list[Commit]] = []
    found = generate(
        model, prompts, policy=policy, threshold=thresholds, relaxed_threshold=0.5, cache="dual", gen_length=GEN,
        block_length=BLOCK, on_commit=eager.append,
    )  # fmt: skip
    assert steps == eager
    assert [text.tolist()[-GEN:] for text in graphed.results] == tokens_of(found)
    assert [one.forward_passes for one in graphed.statistics()] == passes_of(found)
    # A capture takes long, so there is one for each halving of the batch and not for each sequence that ends.
    assert len(FakeGraph.captures) > 1
    assert all(2 * after <= before for before, after in itertools.pairwise(FakeGraph.captures))


@pytest.mark.parametrize("policy", ["local_leap", "klass"])
def test_on_a_gpu_as_on_a_cpu_with_and_without_graphs(cuda, model, policy):
    arguments = {"policy": policy, "threshold": [0.0, 0.3, 2.0], "relaxed_threshold": 0.1}
    arguments |= {"gen_length": GEN, "block_length": BLOCK, "cache": "dual"}
    on_cpu = generate(model, PROMPTS, **arguments)
    moved = sharp_model(model.config, device="cuda")
    for graph in (False, True):
        found = generate(moved, PROMPTS, cuda_graph=graph, **arguments)
        assert tokens_of(found) == tokens_of(on_cpu) and passes_of(found) == passes_of(on_cpu)


@pytest.mark.parametrize("cache", CACHES)
def test_bf16_and_padding_on_a_gpu(cuda, cache):
    """Kernels that a float64 model does not reach: norms, masked attention in bf16, strided caches, in graphs too."""
    model = random_model(CONFIG, 3, torch.bfloat16, "cuda", logit_std=8.0)
    arguments = {"gen_length": GEN, "block_length": BLOCK, "cache": cache}
    eager = generate(model, PROMPTS, **arguments)
    assert tokens_of(generate(model, PROMPTS, **arguments)) == tokens_of(eager)
    assert all(MASK not in tokens for tokens in tokens_of(eager))
    if cache == "dual":
        assert tokens_of(generate(model, PROMPTS, cuda_graph=True, **arguments)) == tokens_of(eager)


def test_a_step_that_can_commit_nothing_is_an_error_and_not_a_loop(model):
    with pytest.raises(RuntimeError, match="generate: sequence 0: a step committed none of 8 masks"):
        generate(model, PROMPTS[:1], gen_length=BLOCK, block_length=BLOCK, vocab_limit=1, forbidden_ids=[0])


def test_lengths_are_refused_before_memory_is_taken():
    with pytest.raises(ValueError, match=r"at most 64 positions, got 8000000000001"):
        plan_generate(CONFIG, PROMPTS[2:3], 8_000_000_000_000, BLOCK)


SENT = [torch.arange(6).view(2, 3), torch.arange(0), torch.tensor([[7]])]


def test_what_is_packed_comes_out_as_it_was():
    vector = passes.packed(SENT)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert all(map(torch.equal, SENT, passes.unpacked(vector, SENT)))


def test_all_that_is_sent_to_a_gpu_arrives_as_it_was(cuda):
    one = passes.Passes(
        random_model(CONFIG, 0, torch.float32, "cuda"), torch.zeros(1, 8, dtype=torch.int64, device="cuda"),
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64, device="cuda"), 8, cache="none",
    )  # fmt: skip
    sent = one._send(SENT)
    assert all(tensor.is_cuda for tensor in sent)
    assert all(map(torch.equal, SENT, [tensor.cpu() for tensor in sent]))
