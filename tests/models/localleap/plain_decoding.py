"""The outer loop of algorithm 1 (arXiv 2510.07081) for one sequence, Fast-dLLM's caches and the reference selector: no
batch, no padding, no rows left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenweave_models.localleap.cache import KVCache
from tokenweave_models.localleap.config import ModelConfig
from tokenweave_models.localleap.model import DiffusionModel, random_model

from tokenweave_ops import DecodeRequests
from tokenweave_ops.reference import anchor_decoding as reference


def sharp_model(config: ModelConfig, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DiffusionModel:
    """A random model that looks at what is around it as closely as a trained one, so that masks get different tokens,
    with confidences from 0.1 to 1. In float64 a batch gives the same fp32 logits as a sequence alone."""
    model = random_model(config, 5, torch.float64, logit_std=5.0)
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv_proj.weight.mul_(3)
            layer.o_proj.weight.mul_(3)
    return model.to(device, dtype)


class Trace(NamedTuple):
    tokens: list[int]
    steps: list[list[tuple[int, int]]]  # of each pass, what it committed: (position, token)


@torch.inference_mode()
def plain_decode(
    model: DiffusionModel,
    text: torch.Tensor,
    starts: Sequence[int],
    block_length: int,
    *,
    cache: str = "none",
    steps: int | None = None,
    **numbers,
) -> Trace:
    """Decodes the blocks of a text [length]; numbers are those of DecodeRequests."""
    tokens, length, shift = text[None].clone(), len(text), int(model.config.shifted)
    requests = DecodeRequests.make(1, block_length, **numbers)
    kept = None if cache == "none" else KVCache(model.config, 1, length, model.embed_tokens.weight.dtype)
    done = []
    for start in starts:
        requests.begin_block_(start, block_length if steps is None else steps)
        block = torch.arange(start, start + block_length)
        previous, begins = None, True
        while (tokens[0, block] == model.config.mask_id).any():
            if kept is None or begins:
                window = torch.arange(length)
            else:
                window = torch.arange(max(start - shift, 0), start + block_length if cache == "dual" else length)
            positions = window[None]
            hidden = model.hidden_states(tokens[:, window], cache=kept, positions=positions)
            logits = model.logits(hidden)[:, (block - shift).clamp(min=0) - window[0]].float()
            before = tokens.clone()
            reference.decode_step_(
                logits, tokens, requests, mask_id=model.config.mask_id, previous_logits=previous
            )  # fmt: skip
            changed = (tokens != before)[0].nonzero().flatten().tolist()
            done.append([(position, int(tokens[0, position])) for position in changed])
            previous, begins = logits, False
    return Trace(tokens[0].tolist(), done)
