"""Passes over some positions with the keys and values of the others from a cache: full, dual, prefix."""

import pytest
import torch

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint can be read")

from checkpoint_files import LLADA, random_tensors, write_checkpoint  # noqa: E402
from plain_model import plain_llada  # noqa: E402
from small_models import CONFIG, CONFIGS, some_tokens  # noqa: E402
from tokenweave_models.localleap.cache import KVCache  # noqa: E402
from tokenweave_models.localleap.checkpoint import load_model  # noqa: E402
from tokenweave_models.localleap.config import ModelConfig  # noqa: E402
from tokenweave_models.localleap.model import random_model  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from tokenweave_ops.testing import cuda_unavailable_reason  # noqa: E402

LENGTH = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only wait for each other at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ all modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_full_pass_is_the_same_with_a_cache(config, dtype):
    model = random_model(config, seed=0, dtype=dtype)
    tokens = some_tokens(3, LENGTH)
    expected = model.hidden_states(tokens)
    cache = KVCache(config, 3, LENGTH, dtype)
    assert torch.equal(model.hidden_states(tokens, cache=cache), expected)
    positions = torch.arange(LENGTH).expand(3, LENGTH)
    assert torch.equal(model.hidden_states(tokens, cache=cache, positions=positions), expected)


def test_a_block_that_is_the_whole_sequence_is_a_full_pass(config):
    """In whatever order its positions come, and whatever was in the cache before."""
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens = some_tokens(2, LENGTH)
    cache = KVCache(config, 2, LENGTH, torch.float64)
    model.hidden_states(some_tokens(2, LENGTH, seed=9), cache=cache)
    generator = torch.Generator().manual_seed(4)
    positions = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(2)])
    found = model.hidden_states(tokens.gather(1, positions), cache=cache, positions=positions)
    expected = model.hidden_states(tokens)
    close(found, expected.gather(1, positions[..., None].expand_as(expected)))


def test_a_block_of_the_tokens_that_were_there_changes_nothing(config):
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens, block = some_tokens(2, LENGTH), slice(5, 11)
    cache = KVCache(config, 2, LENGTH, torch.float64)
    expected = model.hidden_states(tokens, cache=cache)
    before = cache.keys.clone(), cache.values.clone()
    positions = torch.arange(5, 11).expand(2, 6)
    close(model.hidden_states(tokens[:, block], cache=cache, positions=positions), expected[:, block])
    close(cache.keys, before[0])
    close(cache.values, before[1])


@pytest.mark.parametrize(
    "begin, end", [(4, 10), (6, LENGTH), (0, 3), (15, 16)], ids=["dual", "prefix", "first block", "one token"]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_rest_is_as_the_last_full_pass_left_it(tmp_path, kv_heads, begin, end):
    """Against Fast-dLLM's way: keys are cached before RoPE, and all are rotated in every step. Two steps, the second of
    which sees the first's rows."""
    config = LLADA | {"n_kv_heads": kv_heads}
    tensors = random_tensors(config, torch.float64)
    model = load_model(write_checkpoint(tmp_path, config, tensors))
    tokens = some_tokens(1, LENGTH)[0]
    cache = KVCache(model.config, 1, LENGTH, torch.float64)
    model.hidden_states(tokens[None], cache=cache)
    _, stale = plain_llada(config, tensors, tokens)
    for positions, seed in ((torch.arange(begin, end), 2), (torch.arange(begin, (begin + end + 1) // 2), 3)):
        new = some_tokens(1, len(positions), seed)
        found = model.logits(model.hidden_states(new, cache=cache, positions=positions[None]))
        expected, stale = plain_llada(config, tensors, new[0], positions, stale)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-11)
        fresh, _ = plain_llada(config, tensors, tokens.index_copy(0, positions, new[0]))
        assert not torch.allclose(expected, fresh[positions])  # the approximation shows
    for layer, (_, values) in enumerate(stale):
        torch.testing.assert_close(cache.values[layer, 0].transpose(0, 1).flatten(1), values, rtol=0, atol=1e-11)


def test_each_sequence_has_its_own_positions(config):
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens, new = some_tokens(3, LENGTH), some_tokens(3, 4, seed=2)
    positions = torch.tensor([[3, 4, 5, 6], [12, 13, 14, 15], [9, 0, 7, 2]])
    cache = KVCache(config, 3, LENGTH, torch.float64)
    model.hidden_states(tokens, cache=cache)
    found = model.hidden_states(new, cache=cache, positions=positions)
    for row in range(3):
        own = KVCache(config, 1, LENGTH, torch.float64)
        model.hidden_states(tokens[row : row + 1], cache=own)
        alone = model.hidden_states(new[row : row + 1], cache=own, positions=positions[row : row + 1])
        close(found[row], alone[0])
        close(cache.keys[:, row], own.keys[:, 0])
        close(cache.values[:, row], own.values[:, 0])


def test_a_position_may_be_given_twice(config):
    """For windows of unequal length in one batch."""
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens, new = some_tokens(1, LENGTH), some_tokens(1, 4, seed=2)
    positions = torch.arange(LENGTH - 4, LENGTH)[None]
    found = []
    for columns in ([0, 1, 2, 3], [0, 1, 2, 3, 3, 3]):
        cache = KVCache(config, 1, LENGTH, torch.float64)
        model.hidden_states(tokens, cache=cache)
        found.append(model.hidden_states(new[:, columns], cache=cache, positions=positions[:, columns])[:, :4])
    close(found[1], found[0])


def test_padding_on_the_left_changes_nothing(config):
    """A full pass, then a step of the last four positions: each sequence as without padding and alone."""
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens, new = some_tokens(2, LENGTH), some_tokens(2, 4, seed=2)
    lengths = (LENGTH - 5, LENGTH)
    valid = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    cache = KVCache(config, 2, LENGTH, torch.float64)
    model.hidden_states(tokens, cache=cache, valid=valid)
    positions = torch.arange(LENGTH - 4, LENGTH).expand(2, 4)
    found = model.hidden_states(new, cache=cache, valid=valid, positions=positions)
    for row, length in enumerate(lengths):
        own = KVCache(config, 1, length, torch.float64)
        model.hidden_states(tokens[row : row + 1, LENGTH - length :], cache=own)
        own_positions = torch.arange(length - 4, length)[None]
        alone = model.hidden_states(new[row : row + 1], cache=own, positions=own_positions)
        close(found[row], alone[0])


def test_rows_beyond_key_length_are_not_read(config):
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens = some_tokens(2, 9)
    cache = KVCache(config, 2, LENGTH, torch.float64)
    for part in (cache.keys, cache.values):
        part[..., 9:, :] = torch.nan
    expected = model.hidden_states(tokens)
    close(model.hidden_states(tokens, cache=cache, key_length=9), expected)
    block = torch.arange(3, 6).expand(2, 3)
    close(model.hidden_states(tokens[:, 3:6], cache=cache, key_length=9, positions=block), expected[:, 3:6])
    assert cache.keys[..., 9:, :].isnan().all()


def test_rows_that_were_never_written_may_be_masked(config):
    model = random_model(config, seed=0, dtype=torch.float64)
    tokens = some_tokens(2, 6)
    cache = KVCache(config, 2, LENGTH, torch.float64)
    positions = torch.arange(LENGTH - 6, LENGTH).expand(2, 6)
    valid = (torch.arange(LENGTH) >= LENGTH - 6).expand(2, LENGTH)
    close(model.hidden_states(tokens, cache=cache, valid=valid, positions=positions), model.hidden_states(tokens))


# ------------------------------------------------------------------------------------------------------- where it works


def test_the_host_never_waits():
    """Tensors without data: whatever asks for a number in one of them raises."""
    config = CONFIG
    model = random_model(config, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = KVCache(config, 2, LENGTH, torch.float32)
        tokens, positions = (torch.zeros(2, 5, dtype=torch.int64) for _ in range(2))
        valid = torch.ones(2, LENGTH, dtype=torch.bool)
        found = model.hidden_states(tokens, cache=cache, positions=positions, valid=valid)
    assert found.shape == (2, 5, 48)


def test_a_cuda_graph_replays_the_step_for_other_positions():
    if (reason := cuda_unavailable_reason()) is not None:
        pytest.skip(reason)
    for config in CONFIGS.values():
        model = random_model(config, seed=0, device="cuda")
        caches = [KVCache(config, 2, LENGTH, torch.float32, "cuda") for _ in range(2)]
        for cache in caches:
            model.hidden_states(some_tokens(2, LENGTH).cuda(), cache=cache)
        tokens, positions = some_tokens(2, 4, seed=2).cuda(), torch.arange(4, device="cuda").repeat(2, 1)
        valid = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda")

        def step(cache, model=model, tokens=tokens, positions=positions, valid=valid):
            return model.hidden_states(tokens, cache=cache, positions=positions, valid=valid)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(caches[0])
        torch.cuda.current_stream().wait_stream(side)
        step(caches[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(caches[0])
        for seed, begins in ((3, (8, 1)), (4, (0, 12))):
            tokens.copy_(some_tokens(2, 4, seed))
            positions.copy_(torch.tensor(begins)[:, None] + torch.arange(4))
            graph.replay()
            torch.testing.assert_close(found, step(caches[1]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-5, atol=1e-5)


def test_a_cache_born_in_inference_mode_works_outside():
    model = random_model(CONFIG, seed=0)
    with torch.inference_mode():
        cache = KVCache(CONFIG, 1, LENGTH, torch.float32)
        expected = model.hidden_states(some_tokens(1, LENGTH), cache=cache)
    assert torch.equal(model.hidden_states(some_tokens(1, LENGTH), cache=cache), expected)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_cache_has_no_gradients():
    model = random_model(CONFIG, seed=0)
    cache = KVCache(CONFIG, 1, LENGTH, torch.float32)
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"^hidden_states: a cache has no gradients; call it under"),
    ):
        model.hidden_states(some_tokens(1, LENGTH), cache=cache)  # fmt: skip
    assert not cache.keys.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"tokens": some_tokens(3, 4)},
            r"cache must be \[2, 3, 4, \.\.\.\] torch.float32, got \[2, 2, 4, \.\.\.\] torch.f",
        ),
        ({"key_length": 3}, "key_length must be length=4 to the cache's max_length=16, got 3"),
        ({"key_length": 17}, "key_length must be length=4 to the cache's max_length=16, got 17"),
        ({"tokens": some_tokens(2, 17)}, "key_length must be length=17 to the cache's max_length=16, got 16"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, r"valid must be \[batch, key_length\]=\[2, 16\] bool, got"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    model = random_model(CONFIG, seed=0)
    cache = KVCache(CONFIG, 2, LENGTH, torch.float32)
    arguments = {"tokens": some_tokens(2, 4)} | arguments
    with pytest.raises(ValueError, match=f"^hidden_states: {message}"):
        model.hidden_states(arguments.pop("tokens"), cache=cache, **arguments)
    assert not cache.keys.any()


def test_a_cache_of_another_model():
    model = random_model(CONFIG, seed=0)
    for cache, what in (
        (KVCache(CONFIGS["dream"], 2, LENGTH, torch.float32), r"\[2, 2, 2, \.\.\.\] torch.float32"),
        (KVCache(CONFIG, 2, LENGTH, torch.bfloat16), r"\[2, 2, 4, \.\.\.\] torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"cache must be .* torch.float32, got {what}$"):
            model.hidden_states(some_tokens(2, 4), cache=cache)
        assert not cache.keys.any()


@pytest.mark.parametrize(
    "batch, max_length, message",
    [
        (0, 8, "batch must be at least 1, got 0"),
        (1, 0, "max_length must be 1 to max_positions=64, got 0"),
        (1, 65, "max_length must be 1 to max_positions=64, got 65"),
    ],
)
def test_a_cache_that_cannot_be(batch, max_length, message):
    with pytest.raises(ValueError, match=f"^KVCache: {message}$"):
        KVCache(CONFIG, batch, max_length, torch.float32)
