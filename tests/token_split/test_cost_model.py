"""The terms of the cost model, against counting by hand and against simple loops."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweave_ops._cost_model import (
    AttentionWork,
    CostModel,
    attention_calls,
    attention_halves,
    overlap_us,
    weave_times,
)
from tokenweave_ops.token_split import H100, ModelShape, gemm_us

DENSE = ModelShape(8192, 28672, 80, 64, 8, 128, 128256)
ROUTED = ModelShape(6144, 16384, 56, 48, 8, 128, 32768, num_experts=8, experts_per_token=2)
# One tile size, no overheads: waves can be counted by hand. 4 multiprocessors of 1 TFLOPS.
PLAIN = replace(
    H100,
    num_sms=4,
    gemm_tflops=4.0,
    gemm_tiles=((128, 128),),
    gemm_operand_rows=0.0,
    gemm_wave_us=0.0,
    kernel_us=0.0,
    hbm_gb_s=1e12,
    attention_tflops=4.0,
    attention_extra_keys=0.0,
    attention_tile_rows=1,
)
TILE_US = 2 * 128 * 128 * 1000 / 1e6  # inner 1000, at 1 TFLOPS


@pytest.mark.parametrize(
    ("rows", "features", "sms", "waves"),
    [
        (128, 128, 4, 1),
        (128, 512, 4, 1),
        (128, 513, 4, 2),
        (129, 256, 4, 1),
        (257, 256, 4, 2),
        (129, 384, 4, 2),
        (128, 512, 3, 2),
    ],
)
def test_gemm_counts_waves(rows, features, sms, waves):
    assert gemm_us(rows, features, 1000, PLAIN, sms=sms) == pytest.approx(waves * TILE_US)


def test_gemm_takes_the_best_tile():
    both = replace(PLAIN, gemm_tiles=((128, 128), (256, 128)))
    large = replace(PLAIN, gemm_tiles=((256, 128),))
    for rows in (128, 512, 640, 1024, 1280):
        single = [gemm_us(rows, 384, 1000, profile) for profile in (PLAIN, large)]
        assert gemm_us(rows, 384, 1000, both) == pytest.approx(min(single))
    # Feeding operands makes the small tile the slower one of two that fit as well.
    hungry = replace(both, gemm_operand_rows=16.0)
    assert gemm_us(1024, 512, 1000, hungry) == pytest.approx(gemm_us(1024, 512, 1000, large))


def test_gemm_is_never_faster_than_its_weights_are_read():
    slow = replace(PLAIN, hbm_gb_s=1.0)
    assert gemm_us(1, 4096, 1000, slow) == pytest.approx(2 * (1000 * 4096 + 1000 + 4096) / 1e3)


def test_gemm_on_arrays_is_gemm_on_numbers():
    rows, sms = np.array([100, 500, 2000]), np.array([[132], [124]])
    table = gemm_us(rows, 7168, 8192, H100, sms=sms)
    assert table.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert table[i, j] == gemm_us(int(rows[j]), 7168, 8192, H100, sms=int(sms[i, 0]))


def test_measured_gemms_come_before_the_model():
    samples = ((7168, 8192, 512, 100.0), (7168, 8192, 1024, 180.0))
    measured = replace(H100, gemm_samples=samples)
    assert gemm_us(512, 7168, 8192, measured) == 100.0
    assert gemm_us(768, 7168, 8192, measured) == pytest.approx(140.0)
    assert gemm_us(512, 8192, 3584, measured) == gemm_us(512, 8192, 3584, H100)  # another shape
    # Beyond the samples, and on fewer multiprocessors, the model says how much more it takes.
    ratio = gemm_us(2048, 7168, 8192, H100) / gemm_us(1024, 7168, 8192, H100)
    assert gemm_us(2048, 7168, 8192, measured) == pytest.approx(180.0 * ratio)
    assert gemm_us(np.array([512, 2048]), 7168, 8192, measured).tolist() == pytest.approx([100.0, 180.0 * ratio])
    ratio = gemm_us(1024, 7168, 8192, H100, sms=100) / gemm_us(1024, 7168, 8192, H100)
    assert gemm_us(1024, 7168, 8192, measured, sms=100) == pytest.approx(180.0 * ratio)
    assert ratio > 1


def test_experts_read_their_weights_once_per_half():
    """With few rows per expert the time is that of the weights, and two halves take it twice."""
    cost = CostModel(ROUTED, 8, H100)
    weights_us = 8 * 3 * 6144 * (16384 // 8) * 2 / (H100.hbm_gb_s * 1e3)
    assert float(cost.mlp_block(16.0, 132).tensor_us) > weights_us
    assert float(cost.mlp_block(8.0, 132).tensor_us) > weights_us
    whole, half = (float(cost.mlp_block(rows, 132).total_us) for rows in (1024.0, 512.0))
    assert 2 * half > 1.15 * whole
    dense_whole, dense_half = (float(CostModel(DENSE, 8, H100).mlp_block(r, 132).total_us) for r in (1024.0, 512.0))
    assert 2 * half / whole > 2 * dense_half / dense_whole


# ----------------------------------------------------------------------------------------------------------- attention


TILE_ROWS = 16


def counted(requests, begin, end):
    """(queries, pairs, longest_tile, kv_tokens) of rows [begin, end), one query at a time."""
    row, queries, pairs, tile, total = 0, 0, 0, 0, 0
    for query_len, kv_len in requests:
        last, mine = 0, 0
        for i in range(query_len):
            if begin <= row < end:
                last, mine = kv_len - query_len + i + 1, mine + 1
                pairs += last
            row += 1
        if query_len >= TILE_ROWS:
            tile = max(tile, min(mine, TILE_ROWS) * last)
        queries, total = queries + mine, total + last
    return queries, pairs, tile, total


@given(
    requests=st.lists(
        st.integers(1, 40).flatmap(lambda q: st.tuples(st.just(q), st.integers(q, q + 60))), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_attention_work_of_both_halves(requests, data):
    num_tokens = sum(query_len for query_len, _ in requests)
    split = data.draw(st.integers(0, num_tokens))
    first, second = attention_halves(np.array(requests, dtype=float), np.float64(split), TILE_ROWS)
    assert tuple(map(float, first)) == counted(requests, 0, split)
    assert tuple(map(float, second)) == counted(requests, split, num_tokens)


def test_attention_work_of_a_known_batch():
    """Requests of 700, 500 and 100 new tokens, cut at 768: 68 of the second are in the first half."""
    requests = np.array([(700.0, 700.0), (500.0, 900.0), (100.0, 100.0)])
    first, second = attention_halves(requests, np.array([768]), 128)
    assert (first.queries[0], first.longest_tile[0], first.kv_tokens[0]) == (768, 128 * 700, 700 + 468)
    assert (second.queries[0], second.longest_tile[0], second.kv_tokens[0]) == (532, 128 * 900, 900 + 100)


def attention_us(requests, sms=132):
    whole, _ = attention_halves(np.array(requests, dtype=float), np.float64(1e9), H100.attention_tile_rows)
    return float(CostModel(DENSE, 8, H100).attention_us(whole, sms)) - H100.kernel_us


@pytest.mark.parametrize("query_len", [1, 8])
def test_decoding_takes_as_long_as_its_keys_and_values_are_read(query_len):
    read_us = 2 * 1_000_000 * 128 * 2 / (H100.hbm_gb_s * 1e3)  # of the rank's one head of keys and of values
    assert 170 < read_us < 171
    assert attention_us([(query_len, 1_000_000)]) == pytest.approx(read_us)
    assert attention_us([(query_len, 1_000_000)] * 5) == pytest.approx(5 * read_us)


def test_one_long_prompt_among_short_ones_is_bound_by_its_longest_tile():
    """Eight heads of one tile keep eight of 132 multiprocessors busy, whatever the rest have done."""
    tile_us = 4 * 128 * 128 * 100_000 / (H100.attention_tflops * 1e6 / 132)
    assert attention_us([(128, 100_000)] + [(64, 64)] * 8) == pytest.approx(tile_us)
    assert attention_us([(128, 100_000)], sms=66) == pytest.approx(tile_us)
    # More tiles than multiprocessors: all of the arithmetic takes longer than any one of them.
    assert attention_us([(8192, 100_000)]) > 2 * tile_us


def test_cutting_a_request_does_not_hide_its_tile():
    whole = attention_us([(190, 500_000)])
    halves = attention_halves(np.array([(190.0, 500_000.0)]), np.float64(95), H100.attention_tile_rows)
    halves_us = [float(CostModel(DENSE, 8, H100).attention_us(half, 132)) for half in halves]
    assert sum(halves_us) > whole


def test_attention_calls():
    """All requests of one new token share one; the host launches what the others need."""
    for requests, calls in (
        ([(9, 9)], 1),
        ([(1, 9)] * 64, 1),
        ([(1, 9)] * 64 + [(2, 9), (3, 3)], 3),
        ([(2, 2)] * 4, 4),
    ):
        assert attention_calls(np.array(requests)) == calls
    cost = CostModel(DENSE, 8, H100)
    for mode in ("reference", "fused", "no_communication", "weave"):
        further_us = cost.host_us(mode, "eager", 4) - cost.host_us(mode, "eager", 1)
        assert further_us == pytest.approx(80 * 3 * 4 * H100.eager_launch_us)


def test_attention_is_bound_by_arithmetic_by_the_largest_tile_or_by_reads():
    shape = replace(DENSE, num_heads=8, num_kv_heads=8, intermediate=28672)
    cost = CostModel(shape, 1, PLAIN)

    def us(queries, pairs, tile, kv_tokens, model=cost):
        return float(model.attention_us(AttentionWork(*map(float, (queries, pairs, tile, kv_tokens))), 4.0))

    flops = 4 * 128 * 8 * 1000
    assert us(100, 1000, 10, 10) == pytest.approx(flops / 4e6)
    assert us(100, 1000, 5000, 10) == pytest.approx(4 * 128 * 5000 / 1e6)
    slow = CostModel(shape, 1, replace(PLAIN, hbm_gb_s=1.0))
    assert us(1, 5000, 5000, 5000, slow) == pytest.approx(2 * 8 * 128 * 2 * 5000 / 1e3)


# ------------------------------------------------------------------------------------------------------ the two lanes


def test_overlap():
    assert overlap_us(100.0, 120.0, 0.0) == 100.0  # no collective
    assert overlap_us(100.0, 120.0, 60.0) == pytest.approx(60 + 50)  # half is done when it ends
    assert overlap_us(100.0, 120.0, 120.0) == pytest.approx(120.0)
    assert overlap_us(100.0, 120.0, 150.0) == 150.0  # the collective is exposed


@given(free=st.floats(1, 1e4), slower=st.floats(1, 2), collective=st.floats(0, 2e4))
def test_overlap_is_between_its_bounds(free, slower, collective):
    us = float(overlap_us(free, free * slower, collective))
    assert max(free, collective) * (1 - 1e-12) <= us <= max(free * slower, collective) * (1 + 1e-12)


@pytest.mark.parametrize("ctas", [4, 16])
def test_collectives_that_take_every_multiprocessor_stop_compute(ctas):
    requests, choices = np.array([(1024.0, 1024.0)]), [1, ctas]
    with np.errstate(all="raise"):
        times = weave_times(CostModel(DENSE, 8, PLAIN), requests, 1024, [512], choices, choices)
    for beside_us in (times.attention_beside_us, times.mlp_beside_us):
        assert np.isfinite(beside_us[:, 0]).all() and np.isinf(beside_us[:, 1]).all()


def test_the_power_limit():
    cost = CostModel(DENSE, 8, H100)
    assert cost.at_power_limit_us(1000.0, 0.0) == pytest.approx(1000.0)
    total = cost.at_power_limit_us(1000.0, 200.0)
    tensor = total - 200
    assert tensor < 1000
    # Energy: power goes with the cube of the clock, and what the other phases did not draw is spent.
    assert tensor * (1000 / tensor) ** 3 == pytest.approx(tensor + 200 * (1 - H100.low_power_share))
    assert cost.at_power_limit_us(1.0, 1e6) == pytest.approx(1 / 1.3 + 1e6)  # the clock has an end
    indifferent = CostModel(DENSE, 8, replace(H100, low_power_share=1.0))
    assert indifferent.at_power_limit_us(1000.0, 200.0) == pytest.approx(1200.0)


def test_collective_regimes():
    link = H100.link
    assert link.collective_us(0, 8, 4) == link.latency_us
    sent = 64 * 2**20 * (1 + 1 / 8)
    assert link.collective_us(64 * 2**20, 8, 32) == pytest.approx(link.latency_us + sent / (link.link_gb_s * 1e3))
    few = link.collective_us(64 * 2**20, 8, 2) - link.latency_us
    assert few == pytest.approx(sent * (1 / (2 * link.cta_gb_s) + 1 / link.stream_gb_s) / 1e3)
    # Four ranks send more per rank than eight.
    assert link.collective_us(64 * 2**20, 4, 32) > link.collective_us(64 * 2**20, 8, 32)
