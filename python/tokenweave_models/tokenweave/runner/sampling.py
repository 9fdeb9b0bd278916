"""The next token from logits: the likeliest, or drawn. Pure functions: the same bits on every rank give the same token.

A draw depends on the seed, the request and the token's position only, not on which requests share a batch with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Limits apply in the order of the fields, as in Hugging Face's generate().

    Attributes:
        temperature: logits are divided by it; 0 is greedy: the largest logit, of equal ones the lowest token.
        top_k: only this many likeliest tokens, of equally likely ones the lowest; 0 means all.
        top_p: of these only the likeliest that together reach this probability, 0 < top_p <= 1; at least one.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"SamplingParams: temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"SamplingParams: top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingParams: top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"SamplingParams: seed must be from 0 to 2**64 - 1, got {self.seed}")


def greedy(logits: Tensor) -> Tensor:
    """[num_rows], int64: for each row of logits [num_rows, vocab_size] the lowest token that has the largest one."""
    is_largest = logits == logits.amax(dim=-1, keepdim=True)
    vocab_size = logits.shape[-1]
    tokens = torch.arange(vocab_size, device=logits.device)
    found = torch.where(is_largest, tokens, vocab_size).amin(dim=-1)
    if (found == vocab_size).any():
        raise ValueError("greedy: logits must be numbers, got NaN")
    return found


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, probabilities) that a draw from logits [vocab_size] may give, likeliest first, of equal ones the lowest
    token first. Probabilities are float64 and sum up to 1. params.temperature must not be 0."""
    logits = np.asarray(logits, dtype=np.float64)
    if not logits.max() < np.inf:
        raise ValueError("distribution: logits must be numbers, got NaN")
    tokens = np.arange(logits.size)
    if 0 < params.top_k < logits.size:  # a partition first: sorting a whole vocabulary takes longer than a small model
        bound = np.partition(logits, -params.top_k)[-params.top_k]
        above, equal = np.flatnonzero(logits > bound), np.flatnonzero(logits == bound)
        tokens = np.concatenate([above, equal[: params.top_k - above.size]])
        tokens.sort()
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    kept = logits[tokens]
    probabilities = np.exp((kept - kept[0]) / params.temperature)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        enough = int(np.searchsorted(np.cumsum(probabilities), params.top_p)) + 1
        tokens, probabilities = tokens[:enough], probabilities[:enough]
        probabilities = probabilities / probabilities.sum()
    return tokens, probabilities


def uniform(seed: int, request: int, position: int) -> float:
    """The random number in [0, 1) that the token at a position of a request is drawn with."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, request, position])).random()


def sample(logits: np.ndarray, params: SamplingParams, request: int, position: int) -> int:
    """One token drawn from logits [vocab_size]."""
    tokens, probabilities = distribution(logits, params)
    reached = np.cumsum(probabilities)
    # Rounding may leave the last sum below 1.
    index = int(np.searchsorted(reached, uniform(params.seed, request, position) * reached[-1], side="right"))
    return int(tokens[min(index, tokens.size - 1)])


def next_tokens(logits: Tensor, params: SamplingParams, requests: list[int], positions: list[int]) -> list[int]:
    """The token that each row of logits [num_rows, vocab_size] goes on with."""
    if params.temperature == 0:
        return greedy(logits).tolist()
    rows = logits.float().cpu().numpy()
    return [sample(*row, *where) for row, *where in zip(((r, params) for r in rows), requests, positions, strict=True)]
