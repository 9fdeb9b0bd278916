"""Philox4x32-10, the counter-based generator behind every random number of the package, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def philox4x32_10(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of counters int64 ``[n, 4]`` (32-bit words): int64 ``[n, 4]``, in [0, 2^32).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = 0xFFFFFFFF
    words = [counter[:, i] & mask for i in range(4)]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        products = []
        for multiplier, word in ((0xD2511F53, words[0]), (0xCD9E8D57, words[2])):
            low = (multiplier & 0xFFFF) * word  # in 16-bit halves: the product needs 64 bits unsigned
            high = (multiplier >> 16) * word + (low >> 16)
            products.append((high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)))
        (high0, low0), (high1, low1) = products
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return torch.stack(words, dim=1)
