"""The meaning of family anchor_decoding: a position, a sequence at a time, in float64. For reading, not for speed."""

from __future__ import annotations

from math import ceil, inf, nan

import torch
from torch import Tensor

from tokenweave_ops._decode_requests import POLICIES, DecodeRequests
from tokenweave_ops.reference._philox import philox4x32_10

SMALLEST_CONFIDENCE = torch.finfo(torch.float32).tiny
LARGEST_LOGIT = 2.0**23  # from here on a maximum counts as infinite
KLASS_STEPS = 2  # in a row, for which a distribution must have been stable


# --------------------------------------------------------------------------------------------------------------- a row


def gumbel_noise(vocab: int, seed: int, place: int, step: int) -> Tensor:
    """Standard Gumbel noise, float64 ``[vocab]``: ``-log(-log1p(-u))``, u in (0, 1) from the id's word of Philox.
    ``place``: of the position in its block.

    u is exact in fp32 and finest near 0, where large noise comes from.
    """
    counter = torch.zeros((vocab + 3) // 4, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(counter.shape[0])
    counter[:, 1], counter[:, 2], counter[:, 3] = place, step, step >> 32
    bits = philox4x32_10(counter, seed).flatten()[:vocab]
    u = (bits.to(torch.float32) * 2.0**-32).clamp(2.0**-33, 1 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-u))


def row_statistics(
    row: Tensor,
    *,
    mask_id: int,
    forbidden: set[int],
    deferred: set[int],
    vocab_limit: int,
    noise: Tensor | None = None,
    temperature: float = 0.0,
    previous: Tensor | None = None,
) -> tuple[int, list[float]]:
    """Candidate and [confidence, entropy, margin, divergence] of one row of logits ``[vocab]``."""
    counted = torch.ones(row.shape[-1], dtype=torch.bool)
    counted[vocab_limit:] = False
    counted[[i for i in forbidden if 0 <= i < len(counted)]] = False
    allowed = counted.clone()
    allowed[mask_id] = False
    logits = row.double().nan_to_num(nan=-inf, posinf=inf, neginf=-inf).masked_fill(~counted, -inf)
    choices = logits.masked_fill(~allowed, -inf)

    if not allowed.any():
        return -1, [nan, nan, nan, nan]
    best = choices.max()
    candidate = int((choices.masked_fill(~allowed, nan) == best).nonzero()[0])
    if not best > -LARGEST_LOGIT or not logits.max() < LARGEST_LOGIT:
        return candidate, [0.0, inf, 0.0, inf]
    if temperature > 0:
        noisy = choices + temperature * noise
        candidate = int((noisy == noisy.max()).nonzero()[0])

    log_p = logits - logits.logsumexp(dim=0)
    p = log_p.exp()
    present = p > 0
    entropy = -(p * log_p)[present].sum().item()
    two = p.masked_fill(~allowed, 0).topk(2).values
    margin = (two[0] - two[1]).item()
    divergence = inf
    if previous is not None:
        before = previous.double().nan_to_num(nan=-inf, posinf=inf, neginf=-inf).masked_fill(~counted, -inf)
        if -LARGEST_LOGIT < before.max() < LARGEST_LOGIT:
            log_before = before - before.logsumexp(dim=0)
            divergence = (p * (log_p - log_before))[present].sum().item()
    if candidate in deferred:
        return candidate, [SMALLEST_CONFIDENCE, inf, 0.0, divergence]
    return candidate, [max(p[candidate].item(), SMALLEST_CONFIDENCE), entropy, margin, divergence]


# ---------------------------------------------------------------------------------------------------------- a sequence


def select(
    policy: str,
    statistics: dict[int, list[float]],
    *,
    threshold: float = 0.0,
    relaxed_threshold: float = 0.0,
    radius: int = 0,
    steps_left: int = 1,
    stable: set[int] = frozenset(),
) -> set[int]:
    """Which candidates a policy commits. ``statistics``: position -> [confidence, entropy, margin, divergence]."""
    if not statistics:
        return set()
    confidence = {i: values[0] for i, values in statistics.items()}
    entropy = {i: values[1] for i, values in statistics.items()}
    margin = {i: values[2] for i, values in statistics.items()}
    if policy in ("eb", "entropy_threshold", "topk_entropy"):
        ranked = sorted(entropy, key=lambda i: (entropy[i], i))
    elif policy in ("margin", "topk_margin"):
        ranked = sorted(margin, key=lambda i: (-margin[i], i))
    else:
        ranked = sorted(confidence, key=lambda i: (-confidence[i], i))
    first = {ranked[0]}
    scheduled = set(ranked[: ceil(len(ranked) / steps_left)])

    if policy.startswith("topk"):
        return scheduled
    if policy == "threshold":
        return first | {i for i in ranked if confidence[i] >= threshold}
    if policy == "margin":
        return first | {i for i in ranked if margin[i] >= threshold}
    if policy == "entropy_threshold":
        return first | {i for i in ranked if entropy[i] <= threshold}
    if policy == "local_leap":
        anchors = {i for i in ranked if confidence[i] >= threshold}
        near = {i for i in ranked if any(abs(i - a) <= radius for a in anchors)}
        return first | {i for i in ranked if confidence[i] >= (relaxed_threshold if i in near else threshold)}
    if policy == "factor":
        passed = 1
        while passed < len(ranked) and confidence[ranked[passed]] >= 1 - threshold / (passed + 2):
            passed += 1
        # The published loop cannot tell a last candidate that failed from one that passed.
        return set(ranked) if passed == len(ranked) - 1 and passed > 0 else set(ranked[:passed])
    if policy == "eb":
        committed, before = set(), 0.0
        for i in ranked:
            if committed and not before <= threshold:
                break
            committed.add(i)
            before += entropy[i]
        return committed
    assert policy == "klass", policy
    return {i for i in ranked if i in stable and confidence[i] >= threshold} or scheduled


def decode_step_(
    logits: Tensor,
    tokens: Tensor,
    requests: DecodeRequests,
    *,
    mask_id: int,
    rows: Tensor | None = None,
    forbidden: Tensor | None = None,
    deferred: Tensor | None = None,
    previous_logits: Tensor | None = None,
    vocab_limit: int | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokenweave_ops.decode_step_ on CPU tensors: counts, committed, candidates, statistics (float64)."""
    r, vocab = requests, logits.shape[-1]
    table = logits.reshape(-1, vocab)
    before = None if previous_logits is None else previous_logits.reshape(-1, vocab)
    if rows is None:
        rows = torch.arange(r.batch * r.block_length).view(r.batch, r.block_length)
    counts = torch.zeros(r.batch, 4, dtype=torch.int64)
    committed = torch.zeros(r.batch, r.block_length, dtype=torch.bool)
    candidates = torch.full((r.batch, r.block_length), -1, dtype=torch.int64)
    statistics = torch.full((r.batch, r.block_length, 4), nan, dtype=torch.float64)
    for b in range(r.batch):
        start, temperature = int(r.block_start[b]), float(r.temperature[b])
        masked = [j for j in range(r.block_length) if tokens[b, start + j] == mask_id]
        found = {}
        for j in masked:
            row = int(rows[b, j])
            if row < 0:
                continue
            step = int(r.step[b])
            candidate, values = row_statistics(
                table[row],
                mask_id=mask_id,
                forbidden=set() if forbidden is None else set(forbidden.tolist()),
                deferred=set() if deferred is None else set(deferred.tolist()),
                vocab_limit=vocab if vocab_limit is None else vocab_limit,
                noise=gumbel_noise(vocab, int(r.seed[b]), j, step) if temperature > 0 else None,
                temperature=temperature,
                previous=None if before is None or r.stable_steps[b, j] < 0 else before[row],
            )
            candidates[b, j], statistics[b, j] = candidate, torch.tensor(values, dtype=torch.float64)
            if candidate >= 0:
                found[j] = values
        policy = POLICIES[int(r.policy[b])]
        if policy == "klass":
            for j in found:
                seen = int(r.stable_steps[b, j])
                stable = seen >= 0 and found[j][3] < float(r.relaxed_threshold[b])
                r.stable_steps[b, j] = seen + 1 if stable else 0
        chosen = select(
            policy, found, threshold=float(r.threshold[b]), relaxed_threshold=float(r.relaxed_threshold[b]),
            radius=int(r.radius[b]), steps_left=int(r.steps_left[b]),
            stable={j for j in found if r.stable_steps[b, j] >= KLASS_STEPS},
        )  # fmt: skip
        for j in chosen:
            committed[b, j] = True
            tokens[b, start + j] = candidates[b, j]
        if found:
            r.step[b] += 1
            r.steps_left[b] = max(1, int(r.steps_left[b]) - 1)
        bad = sum(values[0] == 0 for values in found.values())
        counts[b] = torch.tensor([len(chosen), len(masked) - len(chosen), bad, 0])
    return counts, committed, candidates, statistics
