"""What the benchmarks of family anchor_decoding share: rows, the float64 result, and the selection step as others write
it: the published loop, and the strongest vectorised form of plain torch.
"""

from __future__ import annotations

import math

import torch

FAMILY = "anchor_decoding"
BLOCK_LENGTH = 32
MASK_ID = 126336  # LLaDA's; it lies within every vocabulary measured here
THRESHOLD, RELAXED_THRESHOLD, RADIUS = 0.9, 0.75, 4  # as published for LLaDA
PEAK = 126000  # peaks lie below, so that no row's largest logit is the mask id's


def fill_logits(logits: torch.Tensor, generator: torch.Generator) -> None:
    """[batch, block_length, vocab]: noise, and in each row one peak whose probability is anywhere from 0.3 to 0.999, so
    that some rows are anchors, some pass beside one and some wait."""
    for rows in logits:
        rows.normal_(generator=generator)
        place = torch.randint(PEAK, (len(rows), 1), generator=generator, device=rows.device)
        p = 0.3 + 0.699 * torch.rand(len(rows), 1, generator=generator, device=rows.device)
        rest = rows.float().scatter_(1, place, -math.inf).logsumexp(dim=1, keepdim=True)
        rows.scatter_(1, place, (rest + (p / (1 - p)).log()).to(rows.dtype))


def fill_masked(tokens: torch.Tensor, generator: torch.Generator) -> None:
    tokens.fill_(MASK_ID)


def fill_half_masked(tokens: torch.Tensor, generator: torch.Generator) -> None:
    tokens.fill_(MASK_ID)
    tokens[:, 1::2] = 0


# ------------------------------------------------------------------------------------------------------------- the step


def choose(confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """LocalLeap's commit mask [batch, block_length], without a loop: windows are a maximum over 2 W + 1 neighbours."""
    confidence = torch.where(masked, confidence, -math.inf)
    anchors = (confidence >= THRESHOLD).to(torch.float32)
    near = torch.nn.functional.max_pool1d(anchors[:, None], 2 * RADIUS + 1, stride=1, padding=RADIUS)[:, 0] > 0
    passes = confidence >= torch.where(near, RELAXED_THRESHOLD, THRESHOLD)
    first = torch.arange(confidence.shape[1], device=confidence.device) == confidence.argmax(dim=1, keepdim=True)
    return (passes | first) & masked


def eager_scan(logits):
    """Confidence and candidate of every row in fp32; of five ways that were tried the fastest in eager torch."""
    return logits.float().softmax(dim=-1).max(dim=-1)


def compiled_scan(logits):
    """The same for inductor; of the same ways the fastest there."""
    largest, candidates = logits.max(dim=-1, keepdim=True)
    return 1 / (logits.float() - largest.float()).exp().sum(dim=-1), candidates[..., 0]


def _vectorised_step(scan, logits, tokens):
    confidence, candidates = scan(logits)
    tokens.copy_(torch.where(choose(confidence, tokens == MASK_ID), candidates, tokens))


def eager_step(logits, tokens):
    _vectorised_step(eager_scan, logits, tokens)


def compiled_step(logits, tokens):
    _vectorised_step(compiled_scan, logits, tokens)


def published_step(logits, tokens):
    """As the published selector does it: one sequence at a time, softmax in float64, Python over positions."""
    for rows, block in zip(logits, tokens, strict=True):
        masked = block == MASK_ID
        candidates = rows.argmax(dim=-1)
        p = rows.to(torch.float64).softmax(dim=-1)
        confidence = p.gather(-1, candidates[:, None])[:, 0]
        confidence = torch.where(masked, confidence, -math.inf)
        confidence, position = confidence.topk(int(masked.sum()))
        anchors = [position[k].item() for k in range(len(position)) if confidence[k].item() >= THRESHOLD]
        near = {i for anchor in anchors for i in range(anchor - RADIUS, anchor + RADIUS + 1)}
        chosen = torch.zeros_like(masked)
        for k in range(len(position)):
            threshold = RELAXED_THRESHOLD if position[k].item() in near else THRESHOLD
            if k == 0 or confidence[k].item() >= threshold:
                chosen[position[k]] = True
        block[chosen] = candidates[chosen]


def exact_scan(inputs) -> dict[str, torch.Tensor]:
    return {"confidence": inputs["logits"].softmax(dim=-1).amax(dim=-1)}


def exact_step(inputs) -> dict[str, torch.Tensor]:
    """Tokens after the step, from float64 inputs."""
    confidence, candidates = inputs["logits"].softmax(dim=-1).max(dim=-1)
    tokens = inputs["tokens"].long()
    return {"tokens": torch.where(choose(confidence, tokens == MASK_ID), candidates, tokens)}
