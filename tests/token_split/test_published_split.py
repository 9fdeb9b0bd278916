"""TokenWeave's own rule of where to split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweave_ops.token_split import published_split


@pytest.mark.parametrize(
    ("num_tokens", "offset", "expected"),
    [
        (1024, 0, (1024, 512, 512, 512)),
        (1024, 256, (1024, 768, 256, 256)),
        (1025, 0, (1280, 640, 640, 385)),
        (1025, 256, (1280, 896, 384, 129)),
        (2048, 256, (2048, 1280, 768, 768)),
        (3000, 256, (3072, 1792, 1280, 1208)),
        (4096, 128, (4096, 2176, 1920, 1920)),
        (8192, 256, (8192, 4352, 3840, 3840)),
        (8193, 0, (8448, 4224, 4224, 3969)),
    ],
)
def test_known_splits(num_tokens, offset, expected):
    assert published_split(num_tokens, offset) == expected


@given(num_tokens=st.integers(1024, 100_000), offset=st.sampled_from([0, 128, 256]))
def test_padding_and_halves(num_tokens, offset):
    padded, split, padded_rest, rest = published_split(num_tokens, offset)
    assert padded % 256 == 0
    assert num_tokens <= padded < num_tokens + 256
    assert split + padded_rest == padded
    assert split + rest == num_tokens
    assert split % 128 == 0 and padded_rest % 128 == 0
    assert rest > 0


@pytest.mark.parametrize(("offset", "smallest"), [(0, 385), (256, 129)])
def test_smallest_second_half(offset, smallest):
    assert min(published_split(num_tokens, offset)[3] for num_tokens in range(1024, 20_000)) == smallest


def test_split_outside_the_batch():
    with pytest.raises(ValueError, match="published_split: num_tokens must be an integer of at least 1024, got 1023"):
        published_split(1023)
    with pytest.raises(
        ValueError, match="offset must keep the split inside the batch of 1024 tokens, got 512: split at"
    ):
        published_split(1024, 512)
    with pytest.raises(ValueError, match="inside the batch"):
        published_split(1024, -512)
