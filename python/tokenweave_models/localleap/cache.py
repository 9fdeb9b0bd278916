"""Keys and values of all positions of a batch, from the pass that last computed them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenweave_models.localleap.config import ModelConfig


class KVCache:
    """What attention reads instead of computing every position again.

    Without a causal mask a key changes whenever any token does, so what is cached is only nearly what a full pass would
    compute: Fast-dLLM's approximation (arXiv 2505.22618), which refreshes the cache by a full pass at each new block.
    All of its modes are one mechanism here: ``DiffusionModel.hidden_states`` writes the rows of the positions that it
    is given and then attends over all rows. Given all positions it is a full pass; given a block's, a step of the dual
    cache; given those from the block's start to the end, a step of the prefix cache.

    Keys are kept after RoPE. Fast-dLLM keeps them before and rotates every key in every step; a token's position never
    changes, so the bits are the same, and a step of 32 rows rotates 32 keys instead of all.

    Attributes:
        keys, values: [num_layers, batch, num_kv_heads, max_length, head_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ):
        """max_length: rows for each sequence, one per position, padding included.

        Raises:
            ValueError: batch or max_length is less than 1, or max_length more than the model's max_positions.
        """
        if batch < 1:
            raise ValueError(f"KVCache: batch must be at least 1, got {batch}")
        if not 1 <= max_length <= config.max_positions:
            raise ValueError(f"KVCache: max_length must be 1 to max_positions={config.max_positions}, got {max_length}")
        self.batch, self.max_length = batch, max_length
        shape = (config.num_layers, batch, config.num_kv_heads, max_length, config.head_dim)
        # Zeros, since a row that was never written would otherwise bring NaN even where it is masked: 0 * NaN.
        # Ordinary tensors, since those born in inference mode can never be written outside it.
        with torch.inference_mode(False):
            self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self._sequences = torch.arange(batch, device=device)[:, None]

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Replaces the rows at positions [batch or 1, length] int64 by keys and values [batch, length, num_kv_heads,
        head_dim]. The host does not wait, so this can be captured in a CUDA graph."""
        self.keys[layer].transpose(1, 2)[self._sequences, positions] = keys
        self.values[layer].transpose(1, 2)[self._sequences, positions] = values
