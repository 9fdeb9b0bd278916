"""A bidirectional transformer that predicts masked tokens: LLaDA, Dream, and small ones of one's own.

Every position attends to every other: there is no causal mask and no time embedding (Nie et al., "Large Language
Diffusion Models", arXiv 2502.09992; Dream, arXiv 2508.15487). The head is apart from the body, so that a decoding step
computes logits for the few rows that it can commit and not for a vocabulary times a sequence.
"""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenweave_models.localleap.cache import KVCache
from tokenweave_models.localleap.config import ModelConfig
from tokenweave_ops import add_rms_norm_, rms_norm

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Norm(nn.Module):
    """RMSNorm, alone or behind the residual addition. A kernel's in inference, torch's with gradients or in float64."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self._has_kernel(x):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of x and residual, both of which may be overwritten."""
        if self._has_kernel(x, residual):
            add_rms_norm_(x, residual, self.weight, self.eps)
            return x, residual
        residual = residual + x
        return F.rms_norm(residual, self.weight.shape, self.weight, self.eps), residual

    def _has_kernel(self, *inputs: Tensor) -> bool:
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, self.weight))
        return self.weight.dtype in KERNEL_DTYPES and not needs_grad


# ------------------------------------------------------------------------------------------------------------ positions


def rotary_factors(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions [batch or 1, length], both [batch or 1, length, 1, head_dim] and float32, or float64 for
    that dtype. The first half of sin is negated, as ``rotate`` wants it.

    Made in every pass: a table of Dream's 131,072 positions would take 128 MiB, and a buffer would be rounded with the
    weights by ``model.to(torch.bfloat16)``.
    """
    precise = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=precise, device=positions.device) / config.head_dim
    angles = positions[:, :, None, None].to(precise) * config.rope_theta**-exponents
    sin = angles.sin()
    return angles.cos().repeat(1, 1, 1, 2), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, length, heads, head_dim]; element i is paired with i + head_dim / 2.
    Computed in the precision of cos and sin, rounded once."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- layers


class Layer(nn.Module):
    """The matrices of one block; q, k and v are one, and so are gate and up."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attn_norm = Norm(config.hidden, config.norm_eps)
        self.qkv_proj = nn.Linear(config.hidden, q_size + 2 * kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden, bias=False)
        self.mlp_norm = Norm(config.hidden, config.norm_eps)
        self.gate_up_proj = nn.Linear(config.hidden, 2 * config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of normed rows x [batch, length, hidden], queries and keys rotated; each [batch, length, heads, head_dim]."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        q, k = rotate(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=2)
        return q, k, v

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, length, hidden] from q [batch, length, num_heads, head_dim] and keys, values [batch, num_kv_heads,
        key_length, head_dim]; mask [batch, 1, 1, key_length], False where nobody looks.

        Since no mask tells queries apart, the heads of a group are more queries of their one key head. So every backend
        of torch's attention takes them (that for masks knows no groups), and none reads keys more than once.
        """
        length, group = q.shape[1], self.num_heads // self.num_kv_heads
        q = q.unflatten(2, (self.num_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.o_proj(mixed.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU: down(silu(gate(x)) * up(x))."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


# ---------------------------------------------------------------------------------------------------------------- model


class DiffusionModel(nn.Module):
    """The transformer. Gradients flow through all of it unless a cache is used.

    Numerics in bf16 and fp16, against the published code: a norm is rounded once, behind its weight, where theirs is
    rounded before it too; RoPE is computed in float32 and its result rounded, as LLaDA's, where Dream's rounds cosines,
    sines and every product; q, k and v, and gate and up, are one matrix product each, whose sums may run in another
    order. All else is rounded where theirs is. The norms are ``tokenweave_ops.rms_norm`` and ``add_rms_norm_`` if no
    gradient is asked for and the dtype is bf16, fp16 or fp32, and torch's own otherwise.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.learned_positions, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        key_length: int | None = None,
    ) -> Tensor:
        """What ``logits`` takes: [batch, length, hidden], after the final norm.

        With a cache, the keys and values of these tokens are written to the rows of their positions and attention reads
        the cache's first key_length rows; without one it reads those of these tokens. Shapes and the host's numbers
        alone decide what is launched and the host never waits, so a call can be captured in a CUDA graph.

        Args:
            tokens: [batch, length] int64, each 0 to vocab_size - 1.
            valid: [batch, key_length] bool (without a cache [batch, length]), False for padding on the left, which is
                never attended; what comes out in its own rows means nothing. None: there is no padding. At least
                one position of every sequence must be valid. All calls on one cache must be given the same.
            cache: for this batch, of the model's dtype and device.
            positions: [batch, length] int64, of each token in its padded sequence, from 0 to key_length - 1; two of a
                sequence may be alike if their tokens are. None: 0 to length - 1. What the model is told is the distance
                from the first valid position, so that a sequence is the same with and without padding.
            key_length: rows of the cache to attend over; None: all. The length of the padded sequences.

        Raises:
            ValueError: an argument is of another shape or dtype, or the sequence is longer than the model's
                max_positions or the cache. (The numbers in tokens and positions are not looked at.)
            RuntimeError: a cache is given while grad mode is on.
        """
        key_length = self._check(tokens, valid, cache, positions, key_length)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        places = positions if valid is None else positions - (~valid).sum(dim=1, keepdim=True)
        residual = self.embed_tokens(tokens)
        if self.config.learned_positions:
            residual = residual + self.embed_positions(places.clamp(min=0))
        cos, sin = rotary_factors(self.config, places, residual.dtype)
        mask = None if valid is None else valid[:, None, None, :]
        x = self.layers[0].attn_norm(residual)
        for index, layer in enumerate(self.layers):
            q, k, v = layer.queries_keys_values(x, cos, sin)
            if cache is None:
                keys, values = k.transpose(1, 2), v.transpose(1, 2)
            else:
                cache.write(index, positions, k, v)
                keys, values = cache.keys[index, :, :, :key_length], cache.values[index, :, :, :key_length]
            x, residual = layer.mlp_norm.add(layer.attend(q, keys, values, mask), residual)
            next_norm = self.layers[index + 1].attn_norm if index + 1 < len(self.layers) else self.norm
            x, residual = next_norm.add(layer.mlp(x), residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocab_size] from rows [..., hidden] of ``hidden_states``. If config.shifted, those of the row at
        position p - 1 predict the token at position p."""
        return F.linear(hidden, (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The logits of all rows, [batch, length, vocab_size], for training. Arguments as in ``hidden_states``."""
        return self.logits(self.hidden_states(tokens, valid=valid))

    def _check(self, tokens, valid, cache, positions, key_length) -> int:
        """key_length, once all fits."""

        def wrong(name: str, wanted: str, got: object) -> ValueError:
            if isinstance(got, Tensor):
                got = f"{list(got.shape)} {got.dtype}"
            return ValueError(f"hidden_states: {name} must be {wanted}, got {got}")

        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise wrong("tokens", "[batch, length] int64", tokens)
        batch, length = tokens.shape
        if cache is None:
            if key_length not in (None, length):
                raise wrong("key_length", f"length={length} without a cache", key_length)
            key_length = length
        else:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "hidden_states: a cache has no gradients; call it under torch.no_grad() or torch.inference_mode()"
                )
            wanted = [self.config.num_layers, batch, self.config.num_kv_heads], self.norm.weight.dtype
            found = list(cache.keys.shape[:3]), cache.keys.dtype
            if found != wanted:
                raise wrong(
                    "cache", *("[{}, {}, {}, ...] {}".format(*sizes, dtype) for sizes, dtype in (wanted, found))
                )
            key_length = cache.max_length if key_length is None else key_length
            if not max(length, 1) <= key_length <= cache.max_length:
                raise wrong("key_length", f"length={length} to the cache's max_length={cache.max_length}", key_length)
        if key_length > self.config.max_positions:
            raise wrong("length", f"at most max_positions={self.config.max_positions}", key_length)
        if valid is not None and (valid.shape != (batch, key_length) or valid.dtype != torch.bool):
            raise wrong("valid", f"[batch, key_length]=[{batch}, {key_length}] bool", valid)
        if positions is not None and (positions.shape != tokens.shape or positions.dtype != torch.int64):
            raise wrong("positions", f"[batch, length]=[{batch}, {length}] int64", positions)
        return key_length


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    logit_std: float = 1.0,
) -> DiffusionModel:
    """A model with random weights at the scales of a fresh network: to train, to test with, or to measure speed.

    Every matrix keeps its input's variance; those that write into the residual are smaller by sqrt(2 * num_layers), so
    that the stream does not grow with depth. Norm weights differ from one and biases from zero, so that code which
    forgot them would show. Devices of another type make other numbers.

    Args:
        logit_std: standard deviation of a row's logits. With 1 no token is preferred strongly; with 10 a random model
            is about as sure of itself as a trained one.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = DiffusionModel(config).to(dtype)
    model.to_empty(device=device)
    head = "embed_tokens" if config.tie_embeddings else "lm_head"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = 0.0, 1 / sqrt(parameter.shape[-1])
            if parameter.ndim == 1:
                mean, std = 0.0 if name.endswith("bias") else 1.0, 0.1
            elif name.startswith(head):
                std *= logit_std
            elif name.startswith("embed_"):
                std = 1.0
            elif "o_proj" in name or "down_proj" in name:
                std /= sqrt(2 * config.num_layers)
            parameter.normal_(mean, std, generator=generator)
    return model
