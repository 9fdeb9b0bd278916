"""split_batch: the spec's vectors, and the laws that make two halves one batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweave_ops import split_batch


def test_published_vector():
    """Scheduled [700, 500, 100] of requests with [700, 900, 100] tokens, cut at 768: the second request is cut."""
    first, second = split_batch([700, 500, 100], [700, 900, 100], 768)
    assert (first.requests, first.query_lens, first.kv_lens) == ((0, 1), (700, 68), (700, 468))
    assert (second.requests, second.query_lens, second.kv_lens) == ((1, 2), (432, 100), (900, 100))
    assert (first.rows, second.rows) == (slice(0, 768), slice(768, 1300))
    assert first.query_start_loc == (0, 700, 768)
    assert second.query_start_loc == (0, 432, 532)


@pytest.mark.parametrize("split, first, second", [(700, (0,), (1, 2)), (1200, (0, 1), (2,))])
def test_a_cut_on_an_edge_shares_no_request(split, first, second):
    halves = split_batch([700, 500, 100], [700, 900, 100], split)
    assert (halves[0].requests, halves[1].requests) == (first, second)
    assert halves[0].kv_lens + halves[1].kv_lens == (700, 900, 100)


def test_padding_rounds_rows_up_and_changes_nothing_else():
    plain, padded = (split_batch([1300, 7], [1300, 90], 768, pad_to=pad) for pad in (1, 256))
    assert [half.num_padded_tokens for half in plain] == [768, 539]
    assert [half.num_padded_tokens for half in padded] == [768, 768]
    assert [half.num_tokens for half in padded] == [768, 539]
    assert [half.kv_lens for half in padded] == [half.kv_lens for half in plain]


@st.composite
def batches(draw):
    query_lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda lens: sum(lens) > 1))
    cached = [draw(st.integers(0, 50)) for _ in query_lens]
    split = draw(st.integers(1, sum(query_lens) - 1))
    return query_lens, [query + old for query, old in zip(query_lens, cached, strict=True)], split


@given(batches(), st.sampled_from((1, 8, 128)))
def test_the_halves_are_the_batch(batch, pad_to):
    query_lens, kv_lens, split = batch
    halves = split_batch(query_lens, kv_lens, split, pad_to=pad_to)
    # Every token once, in order, with the keys it attends to.
    expected = [
        (request, kv_len - query_len + i + 1)
        for request, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True))
        for i in range(query_len)
    ]
    found = [
        (request, kv_len - query_len + i + 1)
        for half in halves
        for request, query_len, kv_len in zip(half.requests, half.query_lens, half.kv_lens, strict=True)
        for i in range(query_len)
    ]
    assert found == expected
    first, second = halves
    assert first.num_tokens == split and first.num_tokens + second.num_tokens == sum(query_lens)
    assert first.rows.stop == second.rows.start == split
    for half in halves:
        assert half.num_tokens == sum(half.query_lens) >= 1
        assert min(half.query_lens) >= 1
        assert half.query_start_loc[-1] == half.num_tokens
        assert half.num_tokens <= half.num_padded_tokens < half.num_tokens + pad_to
        assert half.num_padded_tokens % pad_to == 0
    # A request in both halves: the second part reads what the first part leaves in the cache, and its own.
    for request in set(first.requests) & set(second.requests):
        assert first.kv_lens[-1] + second.query_lens[0] == second.kv_lens[0] == kv_lens[request]


@given(batches())
def test_attention_over_the_halves_is_attention_over_the_whole(batch):
    query_lens, kv_lens, split = batch
    generator = torch.Generator().manual_seed(sum(kv_lens))
    keys = [torch.randn(kv_len, 4, generator=generator, dtype=torch.float64) for kv_len in kv_lens]
    q = torch.randn(sum(query_lens), 4, generator=generator, dtype=torch.float64)

    def attend(rows, requests, query_lens, kv_lens):
        out, begin = [], rows.start
        for request, query_len, kv_len in zip(requests, query_lens, kv_lens, strict=True):
            seen = keys[request][:kv_len]
            mask = torch.ones(query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)
            scores = (q[begin : begin + query_len] @ seen.T).masked_fill(~mask, -torch.inf)
            out.append(scores.softmax(-1) @ seen)
            begin += query_len
        return torch.cat(out)

    whole = attend(slice(0, None), range(len(query_lens)), query_lens, kv_lens)
    halves = split_batch(query_lens, kv_lens, split)
    parts = [attend(half.rows, half.requests, half.query_lens, half.kv_lens) for half in halves]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3, 4], [3], 2), "kv_lens must have one entry per request, got 1 for 2 query_lens"),
        (([3, 0], [3, 4], 2), "query_lens must be at least 1, got 0 for request 1"),
        (([3, 4], [3, 3], 2), "kv_lens must include the scheduled tokens, got kv_len=3, query_len=4 for request 1"),
        (([3, 4], [3, 4], 0), "split must be inside the batch, 1 to 6, got 0"),
        (([3, 4], [3, 4], 7), "split must be inside the batch, 1 to 6, got 7"),
        (([], [], 1), "split must be inside the batch, 1 to -1, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"split_batch: {message}"):
        split_batch(*arguments)


def test_padding_must_be_positive():
    with pytest.raises(ValueError, match="split_batch: pad_to must be at least 1, got 0"):
        split_batch([3, 4], [3, 4], 2, pad_to=0)
