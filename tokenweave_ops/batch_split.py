"""Cutting a batch's tokens in two: who keeps which requests, and what of them each half's attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class HalfBatch:
    """A contiguous range of a batch's tokens, whole requests of it and at most one cut request at either end.

    Attributes:
        first_token: where the range begins in the batch.
        num_tokens: its length, at least 1.
        num_padded_tokens: rows to allocate for it, ``num_tokens`` rounded up to the padding asked for. Rows past
            ``num_tokens`` hold nothing; only matrix products may run over them.
        requests: indices of its requests in the batch, ascending and contiguous.
        query_lens: tokens of each of these requests in this half.
        kv_lens: what they attend to at the end of this half: tokens cached before the batch, those of an earlier half,
            and their own.
    """

    first_token: int
    num_tokens: int
    num_padded_tokens: int
    requests: tuple[int, ...]
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The half's tokens in the batch."""
        return slice(self.first_token, self.first_token + self.num_tokens)

    @property
    def query_start_loc(self) -> tuple[int, ...]:
        """[len(requests) + 1]: where each request begins among the half's tokens, and the end. (cu_seqlens)"""
        return (0, *accumulate(self.query_lens))


def split_batch(
    query_lens: Sequence[int], kv_lens: Sequence[int], split: int, *, pad_to: int = 1
) -> tuple[HalfBatch, HalfBatch]:
    """The first ``split`` tokens of a batch and the rest, each a batch of its own.

    A batch is the concatenation of its requests' scheduled tokens: prompts, chunks of prompts and single decoded tokens
    in any order. The request that lies across the cut is part of both halves. Its first part attends to
    ``kv_len - (tokens in the second half)``; its second part to all of ``kv_len``, so a layer's attention over the
    first half must have written its keys and values before that layer's attention over the second half reads them.
    Causal attention only.

    Args:
        query_lens: scheduled tokens of each request, each at least 1.
        kv_lens: tokens each request attends to, the scheduled ones included.
        split: tokens of the first half, 1 to ``sum(query_lens) - 1``: no half is empty.
        pad_to: both halves' ``num_padded_tokens`` are multiples of it (kernels captured for fixed shapes, tiles).

    >>> [(half.query_lens, half.kv_lens) for half in split_batch([700, 500, 100], [700, 900, 100], 768)]
    [((700, 68), (700, 468)), ((432, 100), (900, 100))]

    Raises:
        ValueError: an argument does not fit.

    Source: TokenWeave (arXiv 2505.11329) and its published code, which cuts the scheduler's batch the same way.
    """
    query_lens, kv_lens = tuple(query_lens), tuple(kv_lens)
    if len(query_lens) != len(kv_lens):
        raise ValueError(
            f"split_batch: kv_lens must have one entry per request, got {len(kv_lens)} for {len(query_lens)} query_lens"
        )
    for request, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if query_len < 1:
            raise ValueError(f"split_batch: query_lens must be at least 1, got {query_len} for request {request}")
        if kv_len < query_len:
            raise ValueError(
                f"split_batch: kv_lens must include the scheduled tokens, got kv_len={kv_len}, query_len={query_len} "
                f"for request {request}"
            )
    if pad_to < 1:
        raise ValueError(f"split_batch: pad_to must be at least 1, got {pad_to}")
    num_tokens = sum(query_lens)
    if not 0 < split < num_tokens:
        raise ValueError(f"split_batch: split must be inside the batch, 1 to {num_tokens - 1}, got {split}")

    ends = tuple(accumulate(query_lens))
    cut = next(request for request, end in enumerate(ends) if end >= split)  # whose token is the first half's last
    in_second = ends[cut] - split  # tokens of it that come after the cut; 0: the cut is on its edge
    first = _half(
        0, range(cut + 1), (*query_lens[:cut], query_lens[cut] - in_second), (*kv_lens[:cut], kv_lens[cut] - in_second),
        pad_to,
    )  # fmt: skip
    if in_second == 0:
        cut += 1
        in_second = query_lens[cut]
    second = _half(
        split, range(cut, len(query_lens)), (in_second, *query_lens[cut + 1 :]), kv_lens[cut:], pad_to
    )  # fmt: skip
    return first, second


def _half(first_token: int, requests: range, query_lens, kv_lens, pad_to: int) -> HalfBatch:
    num_tokens = sum(query_lens)
    return HalfBatch(
        first_token, num_tokens, -(-num_tokens // pad_to) * pad_to, tuple(requests), tuple(query_lens), tuple(kv_lens)
    )
