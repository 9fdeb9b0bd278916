"""What one pass works on: the tokens of some requests, and the cache of the keys and values that came before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tokenweave_ops
from tokenweave_models.tokenweave.config import ModelConfig


@dataclass(frozen=True)
class Batch:
    """The next tokens of some requests, concatenated: prompts, chunks of prompts and single decoded tokens.

    Attributes:
        tokens: [num_tokens], int64.
        positions: [num_tokens], int64, of each token in its request.
        token_slots: [num_tokens], int64, the slot of its request.
        query_lens: tokens of each request in this batch, at least 1.
        kv_lens: tokens each request attends to, these included.
        slots: each request's place in the cache.
    """

    tokens: Tensor
    positions: Tensor
    token_slots: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Tensor, query_lens: Sequence[int], kv_lens: Sequence[int], slots: Sequence[int]) -> Batch:
        if not len(query_lens) == len(kv_lens) == len(slots) or sum(query_lens) != tokens.shape[0]:
            raise ValueError(
                f"Batch: query_lens, kv_lens and slots must have one entry per request and query_lens sum up to the "
                f"tokens, got {len(query_lens)}, {len(kv_lens)} and {len(slots)} entries and "
                f"{sum(query_lens)} of {tokens.shape[0]} tokens"
            )
        if tokens.ndim != 1 or tokens.dtype != torch.int64:
            raise ValueError(f"Batch: tokens must be [num_tokens] int64, got {list(tokens.shape)} {tokens.dtype}")
        for request, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
            if not 1 <= query_len <= kv_len:
                raise ValueError(
                    f"Batch: requests must have 1 <= query_len <= kv_len, got query_len={query_len}, kv_len={kv_len} "
                    f"for request {request}"
                )
        if len(set(slots)) != len(slots):
            raise ValueError(f"Batch: slots must differ, got {tuple(slots)}")
        ranges = [torch.arange(kv - query, kv) for query, kv in zip(query_lens, kv_lens, strict=True)]
        positions = torch.cat(ranges).to(tokens.device) if ranges else tokens.new_empty(0)
        token_slots = torch.tensor(slots).repeat_interleave(torch.tensor(query_lens)).to(tokens.device)
        return cls(tokens, positions, token_slots, tuple(query_lens), tuple(kv_lens), tuple(slots))

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_single(self) -> int:
        """How many requests at the beginning have one token: those that decode, where they come first."""
        return next((i for i, query_len in enumerate(self.query_lens) if query_len > 1), len(self.query_lens))

    @property
    def last_rows(self) -> list[int]:
        """The row of each request's last token, whose logits say how the request goes on."""
        ends, end = [], 0
        for query_len in self.query_lens:
            end += query_len
            ends.append(end - 1)
        return ends

    def split(self, rows: int) -> tuple[Batch, Batch]:
        """The first ``rows`` tokens and the rest; a request that lies across the cut is in both."""
        halves = tokenweave_ops.split_batch(self.query_lens, self.kv_lens, rows)
        first, second = (
            Batch(
                self.tokens[half.rows],
                self.positions[half.rows],
                self.token_slots[half.rows],
                half.query_lens,
                half.kv_lens,
                tuple(self.slots[request] for request in half.requests),
            )
            for half in halves
        )
        return first, second


class KVCache:
    """Keys and values by layer and slot, contiguous per request: a rank's share of the heads."""

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_len: int,
        *,
        world_size: int = 1,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ):
        shape = (config.num_layers, num_slots, config.num_kv_heads // world_size, max_len, config.head_dim)
        with torch.inference_mode(False):  # so that passes may run in inference mode and out of it
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_slots, self.max_len = num_slots, max_len

    def check(self, batch: Batch) -> None:
        """Before anything is written."""
        for slot, kv_len in zip(batch.slots, batch.kv_lens, strict=True):
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"KVCache: slot must be 0 to {self.num_slots - 1}, got {slot}")
            if kv_len > self.max_len:
                raise ValueError(f"KVCache: a request must fit {self.max_len} tokens, got {kv_len}")

    def append(self, layer: int, slot: int, begin: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values [num_new, kv_heads, head_dim] behind the first ``begin`` tokens of a slot, and gives
        all of the slot's so far, each [kv_heads, begin + num_new, head_dim]."""
        end = begin + keys.shape[0]
        for cached, new in ((self.keys, keys), (self.values, values)):
            cached[layer, slot, :, begin:end] = new.transpose(0, 1)
        return self.keys[layer, slot, :, :end], self.values[layer, slot, :, :end]

    def append_single(
        self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor, max_kv_len: int
    ) -> tuple[Tensor, Tensor]:
        """append() for many requests of one new token each: keys and values [num_requests, kv_heads, head_dim]. Gives
        copies [num_requests, kv_heads, max_kv_len, head_dim], of which what lies behind a request's own is anything."""
        for cached, new in ((self.keys, keys), (self.values, values)):
            cached[layer][slots, :, positions] = new
        return tuple(cached[layer, :, :, :max_kv_len].index_select(0, slots) for cached in (self.keys, self.values))
