"""The transformer against LLaDA's formulas and against Qwen2 of `transformers` without its causal mask, in float64; its
kernels against torch; padding, gradients, and what is refused."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint can be read")

from checkpoint_files import DREAM, LLADA, random_tensors, write_checkpoint  # noqa: E402
from plain_model import plain_llada  # noqa: E402
from small_models import CONFIG, CONFIGS, some_tokens  # noqa: E402
from tokenweave_models.localleap import model as model_module  # noqa: E402
from tokenweave_models.localleap.checkpoint import load_model  # noqa: E402
from tokenweave_models.localleap.config import DREAM_7B, LLADA_8B  # noqa: E402
from tokenweave_models.localleap.model import DiffusionModel, random_model, rotary_factors, rotate  # noqa: E402

import tokenweave_ops  # noqa: E402
from tokenweave_ops.testing import cuda_unavailable_reason  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only wait for each other at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------- published models


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "weight_tying": True}], ids=str)
def test_it_is_llada(tmp_path, changes):
    config = LLADA | changes
    tensors = random_tensors(config, torch.float64)
    model = load_model(write_checkpoint(tmp_path, config, tensors))
    tokens = some_tokens(2, 19)
    with torch.no_grad():
        logits = model(tokens)
    assert logits.dtype == torch.float64
    for row in range(2):
        expected, _ = plain_llada(config, tensors, tokens[row])
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6, "tie_word_embeddings": True}], ids=str)
def test_it_is_dream(tmp_path, changes, monkeypatch):
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    config = DREAM | changes
    tensors = random_tensors(config, torch.float64)
    model = load_model(write_checkpoint(tmp_path, config, tensors), dtype=torch.float64)
    tokens = some_tokens(2, 19)

    # Qwen2 computes norms and rotary positions in float32: here every float32 in its source means float64.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    qwen2_config = transformers.Qwen2Config(**{key: config[key] for key in sizes}, rope_parameters=rope)
    qwen2 = transformers.AutoModelForCausalLM.from_config(qwen2_config, attn_implementation="eager").double().eval()
    head = {"lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])}
    qwen2.load_state_dict(tensors | head)
    nothing_hidden = torch.zeros(2, 1, 19, 19, dtype=torch.float64)
    with torch.no_grad():
        expected = qwen2(tokens, attention_mask=nothing_hidden, use_cache=False).logits
        logits = model(tokens)
    assert expected.dtype == torch.float64
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config, num_parameters", [(LLADA_8B, 8_015_581_184), (DREAM_7B, 7_615_616_512)])
def test_the_published_sizes(config, num_parameters):
    with torch.device("meta"):
        model = DiffusionModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_with_kernels_it_is_as_close_to_the_truth_as_without(name, dtype, device, monkeypatch):
    if device == "cuda" and (reason := cuda_unavailable_reason()) is not None:
        pytest.skip(reason)
    model = random_model(CONFIGS[name], seed=0, dtype=DTYPES[dtype], device=device)
    tokens = some_tokens(2, 33).to(device)
    calls = []
    for op in ("rms_norm", "add_rms_norm_"):
        real = getattr(tokenweave_ops, op)
        monkeypatch.setattr(model_module, op, lambda *args, op=op, real=real: (calls.append(op), real(*args))[1])
    torch_logits = model(tokens).detach().double()  # with gradients
    assert calls == []
    with torch.no_grad():
        logits = model(tokens).double()
        assert calls == ["rms_norm"] + ["add_rms_norm_"] * 2 * CONFIG.num_layers
        truth = model.double()(tokens)
        assert len(calls) == 1 + 2 * CONFIG.num_layers  # no kernel in float64
    ulp = torch.finfo(DTYPES[dtype]).eps * truth.abs().max()
    assert truth.std() > 0.1
    assert (logits - truth).abs().max() <= 2 * (torch_logits - truth).abs().max() + 4 * ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_positions_are_rotated_in_float32(dtype):
    """bf16 cannot tell position 4000 from 4010."""
    config = replace(CONFIG, head_dim=64, max_positions=4096)
    positions = torch.tensor([[0, 1, 3999, 4095]])
    x = torch.randn(1, 4, 3, 64, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    found = rotate(x, *rotary_factors(config, positions, x.dtype))
    expected = rotate(x.double(), *rotary_factors(config, positions, torch.float64))
    assert found.dtype == x.dtype
    # Angles of 4096 are known to 2^-12, times a few elements of at most 4.
    bound = 2**-12 * 4 + torch.finfo(x.dtype).eps * 4
    assert (found.double() - expected).abs().max() <= bound
    assert torch.equal(found[:, 0], x[:, 0])


def test_the_head_is_computed_for_the_rows_that_are_asked_for():
    model = random_model(CONFIG, seed=0, dtype=torch.float64)
    tokens = some_tokens(3, 9)
    with torch.no_grad():
        rows = model.hidden_states(tokens)[torch.arange(3), torch.tensor([8, 0, 4])]
        found = model.logits(rows)
        expected = model(tokens)[torch.arange(3), torch.tensor([8, 0, 4])]
    assert found.shape == (3, 80)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_left_changes_nothing(name):
    """Three sequences of 5, 12 and 9 tokens, alone and padded to 12: learned positions, too, count from the first."""
    model = random_model(CONFIGS[name], seed=3, dtype=torch.float64)
    lengths = (5, 12, 9)
    tokens = some_tokens(3, 12)
    valid = torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
    with torch.no_grad():
        padded = model(tokens, valid)
        other_padding = model(tokens.where(valid, (tokens + 7) % 80), valid)
        without_mask = model(tokens)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, 12 - length :])[0]
            torch.testing.assert_close(padded[row, 12 - length :], alone, rtol=0, atol=1e-12)
    assert torch.equal(padded[valid], other_padding[valid])
    assert not torch.allclose(padded[0, 7:], without_mask[0, 7:])
    assert padded.isfinite().all()


def test_a_sequence_is_rotated_alike_behind_any_padding():
    """By the same angles, and not by others at the same distances, which float32 knows only to 1500 * 2^-24."""
    model = random_model(replace(CONFIG, max_positions=2048), seed=0)
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        alone = model(tokens)
        behind = model(F.pad(tokens, (1500, 0)), torch.arange(1506)[None] >= 1500)[:, 1500:]
    torch.testing.assert_close(behind, alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_training_reaches_every_parameter(name):
    model = random_model(CONFIGS[name], seed=0)
    tokens = some_tokens(4, 17)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        if parameter_name == "embed_positions.weight":
            rows = rows[:17]
        if parameter_name == "embed_tokens.weight" and not CONFIGS[name].tie_embeddings:
            rows = rows[tokens.unique()]
        assert rows.abs().amax(1).min() > 0, parameter_name


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_function(name):
    """Along a random direction in all parameters at once."""
    model = random_model(CONFIGS[name], seed=0, dtype=torch.float64)
    tokens = some_tokens(2, 9)
    valid = torch.arange(9) >= torch.tensor([[0], [3]])
    weights = torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights[~valid] = 0
    generator = torch.Generator().manual_seed(6)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]

    (model(tokens, valid) * weights).sum().backward()
    found = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))

    def moved(step):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=step)
            total = (model(tokens, valid) * weights).sum()
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return total

    step = 1e-5
    expected = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_frozen_model_needs_no_grad_mode():
    """Kernels run wherever no gradient is asked for."""
    model = random_model(CONFIG, seed=0)
    tokens = some_tokens(1, 5)
    with torch.inference_mode():
        expected = model(tokens)
    model.requires_grad_(False)
    assert torch.equal(model(tokens), expected)
    for parameter in model.layers[1].mlp_norm.parameters():  # one that does is enough
        parameter.requires_grad_(True)
    model(tokens).sum().backward()
    assert model.layers[1].mlp_norm.weight.grad.abs().min() > 0


# ------------------------------------------------------------------------------------------------------- random weights


def test_weights_follow_from_the_seed():
    first, again, other = (random_model(CONFIG, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("logit_std", [1.0, 10.0])
def test_a_random_model_is_as_sure_as_asked(name, logit_std):
    model = random_model(CONFIGS[name], seed=0, dtype=torch.float64, logit_std=logit_std)
    with torch.no_grad():
        hidden = model.hidden_states(some_tokens(8, 64))
        std = model.logits(hidden).std()
    assert 0.8 < hidden.std() < 1.25
    assert 0.8 * logit_std < std < 1.25 * logit_std


def test_the_stream_of_a_random_model_does_not_grow_with_depth():
    deep = random_model(replace(CONFIG, num_layers=24), seed=0, dtype=torch.float64)
    streams = []
    for layer in deep.layers:
        layer.down_proj.register_forward_hook(lambda _layer, _inputs, out: streams.append(out))
        layer.o_proj.register_forward_hook(lambda _layer, _inputs, out: streams.append(out))
    tokens = some_tokens(4, 32)
    with torch.no_grad():
        deep.hidden_states(tokens)
    stream = deep.embed_tokens(tokens)
    assert 0.8 < stream.std() < 1.25
    assert (stream + sum(streams)).std() < 1.5


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"head_dim": 7}, r"head_dim must be even \(rotary pairs\), got 7"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
        ({"mask_id": 80}, "mask_id must be 0 to vocab_size - 1 = 79, got 80"),
        ({"eos_id": -1}, "eos_id must be 0 to vocab_size - 1 = 79, got -1"),
        ({"learned_positions": 63}, "learned_positions must be 0 or at least max_positions=64, got 63"),
        ({"learned_positions": -1}, "learned_positions must be 0 or at least max_positions=64, got -1"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"^ModelConfig: {message}$"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": torch.zeros(5, dtype=torch.int64)}, r"tokens must be \[batch, length\] int64, got \[5\] t"),
        ({"tokens": torch.zeros(2, 5)}, r"tokens must be \[batch, length\] int64, got \[2, 5\] torch.float32"),
        ({"tokens": torch.zeros(1, 65, dtype=torch.int64)}, "length must be at most max_positions=64, got 65"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, r"valid must be \[batch, key_length\]=\[2, 5\] bool, got"),
        ({"valid": torch.ones(2, 5)}, r"valid must be .* bool, got \[2, 5\] torch.float32"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, r"positions must be \[batch, length\]=\[2, 5\] int64, g"),
        ({"positions": torch.zeros(2, 5)}, r"positions must be .* int64, got \[2, 5\] torch.float32"),
        ({"key_length": 6}, "key_length must be length=5 without a cache, got 6"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(arguments, message):
    model = random_model(CONFIG, seed=0)
    arguments = {"tokens": torch.zeros(2, 5, dtype=torch.int64)} | arguments
    with pytest.raises(ValueError, match=f"^hidden_states: {message}"):
        model.hidden_states(arguments.pop("tokens"), **arguments)
