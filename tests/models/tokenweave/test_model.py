"""The decoder against an independent float64 one, and its fused mode against its reference mode."""

import math

import pytest
import torch
from tokenweave_models.tokenweave.demo import why_not
from tokenweave_models.tokenweave.model import MODES, Decoder, FusedNorms, ModelConfig, ReferenceNorms, random_decoder

import tokenweave_ops

CONFIG = ModelConfig(hidden=96, intermediate=200, num_layers=3, num_heads=6, num_kv_heads=2)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device(request.param)
    if request.param == "cuda" and (reason := why_not(device, torch.bfloat16)):
        pytest.skip(reason)
    return device


def some_tokens(batch: int, seq: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(1)).to(device)


def plain_decoder(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The same function written a second time, from the formulas: one sequence, float64, complex rotation, loops."""
    config, w = model.config, {name: p.double() for name, p in model.named_parameters()}

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rotated(head):  # [seq, head_dim]: pairs (i, i + head_dim / 2) as complex numbers
        half = config.head_dim // 2
        position = torch.arange(head.shape[0], dtype=torch.float64)[:, None]
        angle = position * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    stream = w["embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        x = norm(stream, w[layer + "input_layernorm.weight"])
        q, k, v = (x @ w[f"{layer}self_attn.{part}_proj.weight"].T for part in "qkv")
        heads = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            columns = slice(head * config.head_dim, (head + 1) * config.head_dim)
            kv_columns = slice(shared * config.head_dim, (shared + 1) * config.head_dim)
            scores = rotated(q[:, columns]) @ rotated(k[:, kv_columns]).T / math.sqrt(config.head_dim)
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, kv_columns])
        stream = stream + torch.cat(heads, dim=-1) @ w[layer + "self_attn.o_proj.weight"].T
        x = norm(stream, w[layer + "post_attention_layernorm.weight"])
        gate, up = (x @ w[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        stream = stream + (gate / (1 + (-gate).exp()) * up) @ w[layer + "mlp.down_proj.weight"].T
    return norm(stream, w["norm.weight"]) @ w["lm_head.weight"].T


def test_reference_mode_is_the_published_decoder():
    model = random_decoder(CONFIG, seed=3).double()
    tokens = some_tokens(2, 19)
    logits = model(tokens, MODES["reference"])
    for row in range(2):
        torch.testing.assert_close(logits[row], plain_decoder(model, tokens[row]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 66])  # 66: rows of no whole number of 16-byte packs
def test_fused_mode_is_as_close_to_the_truth_as_eager(device, dtype, hidden):
    config = ModelConfig(hidden=hidden, intermediate=200, num_layers=3, num_heads=3, num_kv_heads=1)
    model = random_decoder(config, seed=0).to(DTYPES[dtype]).to(device)
    tokens = some_tokens(2, 33, device)
    logits = {name: model(tokens, norms).double() for name, norms in MODES.items()}
    truth = model.double()(tokens, MODES["reference"])  # the rounded weights, exactly

    ulp = torch.finfo(DTYPES[dtype]).eps * truth.abs().max().item()
    error = {name: (values - truth).abs().max().item() for name, values in logits.items()}
    assert error["fused"] <= 2 * error["reference"] + 4 * ulp
    assert truth.std() > 0.1  # logits that say something

    # Where the best byte leads the second by more than both errors, nothing may change it.
    best, second = truth.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 2 * max(error.values())
    assert clear.sum() > clear.numel() // 4
    for values in logits.values():
        assert (values.argmax(-1) == truth.argmax(-1))[clear].all()


def test_fused_mode_uses_our_ops_and_reference_does_not(monkeypatch):
    calls = []
    for name in ("rms_norm", "add_rms_norm_"):
        real = getattr(tokenweave_ops, name)
        monkeypatch.setattr(
            tokenweave_ops, name, lambda *args, _name=name, _real=real: (calls.append(_name), _real(*args))[1]
        )
    model, tokens = random_decoder(CONFIG, seed=0), some_tokens(1, 4)
    model(tokens, MODES["reference"])
    assert calls == []
    model(tokens, MODES["fused"])
    assert calls == ["rms_norm"] + ["add_rms_norm_"] * (2 * CONFIG.num_layers)


@pytest.mark.parametrize("norms", [ReferenceNorms(), FusedNorms()], ids=["reference", "fused"])
def test_norms_keep_their_promises(norms):
    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    weight = torch.rand(64) + 0.5
    total = x + residual
    expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    before = total.clone()
    torch.testing.assert_close(norms.first(total, weight, 1e-5), expected)
    assert torch.equal(total, before)
    y, h = norms.add(x, residual, weight, 1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h, total)


@pytest.mark.parametrize("mode", MODES)
def test_a_position_does_not_see_what_follows(mode):
    model, tokens = random_decoder(CONFIG, seed=0), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 256
    logits, other = model(tokens, MODES[mode]), model(changed, MODES[mode])
    torch.testing.assert_close(logits[:, :8], other[:, :8])
    assert not torch.allclose(logits[:, 8:], other[:, 8:])


def test_parameter_shapes():
    layer = {
        "input_layernorm.weight": (96,),
        "self_attn.q_proj.weight": (96, 96),
        "self_attn.k_proj.weight": (32, 96),
        "self_attn.v_proj.weight": (32, 96),
        "self_attn.o_proj.weight": (96, 96),
        "post_attention_layernorm.weight": (96,),
        "mlp.gate_proj.weight": (200, 96),
        "mlp.up_proj.weight": (200, 96),
        "mlp.down_proj.weight": (96, 200),
    }
    expected = {"embed_tokens.weight": (256, 96), "norm.weight": (96,), "lm_head.weight": (256, 96)}
    expected |= {f"layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    model = random_decoder(CONFIG, seed=0)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_follow_from_the_seed():
    first, again, other = (random_decoder(CONFIG, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 100, "num_heads": 16}, "hidden must be a multiple of 2 * num_heads.*hidden=100, num_heads=16"),
        ({"hidden": 48, "num_heads": 16}, "hidden must be a multiple of 2 * num_heads"),
        ({"num_heads": 16, "num_kv_heads": 3}, "multiple of num_kv_heads.*num_heads=16, num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("2 * num", r"2 \* num")):
        ModelConfig(**arguments)
