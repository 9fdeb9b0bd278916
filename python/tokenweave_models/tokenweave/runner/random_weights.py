"""Random weights of a rank's share, without any rank making the whole model: for benchmarks at real sizes.

Every published tensor is made in pieces along the dimension that ranks divide, each from a seed of its own, so that
the model is the same whatever the number of ranks, and a rank makes little more than its share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.model import Decoder
from tokenweave_models.tokenweave.tensor_parallel import Part, build_decoder

NUM_PIECES = 16  # of a tensor; where world_size divides it, ranks make no row twice


def scale_of(config: ModelConfig, source: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a fresh network before training, as in random_decoder()."""
    if len(shape) == 1:
        return (0.0 if source.endswith("bias") else 1.0), 0.1
    if "embed_tokens" in source:
        return 0.0, 1.0
    std = 1 / sqrt(shape[1])
    if any(name in source for name in ("o_proj", "down_proj", ".w2.")):
        std /= sqrt(2 * config.num_layers)
    return 0.0, std / 4 if "lm_head" in source else std


def random_part(config: ModelConfig, seed: int, part: Part, dtype: torch.dtype, device: torch.device) -> Tensor:
    """source[begin:end] along the part's dimension, of a source that seed and name determine."""
    mean, std = scale_of(config, part.source, part.source_shape)
    size = part.source_shape[part.dim]
    pieces = []
    for index in range(NUM_PIECES):
        begin, end = size * index // NUM_PIECES, size * (index + 1) // NUM_PIECES
        low, high = max(begin, part.begin), min(end, part.end)
        if low >= high:
            continue
        key = hashlib.blake2b(f"{seed} {part.source} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(key, "big") >> 1)
        shape = list(part.source_shape)
        shape[part.dim] = end - begin
        piece = torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)
        pieces.append(piece.narrow(part.dim, low - begin, high - low))
    return torch.cat(pieces, dim=part.dim)


def random_share(
    config: ModelConfig,
    rank: int,
    world_size: int,
    seed: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_part: Callable[[Part], None] = lambda part: None,
) -> Decoder:
    """A rank's share of the random decoder of this seed. Devices of another type make other numbers."""

    def read(part: Part) -> Tensor:
        return random_part(config, seed, part, dtype, device)

    return build_decoder(config, rank, world_size, read, dtype, device, on_part)
