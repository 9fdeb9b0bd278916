"""LocalLeap's selector in the form in which it was published: a loop over positions in Python, float64, one sequence.

The baseline of the bench, written from the algorithm (arXiv 2510.07081, algorithm 1): probabilities of every row in
float64, then decisions position by position, each of which waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenweave_ops import POLICIES, DecodeRequests, DecodeStep


def published_select(
    logits: Tensor, tokens: Tensor, start: int, threshold: float, relaxed_threshold: float, radius: int, mask_id: int
) -> list[int]:
    """One step of one sequence: logits [n, vocab] of the n masked positions of tokens [length] from start on, in order.
    Writes tokens, and returns the places of those positions that it committed."""
    masked = (tokens[start:] == mask_id).nonzero().flatten()[: len(logits)] + start
    allowed = logits.clone()
    allowed[:, mask_id] = -torch.inf  # else a mask could be written over a mask, for ever
    chosen = allowed.argmax(dim=-1)
    confidence = logits.to(torch.float64).softmax(dim=-1).gather(1, chosen[:, None]).flatten()
    first = int(confidence.argmax())
    anchors = [int(masked[i]) for i in range(len(masked)) if confidence[i].item() >= threshold]
    near: set[int] = set()
    for anchor in anchors:
        near.update(range(anchor - radius, anchor + radius + 1))
    committed = []
    for i in range(len(masked)):
        position = int(masked[i])
        needed = relaxed_threshold if position in near else threshold
        if i == first or confidence[i].item() >= needed:
            tokens[position] = chosen[i]
            committed.append(i)
    return committed


def published_selector(
    logits: Tensor, tokens: Tensor, requests: DecodeRequests, *, mask_id: int, rows: Tensor, **_more
) -> DecodeStep:
    """In the place of decode_step_, for policy local_leap without sampling; it gets the rows of masked positions only,
    where the published code computes those of the whole sequence."""
    counts = torch.zeros(requests.batch, 4, dtype=torch.int64)
    candidates = torch.full((requests.batch, requests.block_length), -1, dtype=torch.int64, device=tokens.device)
    for number in range(requests.batch):
        assert POLICIES[int(requests.policy[number])] == "local_leap"
        start = int(requests.block_start[number])
        block = tokens[number, start : start + requests.block_length]
        places = (block == mask_id).nonzero().flatten()
        if len(places) == 0:
            continue
        committed = published_select(
            logits[rows[number, places]], tokens[number], start, float(requests.threshold[number]),
            float(requests.relaxed_threshold[number]), int(requests.radius[number]), mask_id,
        )  # fmt: skip
        at = places[committed]
        candidates[number, at] = block[at]
        counts[number, 0], counts[number, 1] = len(committed), len(places) - len(committed)
    return DecodeStep(counts.to(tokens.device), candidates >= 0, candidates, torch.empty(0))
