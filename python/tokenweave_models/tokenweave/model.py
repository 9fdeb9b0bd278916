"""A Llama-style decoder whose residual stream is shaped for the allreduce_rmsnorm ops.

Between two sublayers the state is a pair (x, residual): x is what the last sublayer produced and was not yet added.
The next norm does both, `residual <- x + residual; x <- rms_norm(residual)`, so that each pair of addition and norm
is one call. How it is computed is the `mode`; everything else is the same code in every mode:

    reference   torch's own addition and rms_norm, two calls
    fused       tokenweave_ops.add_rms_norm_, one in-place pass over both tensors

One process holds the whole model, or each of world_size ranks its share of the heads and of the MLP; then the norm
call also sums over the ranks (tensor_parallel.py). Parameters carry the names of Hugging Face's Llama without their
leading `model.`.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenweave_ops


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 256
    hidden: int = 1024
    intermediate: int = 2816
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "intermediate", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.num_heads):
            raise ValueError(
                f"ModelConfig: hidden must be a multiple of 2 * num_heads (rotary pairs), got hidden={self.hidden}, "
                f"num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads}, "
                f"num_kv_heads={self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def check_world_size(self, world_size: int) -> None:
        for name in ("num_heads", "num_kv_heads", "intermediate"):
            if getattr(self, name) % world_size:
                raise ValueError(
                    f"ModelConfig: {name} must be a multiple of world_size, got {name}={getattr(self, name)}, "
                    f"world_size={world_size}"
                )


class Norms(Protocol):
    """How a sublayer ends and the next one begins: its last projection, the sum over ranks, the addition and the norm.

    The calls may overwrite the tensors they are given; callers use what is returned.
    """

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """rms_norm(x); x itself stays as it is, since it becomes the residual."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T, this rank's part of the sum that the next `add` completes. The mode decides where it lies."""

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(h), h) with h = sum of x over the ranks + residual. Of h a rank may hold only the rows it owns."""


class ReferenceNorms:
    project = staticmethod(F.linear)

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return F.rms_norm(residual, weight.shape, weight, eps), residual


class FusedNorms:
    project = staticmethod(F.linear)

    def first(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return tokenweave_ops.rms_norm(x, weight, eps)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        tokenweave_ops.add_rms_norm_(x, residual, weight, eps)
        return x, residual


MODES: dict[str, Norms] = {"reference": ReferenceNorms(), "fused": FusedNorms()}


class Norm(nn.Module):
    """Holds a norm's weight; the mode does the work."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))


def rotary_tables(seq_len: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device):
    """(cos, sin), each [seq_len, head_dim]: computed in float64 and rounded once."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; element i is paired with element i + head_dim / 2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """A rank's share: whole heads, num_heads / world_size of them, with the keys and values that they read."""

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_heads // world_size * config.head_dim
        kv_size = config.num_kv_heads // world_size * config.head_dim
        self.q_proj = nn.Linear(config.hidden, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, norms: Norms) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, seq, head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return norms.project(mixed.transpose(1, 2).flatten(2), self.o_proj.weight)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A rank's share: intermediate / world_size of its inner features."""

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        inner = config.intermediate // world_size
        self.gate_proj = nn.Linear(config.hidden, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor, norms: Norms) -> Tensor:
        return norms.project(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        self.input_layernorm = Norm(config.hidden)
        self.self_attn = Attention(config, world_size)
        self.post_attention_layernorm = Norm(config.hidden)
        self.mlp = Mlp(config, world_size)


class Decoder(nn.Module):
    """The decoder, or one rank's share of it: embedding, norms and head are whole on every rank.

    Parameters never require grad: this is inference, and the in-place ops refuse tensors that do.
    """

    def __init__(self, config: ModelConfig, world_size: int = 1):
        super().__init__()
        config.check_world_size(world_size)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, world_size) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, norms: Norms) -> Tensor:
        """Logits [batch, seq, vocab_size] of token ids [batch, seq]."""
        eps = self.config.norm_eps
        residual = self.embed_tokens(tokens)
        cos, sin = rotary_tables(
            tokens.shape[1], self.config.head_dim, self.config.rope_theta, residual.dtype, residual.device
        )
        x = norms.first(residual, self.layers[0].input_layernorm.weight, eps)
        # Each sublayer's output is added by the norm that follows it: the next layer's first, or the model's last.
        next_norms = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            x = layer.self_attn(x, cos, sin, norms)
            x, residual = norms.add(x, residual, layer.post_attention_layernorm.weight, eps)
            x = layer.mlp(x, norms)
            x, residual = norms.add(x, residual, next_norm.weight, eps)
        return self.lm_head(x)


def random_decoder(config: ModelConfig, seed: int) -> Decoder:
    """A decoder in float32 with random weights at the scales of a fresh network before training.

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
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        else:
            std = 1.0 if name.startswith("embed_tokens") else 1 / sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= sqrt(2 * config.num_layers)
            if name.startswith("lm_head"):
                std /= 4
            parameter.normal_(0, std, generator=generator)
    return model
