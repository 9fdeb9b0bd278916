"""The decoder against `transformers`, on small random checkpoints that `transformers` itself saved.

    checkpoint     a folder written by transformers' save_pretrained: config.json and safetensors files
    ours           load_decoder(folder), run by the Executor: in one pass per request, in chunks, token by token, and
                   as a mixed batch
    theirs         transformers' own model of the same folder, float32, one forward per request, no cache
    truth          transformers' own model, where every float32 in its source means float64

In float64 ours is the truth up to the rounding of float64. In float32 the largest error of ours is at most twice that
of theirs, plus a few units in the last place. (transformers in dtype=float64 would be no truth: it computes norms,
rotary positions and the routing of experts in float32.)
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

from tokenweave_models.tokenweave.batch import Batch, KVCache  # noqa: E402
from tokenweave_models.tokenweave.checkpoint import DEFAULTS, load_config, load_decoder  # noqa: E402
from tokenweave_models.tokenweave.executor import Executor  # noqa: E402
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition, Reduction  # noqa: E402

SIZES = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.125,  # keeps the variance of a vector of 64
}
# Of 4 frequencies one is kept, one blended and two are divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE_HEADS = {"head_dim": 16}  # not hidden_size / num_attention_heads


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def qwen2(**changes):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes))


def mixtral(**changes):
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | experts | changes))


CHECKPOINTS = {
    "llama": lambda: llama(),
    "llama with llama3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama with llama3 rope, tied, wide heads": lambda: llama(
        rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, **WIDE_HEADS
    ),
    "qwen2": lambda: qwen2(),
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
    "mixtral": lambda: mixtral(),
    "mixtral, tied, wide heads": lambda: mixtral(tie_word_embeddings=True, **WIDE_HEADS),
}

# Three requests and their tokens; a pass works on (request, begin, end) of some of them.
REQUEST_LENS = (29, 1, 13)
PASSES = {
    "one pass each": [[(0, 0, 29)], [(1, 0, 1)], [(2, 0, 13)]],
    "chunks": [[(0, 0, 5)], [(0, 5, 6)], [(0, 6, 17)], [(0, 17, 29)], [(1, 0, 1)], [(2, 0, 8)], [(2, 8, 13)]],
    "token by token": [
        [(request, token, token + 1)] for request, length in enumerate(REQUEST_LENS) for token in range(length)
    ],
    "all at once": [[(2, 0, 13), (0, 0, 29), (1, 0, 1)]],
    "mixed batches": [  # prompts and chunks of them beside single tokens
        [(0, 0, 11)],
        [(0, 11, 12), (2, 0, 6)],
        [(2, 6, 7), (1, 0, 1), (0, 12, 27)],
        [(0, 27, 28), (2, 7, 8)],
        [(0, 28, 29), (2, 8, 13)],
    ],
}
SLOTS = (2, 0, 1)  # of the cache, by request


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    requests: list[torch.Tensor]  # tokens
    theirs: torch.Tensor  # [all tokens, vocab_size], request after request
    truth: torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only wait for each other at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(7)
    model = CHECKPOINTS[request.param]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norm weights are saved as ones and biases as zeros: to forget one would not show
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    requests = [torch.randint(SIZES["vocab_size"], (length,)) for length in REQUEST_LENS]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return Checkpoint(folder, requests, their_logits(theirs, requests), true_logits(folder, theirs, requests))


@torch.inference_mode()
def their_logits(model, requests: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(tokens[None], use_cache=False).logits[0] for tokens in requests])


def true_logits(folder: Path, model, requests: list[torch.Tensor]) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        config = transformers.AutoConfig.from_pretrained(folder)
        precise = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
        precise = precise.double().eval()
        precise.load_state_dict(model.state_dict())
        return their_logits(precise, requests)


@torch.inference_mode()
def our_logits(checkpoint: Checkpoint, passes, dtype: torch.dtype, addition: type[Reduction]) -> torch.Tensor:
    model = load_decoder(checkpoint.folder, dtype=dtype)
    cache = KVCache(model.config, len(SLOTS), max(REQUEST_LENS), dtype=dtype)
    executor = Executor(model, cache, addition(sum(REQUEST_LENS), model.config.hidden, dtype))
    logits = [[] for _ in REQUEST_LENS]
    for chunks in passes:
        tokens = torch.cat([checkpoint.requests[request][begin:end] for request, begin, end in chunks])
        query_lens = [end - begin for _, begin, end in chunks]
        batch = Batch.of(tokens, query_lens, [end for *_, end in chunks], [SLOTS[request] for request, *_ in chunks])
        for (request, *_), rows in zip(chunks, executor.logits(executor.forward(batch)).split(query_lens), strict=True):
            logits[request].append(rows)
    return torch.cat([rows for of_request in logits for rows in of_request])


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())
def test_ours_is_the_truth_in_float64(checkpoint, passes):
    ours = our_logits(checkpoint, passes, torch.float64, EagerAddition)
    assert ours.dtype == checkpoint.truth.dtype == torch.float64
    assert 0.1 < checkpoint.truth.std() < 10
    torch.testing.assert_close(ours, checkpoint.truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("addition", [FusedAddition, EagerAddition])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())
def test_ours_is_as_good_as_theirs_in_float32(checkpoint, passes, addition):
    truth = checkpoint.truth
    ours = our_logits(checkpoint, passes, torch.float32, addition)
    assert ours.dtype == checkpoint.theirs.dtype == torch.float32
    our_error, their_error = (ours - truth).abs().max(), (checkpoint.theirs - truth).abs().max()
    bound = 2 * their_error + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert our_error <= bound

    best, second = truth.topk(2).values.unbind(-1)
    is_clear = best - second > 2 * bound
    assert is_clear.double().mean() > 0.9
    assert torch.equal(ours.argmax(-1)[is_clear], truth.argmax(-1)[is_clear])


def older(config: dict) -> dict:
    """A config.json of transformers 5 as transformers 4 wrote it."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config


def test_the_config_they_wrote_is_the_config_we_read(checkpoint, tmp_path):
    ours, theirs = load_config(checkpoint.folder), transformers.AutoConfig.from_pretrained(checkpoint.folder)
    assert (ours.vocab_size, ours.hidden, ours.intermediate, ours.num_layers) == (67, 64, 96, 3)
    assert (ours.num_heads, ours.num_kv_heads, ours.max_len, ours.norm_eps) == (8, 4, 64, 1e-5)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] == "llama3")
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.qkv_bias == (theirs.model_type == "qwen2")
    assert ours.num_experts == getattr(theirs, "num_local_experts", 0)
    assert load_decoder(checkpoint.folder).norm.weight.dtype == theirs.dtype == torch.float32

    config = json.loads((checkpoint.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(older(config)))
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == theirs.rope_parameters
    assert load_config(tmp_path) == ours


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_keys_that_are_left_out_mean_the_same_to_them(model_type, tmp_path):
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {"model_type": model_type} | {key: SIZES[key] for key in needed}
    config |= {"num_key_value_heads": 4, "num_local_experts": 5, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = load_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_len == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
