"""Configurations of every kind of model, small enough for float64."""

from dataclasses import replace

import torch
from tokenweave_models.localleap.config import ModelConfig

VOCAB = 80
CONFIG = ModelConfig(
    hidden=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    intermediate=72,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=False,
    shifted=False,
    mask_id=79,
    eos_id=77,
    max_positions=64,
)
CONFIGS = {
    "llada": CONFIG,
    "dream": replace(CONFIG, num_kv_heads=2, qkv_bias=True, shifted=True),
    "small": replace(CONFIG, num_kv_heads=1, head_dim=16, tie_embeddings=True, learned_positions=64),
}


def some_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
