"""The decoder in one process against an independent float64 one, and the fused addition and norm against eager."""

import math

import pytest
import torch
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig, RopeScaling
from tokenweave_models.tokenweave.demo import MODES, why_not
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.model import (
    Decoder,
    TorchCompute,
    random_decoder,
    rotary_frequencies,
    vocabulary_range,
)
from tokenweave_models.tokenweave.passes import prefill_executor, prefill_logits
from tokenweave_models.tokenweave.reduction import EagerAddition, FusedAddition
from tokenweave_models.tokenweave.tensor_parallel import parts_of

import tokenweave_ops

SIZES = {"hidden": 96, "intermediate": 200, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
CONFIG = ModelConfig(**SIZES)
CONFIGS = {
    "dense": CONFIG,
    "biased, tied, wide heads": ModelConfig(**SIZES, qkv_bias=True, tie_embeddings=True, head_dim=24, norm_eps=0.1),
    "experts": ModelConfig(**SIZES, num_experts=4, experts_per_token=2),
    "one expert a token": ModelConfig(**SIZES, num_experts=3, experts_per_token=1),
}
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


@torch.inference_mode()
def logits_of(model: Decoder, tokens: torch.Tensor, reduction=EagerAddition) -> torch.Tensor:
    weight = model.norm.weight
    rows = reduction(tokens.numel(), model.config.hidden, weight.dtype, weight.device)
    return prefill_logits(prefill_executor(model, tokens, rows), tokens)


def plain_decoder(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The same function written a second time, from the formulas: one sequence, float64, complex rotation, loops."""
    config, parameters = model.config, dict(model.named_parameters())
    w = {
        part.source.removeprefix("model."): part.destination(parameters[part.parameter]).double()
        for part in parts_of(config, 0, 1)
    }

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rotated(head):  # [seq, head_dim]: pairs (i, i + head_dim / 2) as complex numbers
        half = config.head_dim // 2
        position = torch.arange(head.shape[0], dtype=torch.float64)[:, None]
        angle = position * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def mlp(x, gate, up, down):
        inner = x @ gate.T
        return (inner / (1 + (-inner).exp()) * (x @ up.T)) @ down.T

    stream = w["embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        x = norm(stream, w[layer + "input_layernorm.weight"])
        q, k, v = (
            x @ w[f"{layer}self_attn.{part}_proj.weight"].T + w.get(f"{layer}self_attn.{part}_proj.bias", 0)
            for part in "qkv"
        )
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
        if config.num_experts == 0:
            stream = stream + mlp(x, *(w[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
            continue
        moe, rows = f"{layer}block_sparse_moe.", []
        for token in x:
            scores = (w[f"{moe}gate.weight"] @ token).exp()
            best = scores.argsort(descending=True)[: config.experts_per_token].tolist()
            shares = scores[best] / scores[best].sum()
            experts = ([w[f"{moe}experts.{expert}.w{i}.weight"] for i in (1, 3, 2)] for expert in best)
            rows.append(sum(s * mlp(token, *expert) for s, expert in zip(shares, experts, strict=True)))
        stream = stream + torch.stack(rows)
    return norm(stream, w["norm.weight"]) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_published_decoder(name):
    model = random_decoder(CONFIGS[name], seed=3).double()
    tokens = some_tokens(2, 19)
    logits = logits_of(model, tokens)
    for row in range(2):
        torch.testing.assert_close(logits[row], plain_decoder(model, tokens[row]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 66])  # 66: rows of no whole number of 16-byte packs
def test_fused_mode_is_as_close_to_the_truth_as_eager(device, dtype, hidden):
    config = ModelConfig(hidden=hidden, intermediate=200, num_layers=3, num_heads=3, num_kv_heads=1)
    model = random_decoder(config, seed=0).to(DTYPES[dtype]).to(device)
    tokens = some_tokens(2, 33, device)
    logits = {name: logits_of(model, tokens, reduction).double() for name, reduction in MODES.items()}
    truth = logits_of(model.double(), tokens)  # the rounded weights, exactly

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


def test_fused_mode_is_one_op_a_sublayer_and_reference_has_none(monkeypatch):
    calls = []
    real = tokenweave_ops.add_rms_norm_
    monkeypatch.setattr(tokenweave_ops, "add_rms_norm_", lambda *args: (calls.append(args[0].data_ptr()), real(*args)))
    model, tokens = random_decoder(CONFIG, seed=0), some_tokens(1, 4)
    logits_of(model, tokens)
    assert calls == []
    logits_of(model, tokens, FusedAddition)
    assert len(calls) == 2 * CONFIG.num_layers + 1
    assert len(set(calls)) == 1  # in place, always in the same memory


@pytest.mark.parametrize("mode", MODES)
def test_reductions_keep_their_promise(mode):
    reduction = MODES[mode](8, 64, torch.float32)
    x, residual = reduction.rows(5), torch.randn(5, 64)
    x.normal_()
    weight = torch.rand(64) + 0.5
    total = x + residual
    expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    reduction.reduce(x, residual, weight, 1e-5, channel=0, max_ctas=0, tag=0)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(residual, total)
    assert reduction.rows(3).data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match="rows: num_tokens must be at most 8, got 9"):
        reduction.rows(9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_position_does_not_see_what_follows(mode, name):
    model, tokens = random_decoder(CONFIGS[name], seed=0), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 256
    logits, other = (logits_of(model, t, MODES[mode]) for t in (tokens, changed))
    torch.testing.assert_close(logits[:, :8], other[:, :8])
    assert not torch.allclose(logits[:, 8:], other[:, 8:])


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_mixed_batches_give_what_whole_prompts_give(name):
    """Two requests: whole, then again in chunks of uneven size, beside each other and beside single tokens."""
    config = CONFIGS[name]
    model = random_decoder(config, seed=2).double()
    prompts = [some_tokens(1, 13)[0], some_tokens(1, 9)[0].flip(0)]
    expected = [logits_of(model, prompt[None])[0] for prompt in prompts]
    cache = KVCache(config, 4, 16, dtype=torch.float64)
    with torch.inference_mode():
        executor = Executor(model, cache, EagerAddition(16, config.hidden, torch.float64))
        done, found = [0, 0], [[], []]
        for lens in ((5, 0), (1, 4), (6, 1), (1, 4)):
            requests = [request for request in (0, 1) if lens[request]]
            chunks = [prompts[request][done[request] : done[request] + lens[request]] for request in requests]
            for request in requests:
                done[request] += lens[request]
            kv_lens, slots = [done[request] for request in requests], [3 - 2 * request for request in requests]
            batch = Batch.of(torch.cat(chunks), [len(chunk) for chunk in chunks], kv_lens, slots)
            logits = executor.logits(executor.forward(batch)).split(batch.query_lens)
            for request, part in zip(requests, logits, strict=True):
                found[request].append(part)
    for request in (0, 1):
        torch.testing.assert_close(torch.cat(found[request]), expected[request], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("query_len, kv_len", [(1, 300), (2, 300), (128, 300), (129, 300), (299, 300), (300, 300)])
def test_attention_sees_what_came_before(query_len, kv_len):
    """More queries than one block of them, blocks that are full and not."""
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(heads, n, 8, generator=generator, dtype=torch.float64)
                       for heads, n in ((4, query_len), (2, kv_len), (2, kv_len)))  # fmt: skip
    scores = torch.einsum("hqd,hkd->hqk", q, keys.repeat_interleave(2, 0)) / math.sqrt(8)
    hidden = torch.arange(kv_len) > torch.arange(kv_len - query_len, kv_len)[:, None]
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values.repeat_interleave(2, 0)
    found = TorchCompute().attention(q, keys, values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_many_requests_of_one_token_are_what_each_is_alone():
    """Decoded together, beside a prompt, behind one, and one by one: the same rows, and the same in the cache."""
    model, lens = random_decoder(CONFIG, seed=2).double(), (3, 9, 1, 6)
    prompts = [some_tokens(1, n)[0] for n in lens]

    def run(batches):
        cache = KVCache(CONFIG, 6, 16, dtype=torch.float64)
        executor = Executor(model, cache, EagerAddition(64, CONFIG.hidden, torch.float64))
        executor.forward(Batch.of(torch.cat(prompts), lens, lens, (4, 0, 5, 2)))
        rows = {}
        for requests in batches:
            tokens = [torch.tensor([7 + r]) if r < 4 else torch.arange(5) for r in requests]
            queries = [len(t) for t in tokens]
            kv_lens = [lens[r] + 1 if r < 4 else 5 for r in requests]
            batch = Batch.of(torch.cat(tokens), queries, kv_lens, [(4, 0, 5, 2, 1)[r] for r in requests])
            found = executor.logits(executor.forward(batch)).split(queries)
            rows |= {request: part.clone() for request, part in zip(requests, found, strict=True)}
        return rows, cache

    expected, expected_cache = run([[r] for r in range(5)])
    for batches in ([[0, 1, 2, 3], [4]], [[2, 0, 3, 1, 4]], [[1, 4, 0, 2, 3]]):
        rows, cache = run(batches)
        for request in range(5):
            torch.testing.assert_close(rows[request], expected[request], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cache.keys, expected_cache.keys, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cache.values, expected_cache.values, rtol=1e-10, atol=1e-10)
    calls = []
    model_attention = TorchCompute.attention_of_singles

    class Counting(TorchCompute):
        def attention_of_singles(self, q, *rest):
            calls.append(len(q))
            return model_attention(self, q, *rest)

        def attention(self, q, *rest):
            calls.append(-q.shape[1])
            return super().attention(q, *rest)

    cache = KVCache(CONFIG, 6, 16, dtype=torch.float64)
    executor = Executor(model, cache, EagerAddition(64, CONFIG.hidden, torch.float64), compute=Counting())
    executor.forward(Batch.of(torch.arange(8), (1, 1, 1, 5), (4, 9, 1, 5), (4, 0, 5, 1)))
    assert calls == [3, -5] * CONFIG.num_layers


def test_stretched_rotary_frequencies():
    """Kept where a wave fits the original context often, divided where it hardly fits, blended between."""
    plain = rotary_frequencies(64, 500_000.0, None)
    scaled = rotary_frequencies(64, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    wavelengths = 2 * math.pi / plain
    assert torch.equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    torch.testing.assert_close(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_experts_are_weighted_in_float32():
    """The shares of many experts, and their sum, are rounded once."""
    config = ModelConfig(
        hidden=24, intermediate=8, num_layers=1, num_heads=2, num_kv_heads=2, num_experts=8, experts_per_token=8
    )
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 8, generator=generator).bfloat16()
    by_expert = torch.randn(8, 50, 24, generator=generator).bfloat16()  # what every expert makes of every token

    class Given:
        def linear(self, x, weight):
            return scores

        def grouped_linear(self, x, weights, ends):
            assert ends.tolist() == [50 * (expert + 1) for expert in range(8)]
            if weights.shape[1] == 2 * config.intermediate:
                self.tokens = x[:, 0].long()
                return x[:, :16]
            return by_expert[torch.arange(8).repeat_interleave(50), self.tokens]

    x = torch.arange(50).bfloat16()[:, None].expand(50, 24)
    out = random_decoder(config, 0).layers[0].mlp(x, Given(), torch.empty(50, 24, dtype=torch.bfloat16))
    shares = scores.double().softmax(-1)
    expected = torch.einsum("te,eth->th", shares, by_expert.double())
    assert (out.double() - expected).abs().max() <= 0.51 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_ranks_share_the_vocabulary():
    assert [vocabulary_range(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [vocabulary_range(5, 4, rank) for rank in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_batches_and_caches_that_do_not_fit_are_refused():
    tokens = some_tokens(1, 6)[0]
    with pytest.raises(ValueError, match="query_lens sum up to the tokens, got 2, 2 and 2 entries and 5 of 6 tokens"):
        Batch.of(tokens, [2, 3], [2, 3], [0, 1])
    with pytest.raises(ValueError, match=r"Batch: slots must differ, got \(1, 1\)"):
        Batch.of(tokens, [2, 4], [2, 4], [1, 1])
    with pytest.raises(ValueError, match=r"Batch: tokens must be \[num_tokens\] int64, got \[6\] torch.int32"):
        Batch.of(tokens.int(), [6], [6], [0])
    for lens in ([0, 6], [3, 6]), ([6], [5]), ([6], [0]):
        with pytest.raises(ValueError, match="Batch: requests must have 1 <= query_len <= kv_len, got query_len="):
            Batch.of(tokens, *lens, range(len(lens[0])))
    cache = KVCache(CONFIG, 2, 8, dtype=torch.float32)
    executor = Executor(random_decoder(CONFIG, 0), cache, FusedAddition(8, CONFIG.hidden, torch.float32))
    for batch, message in (
        (Batch.of(tokens, [6], [6], [2]), "KVCache: slot must be 0 to 1, got 2"),
        (Batch.of(tokens, [6], [9], [0]), "KVCache: a request must fit 8 tokens, got 9"),
        (Batch.of(tokens + 251, [6], [6], [0]), "Decoder: tokens must be 0 to 255, got "),
        (Batch.of(-1 - tokens, [6], [6], [0]), "Decoder: tokens must be 0 to 255, got "),
    ):
        with pytest.raises(ValueError, match=message):
            executor.forward(batch)
    assert not cache.keys.any()  # nothing was written


def test_parameter_shapes():
    layer = {
        "input_layernorm.weight": (96,),
        "self_attn.qkv_proj.weight": (96 + 32 + 32, 96),
        "self_attn.o_proj.weight": (96, 96),
        "post_attention_layernorm.weight": (96,),
        "mlp.gate_up_proj.weight": (400, 96),
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
        ({"head_dim": 7}, "head_dim must be even.*got 7"),
        ({"num_experts": 4}, "experts_per_token must be 1 to num_experts=4, got 0"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token must be 1 to num_experts=4, got 5"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("2 * num", r"2 \* num")):
        ModelConfig(**arguments)
