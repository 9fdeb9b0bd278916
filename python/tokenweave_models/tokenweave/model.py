"""A decoder of the Llama family whose sublayers end where ranks sum up.

Between two sublayers the state of a token is a pair (x, residual): x is what the last sublayer produced, on each rank a
partial sum, and was not yet added. What follows, `residual <- sum of x over ranks + residual; x <- rms_norm(residual)`,
is the reduction (reduction.py); when it runs is the executor's (executor.py). Here are the sublayers between them: each
reads normed rows and writes its partial sums to the rows it is told to, which may be those it read.

A rank's share: whole heads, some of the MLP's inner features (of every expert), some rows of the vocabulary.
"""

from itertools import islice
from math import pi, sqrt
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig, RopeScaling

# On a CPU: 1024 queries on 2048 keys in 44 ms instead of 54 (bf16, 8 heads, one thread of a Xeon model 207,
# 2026-11-23); 64 to 256 are alike.
QUERY_BLOCK = 128


class Compute(Protocol):
    """The operations whose bits may depend on how many rows they are given. Tests put others here."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x @ weight.T (+ bias) for x [num_tokens, in] and weight [features, in], written to out if given."""

    def grouped_linear(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """[num_rows, features]: rows ends[g - 1] to ends[g] of x [num_rows, in] @ weights[g].T, for weights [groups,
        features, in] and ends [groups], int32, the last of which is num_rows."""

    def attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention of one request's newest tokens: q [heads, query_len, head_dim], keys and values [kv_heads,
        kv_len, head_dim]; token i of q attends to the first kv_len - query_len + i + 1 keys."""

    def attention_of_singles(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Attention of one token of each of many requests: q [num_requests, heads, head_dim], keys and values
        [num_requests, kv_heads, kv_len, head_dim]; request i attends to its first positions[i] + 1 keys."""


class TorchCompute:
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)

    def grouped_linear(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
        begins = [0, *ends.tolist()]
        groups = zip(begins[:-1], begins[1:], weights, strict=True)
        return torch.cat([x[begin:end] @ weight.T for begin, end, weight in groups])

    def attention(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query_len, kv_len = q.shape[1], keys.shape[1]
        if query_len in (1, kv_len):
            return self._attention(q, keys, values, is_causal=query_len > 1)
        if q.is_cuda:  # in a form for which no mask is made
            from torch.nn.attention.bias import causal_lower_right  # here, since it imports torch's whole compiler

            return self._attention(q, keys, values, attn_mask=causal_lower_right(query_len, kv_len))
        # Blocks of queries: under a mask a CPU computes all that it hides, here only that within a block.
        out, cached = torch.empty_like(q), kv_len - query_len
        for begin in range(0, query_len, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, query_len)
            mask = torch.ones(end - begin, cached + end, dtype=torch.bool).tril(cached + begin)
            seen = keys[:, : cached + end], values[:, : cached + end]
            out[:, begin:end] = self._attention(q[:, begin:end], *seen, attn_mask=mask)
        return out

    def attention_of_singles(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
        one = q.unsqueeze(2)  # a sequence of one query
        return F.scaled_dot_product_attention(one, keys, values, attn_mask=mask[:, None, None], enable_gqa=True)[
            :, :, 0
        ]

    @staticmethod
    def _attention(q: Tensor, keys: Tensor, values: Tensor, **masking) -> Tensor:
        return F.scaled_dot_product_attention(q[None], keys[None], values[None], enable_gqa=True, **masking)[0]


class Norm(nn.Module):
    """Holds a norm's weight; the reduction before it does the work."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))


# ------------------------------------------------------------------------------------------------------------ positions


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2], float64: the angle by which each pair of elements turns from one position to the next."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_len * frequencies / (2 * pi)
    high, low = scaling.high_freq_factor, scaling.low_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_tables(config: ModelConfig, max_len: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [max_len, head_dim]: computed in float64 and rounded once."""
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; element i is paired with element i + head_dim / 2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


# ------------------------------------------------------------------------------------------------------------ sublayers


class Attention(nn.Module):
    """A rank's share: num_heads / world_size whole heads, with the keys and values that they read.

    q, k and v are one matrix, in this order.
    """

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads // world_size, config.num_kv_heads // world_size
        q_size = self.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(
            config.hidden, q_size + 2 * self.num_kv_heads * config.head_dim, bias=config.qkv_bias
        )  # fmt: skip
        self.o_proj = nn.Linear(q_size, config.hidden, bias=False)

    def forward(
        self, x: Tensor, batch: Batch, layer: int, cache: KVCache, rotary: tuple[Tensor, Tensor], compute: Compute,
        out: Tensor,
    ) -> None:  # fmt: skip
        """Writes the partial sums of x [num_tokens, hidden] to out, which may be x, and the cache's new entries."""
        qkv = compute.linear(x, self.qkv_proj.weight, self.qkv_proj.bias).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        cos, sin = (table[batch.positions].unsqueeze(1) for table in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = torch.empty_like(q)
        begin = batch.num_single if batch.num_single > 1 else 0  # one alone reads its cache where it is
        if begin > 0:
            slots, positions = batch.token_slots[:begin], batch.positions[:begin]
            keys, values = cache.append_single(
                layer, slots, positions, k[:begin], v[:begin], max(batch.kv_lens[:begin])
            )  # fmt: skip
            mixed[:begin] = compute.attention_of_singles(q[:begin], keys, values, positions)
        requests = zip(batch.query_lens, batch.kv_lens, batch.slots, strict=True)
        for query_len, kv_len, slot in islice(requests, begin, None):  # so far one row a request
            rows = slice(begin, begin + query_len)
            keys, values = cache.append(layer, slot, kv_len - query_len, k[rows], v[rows])
            mixed[rows] = compute.attention(q[rows].transpose(0, 1), keys, values).transpose(0, 1)
            begin += query_len
        compute.linear(mixed.flatten(1), self.o_proj.weight, out=out)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up as one matrix. A rank's share: some inner features."""

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        inner = config.intermediate // world_size
        self.gate_up_proj = nn.Linear(config.hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor, compute: Compute, out: Tensor | None = None) -> Tensor:
        """The partial sums of x [num_tokens, hidden], written to out if given, which may be x."""
        gate, up = compute.linear(x, self.gate_up_proj.weight).chunk(2, dim=-1)
        return compute.linear(F.silu(gate) * up, self.down_proj.weight, out=out)


class MixtureOfExperts(nn.Module):
    """The experts_per_token best experts of each token, weighted by the softmax over these. A rank's share: every
    expert's inner features in part; the gate is whole, so all ranks choose alike. Sizes depend on the number of tokens
    only and the host never waits, so that this can be captured in a CUDA graph.
    """

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        inner = config.intermediate // world_size
        self.experts_per_token = config.experts_per_token
        self.gate = nn.Linear(config.hidden, config.num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden, inner))

    def forward(self, x: Tensor, compute: Compute, out: Tensor) -> Tensor:
        """The partial sums of x [num_tokens, hidden], written to out, which may be x."""
        precise = torch.promote_types(x.dtype, torch.float32)
        scores = compute.linear(x, self.gate.weight).softmax(dim=-1, dtype=precise)
        shares, chosen = scores.topk(self.experts_per_token, dim=-1)  # each [num_tokens, experts_per_token]
        shares = shares / shares.sum(dim=-1, keepdim=True)
        # Tokens sorted by expert, and back: each token adds up its experts in the same order, whoever is beside it.
        order = chosen.flatten().argsort()
        experts = torch.arange(self.gate.out_features, device=x.device)
        ends = (chosen.unsqueeze(-1) <= experts).sum(dim=(0, 1), dtype=torch.int32)
        gate, up = compute.grouped_linear(x[order // self.experts_per_token], self.gate_up_proj, ends).chunk(2, dim=-1)
        results = compute.grouped_linear(F.silu(gate) * up, self.down_proj, ends)
        results = torch.empty_like(results).index_copy_(0, order, results).unflatten(0, (-1, self.experts_per_token))
        return out.copy_((results.to(precise) * shares.unsqueeze(-1)).sum(dim=1))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        self.input_layernorm = Norm(config.hidden)
        self.self_attn = Attention(config, world_size)
        self.post_attention_layernorm = Norm(config.hidden)
        self.mlp = (MixtureOfExperts if config.num_experts else Mlp)(config, world_size)


# -------------------------------------------------------------------------------------------------------------- decoder


def vocabulary_range(vocab_size: int, world_size: int, rank: int) -> tuple[int, int]:
    """(begin, end) of a rank's rows of embedding and head: equal numbers, fewer or none on the last ranks."""
    each = -(-vocab_size // world_size)
    return min(rank * each, vocab_size), min((rank + 1) * each, vocab_size)


class Decoder(nn.Module):
    """The decoder, or one rank's share of it. Parameters never require grad: this is inference, and the in-place ops
    refuse tensors that do.
    """

    def __init__(self, config: ModelConfig, rank: int = 0, world_size: int = 1):
        super().__init__()
        config.check_world_size(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"Decoder: rank must be 0 to {world_size - 1}, got {rank}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.vocab_begin, vocab_end = vocabulary_range(config.vocab_size, world_size, rank)
        self.embed_tokens = nn.Embedding(vocab_end - self.vocab_begin, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, world_size) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden, vocab_end - self.vocab_begin, bias=False)
        self.requires_grad_(False)

    def check_tokens(self, tokens: Tensor) -> None:
        """tokens on a CPU: embed() would take others for another rank's, and give zeros."""
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(
                f"Decoder: tokens must be 0 to {self.config.vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )

    def embed(self, tokens: Tensor, out: Tensor) -> None:
        """The embeddings of tokens [num_tokens] that this rank holds, and zeros, written to out."""
        num_own = self.embed_tokens.num_embeddings
        if num_own == 0:
            out.zero_()
            return
        own = tokens - self.vocab_begin
        rows = F.embedding(own.clamp(0, num_own - 1), self.embed_tokens.weight)
        torch.where(((own >= 0) & (own < num_own)).unsqueeze(1), rows, rows.new_zeros(()), out=out)

    def logits(self, x: Tensor, compute: Compute) -> Tensor:
        """This rank's columns of the logits of x [num_tokens, hidden]."""
        head = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return compute.linear(x, head.weight)


def random_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A whole decoder in float32 with random weights at the scales of a fresh network before training.

    Every matrix keeps its input's variance; those that write into the residual are smaller by sqrt(2 * num_layers), so
    that the stream does not grow with depth; the head is small, so that no byte is preferred strongly. Norm weights
    differ from one, so that a kernel which forgot them would show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            mean = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
        else:
            std = 1.0 if name.startswith("embed_tokens") else 1 / sqrt(parameter.shape[-1])
            if "o_proj" in name or "down_proj" in name:
                std /= sqrt(2 * config.num_layers)
            if name.startswith("lm_head"):
                std /= 4
            parameter.normal_(0, std, generator=generator)
    return model
