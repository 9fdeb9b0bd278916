"""What the planner decides, and that all ranks decide the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweave_ops.token_split import (
    H100,
    ModelShape,
    SplitOverride,
    SplitPlan,
    _candidates,
    _most_even,
    cpu_profile,
    gemm_us,
    load_overrides,
    plan_gemm_split,
    plan_token_split,
    published_split,
    weave_pass,
)

LLAMA = ModelShape(8192, 28672, 80, 64, 8, 128, 128256)
MIXTRAL = ModelShape(6144, 16384, 56, 48, 8, 128, 32768, num_experts=8, experts_per_token=2)
TINY = ModelShape(256, 688, 4, 8, 4, 32, 256)
CPU = cpu_profile("some cpu", 1, gemm_tflops=0.05, memory_gb_s=8.0, link_gb_s=0.5, link_latency_us=200.0)


# ----------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("num_tokens", [1024, 2048, 8192, 65536])
def test_large_dense_batches_are_split(num_tokens):
    plan = plan_token_split(num_tokens, 0, LLAMA, 8, H100)
    assert plan.kind == "split"
    assert 0.37 * num_tokens <= plan.split <= 0.63 * num_tokens
    assert plan.split % 64 == 0
    assert plan.attention_ctas in (2, 4, 8) and plan.mlp_ctas in (2, 4, 8)
    assert plan.predicted_us["weave"] < plan.predicted_us["fused"] < plan.predicted_us["reference"]


@pytest.mark.parametrize("num_tokens", [1, 16, 128, 256])
def test_small_batches_are_not_split(num_tokens):
    plan = plan_token_split(num_tokens, 0, LLAMA, 8, H100)
    assert plan.kind == "fuse"
    assert (plan.split, plan.attention_ctas, plan.mlp_ctas) == (0, 0, 0)
    assert plan.exposed_ctas == 16


@pytest.mark.parametrize("launch", ["graph", "eager"])
@pytest.mark.parametrize("num_tokens", [1024, 2048])
def test_mixture_of_experts_is_not_split_where_that_loses(num_tokens, launch):
    """Half of the tokens per expert, and the experts' weights read twice."""
    assert plan_token_split(num_tokens, 0, MIXTRAL, 8, H100, launch=launch).kind == "fuse"
    assert plan_token_split(8192, 0, MIXTRAL, 8, H100, launch=launch).kind == "split"


def test_the_host_bounds_eager_mode():
    """The published loss of Mixtral at 1K tokens is the host's: a graph does not have it."""
    eager = plan_token_split(1024, 0, MIXTRAL, 8, H100, launch="eager").predicted_us
    graph = plan_token_split(1024, 0, MIXTRAL, 8, H100, launch="graph").predicted_us
    assert eager["weave"] / eager["reference"] > 1.5
    assert graph["weave"] / graph["reference"] < 1.1
    # The halves of twice as many tokens take the host just as long.
    assert plan_token_split(2048, 0, MIXTRAL, 8, H100, launch="eager").predicted_us["weave"] == eager["weave"]


def test_one_rank_has_nothing_to_hide():
    plan = plan_token_split(8192, 0, LLAMA, 1, H100)
    assert plan.kind == "none"
    us = plan.predicted_us
    assert us["reference"] == us["fused"] == us["no_communication"]
    assert "weave" not in us


def test_a_slower_link_raises_what_a_split_saves():
    saved = []
    for link_gb_s in (1000.0, 300.0, 100.0):
        link = replace(H100.link, link_gb_s=link_gb_s)
        us = plan_token_split(4096, 0, LLAMA, 8, replace(H100, link=link)).predicted_us
        saved.append(us["reference"] / us["weave"])
        assert us["reference"] > us["fused"] >= us["no_communication"] * 0.9
    assert saved == sorted(saved)


def test_context_makes_attention_dearer_and_its_halves_unequal():
    short = weave_pass(plan_token_split(4096, 0, LLAMA, 8, H100), 0, LLAMA, 8, H100)
    plan = plan_token_split(4096, 60_000, LLAMA, 8, H100)
    long = weave_pass(plan, 60_000, LLAMA, 8, H100)
    assert long.attention[0].compute_us > 2 * short.attention[0].compute_us
    # Equal halves of one request: the second attends to the first as well.
    equal = plan_token_split(8192, 0, LLAMA, 8, H100, overrides={8192: SplitOverride(0, 4, 4)})
    first, second = weave_pass(equal, 0, LLAMA, 8, H100).attention
    assert second.compute_us > first.compute_us * 1.05
    assert second.collective_us == first.collective_us


def test_a_collective_is_that_of_the_other_half():
    table = {4096: SplitOverride(256, 4, 8)}
    plan = plan_token_split(4096, 0, LLAMA, 8, H100, overrides=table)
    times = weave_pass(plan, 0, LLAMA, 8, H100)

    def us(rows, ctas):
        return pytest.approx(H100.link.collective_us(rows * 8192 * 2, 8, ctas))

    assert plan.split == 2304
    assert [pair.collective_us for pair in times.attention] == [us(1792, 4), us(2304, 4)]
    assert [pair.collective_us for pair in times.mlp] == [us(1792, 8), us(2304, 8)]
    assert (times.first_collective_us, times.last_collective_us) == (us(2304, 16), us(1792, 16))


def test_of_equally_good_splits_the_most_even_one():
    """Smooth GEMMs and a link that is hidden anyhow: many splits are as good as the best."""
    short_sighted = replace(TINY, head_dim=2)  # hardly any attention, which would differ between the halves
    fast = replace(CPU, link=replace(CPU.link, link_gb_s=10.0, latency_us=20.0))
    assert plan_token_split(512, 0, short_sighted, 2, fast).split == 256


def test_splits_within_a_tenth_of_a_percent_are_equally_good():
    splits, total_us = np.array([1792, 2048]), np.array([1000.0, 1000.9])
    assert _most_even(splits, total_us, 4096) == 1
    assert _most_even(splits, total_us + np.array([0.0, 0.2]), 4096) == 0


@pytest.mark.parametrize(("num_tokens", "step"), [(1024, 64), (4096, 64), (8192, 128), (65536, 1024)])
def test_candidates_are_few_and_large_batches_stay_on_multiples_of_large_tiles(num_tokens, step):
    splits = _candidates(num_tokens, 64)
    assert splits.size <= 33
    assert (np.diff(splits) == step).all() and (splits % step == 0).all()
    assert 0.37 * num_tokens <= splits[0] < 0.37 * num_tokens + step
    assert 0.63 * num_tokens - step < splits[-1] <= 0.63 * num_tokens


def test_a_split_that_saves_nothing_is_not_taken():
    """Outside its layers the pass takes so long that no float tells the modes apart."""
    us = (plan := plan_token_split(4096, 0, LLAMA, 8, replace(H100, pass_us=1e24))).predicted_us
    assert us["weave"] == us["fused"] == us["reference"]
    assert plan.kind == "none"


def test_ties_go_to_the_simpler_mode():
    """Norms and a link that cost nothing: fusing saves nothing, and nothing is left to hide."""
    link = replace(H100.link, link_gb_s=1e30, latency_us=0.0, cta_gb_s=1e30, stream_gb_s=1e30)
    free = replace(H100, norm_gb_s=1e30, kernel_us=0.0, link=link)
    plan = plan_token_split(4096, 0, LLAMA, 8, free)
    assert plan.predicted_us["fused"] == plan.predicted_us["reference"]
    assert plan.kind == "none"
    # With norms that cost something fusing gains; a split of it still does not.
    assert plan_token_split(64, 0, LLAMA, 8, replace(free, norm_gb_s=1000.0)).kind == "fuse"


def test_cpu_ranks_with_a_link_that_sleeps():
    plan = plan_token_split(128, 0, TINY, 2, CPU)
    assert plan.kind == "split"
    assert plan.attention_ctas == plan.mlp_ctas == plan.exposed_ctas == 1
    assert plan.split % 16 == 0
    # The link takes no core, so compute beside it is as fast as alone.
    for pair in (*(times := weave_pass(plan, 0, TINY, 2, CPU)).attention, *times.mlp):
        assert pair.beside_us == pair.compute_us
    assert plan_token_split(16, 0, TINY, 2, CPU).kind == "fuse"  # no room for two halves of 16 rows


# ------------------------------------------------------------------------------------------------------------- batches


@given(
    requests=st.lists(
        st.integers(1, 3000).flatmap(lambda q: st.tuples(st.just(q), st.integers(q, q + 5000))), min_size=1, max_size=12
    )
)
def test_any_batch_has_a_plan_inside_it(requests):
    num_tokens = sum(query_len for query_len, _ in requests)
    plan = plan_token_split(num_tokens, 0, LLAMA, 8, H100, requests=requests)
    assert all(us > 0 for us in plan.predicted_us.values())
    assert 0 < plan.split < num_tokens if plan.kind == "split" else plan.split == 0
    # Without communication nothing right comes out: that is no choice.
    modes = [mode for mode in plan.predicted_us if mode != "no_communication"]
    chosen = {"none": "reference", "fuse": "fused", "split": "weave"}[plan.kind]
    assert plan.predicted_us[chosen] == min(plan.predicted_us[mode] for mode in modes)


def test_one_request_is_the_same_however_it_is_given():
    by_context = plan_token_split(3000, 500, LLAMA, 8, H100)
    by_requests = plan_token_split(3000, 0, LLAMA, 8, H100, requests=[(3000, 3500)])
    assert by_context == by_requests
    assert by_context.predicted_us == by_requests.predicted_us


# ------------------------------------------------------------------------------------------------------------ agreement


def test_the_hash_is_that_of_the_decision():
    plan = SplitPlan(4096, "split", 1792, 8, 4, 16, "graph", {"weave": 1.0})
    assert plan.hash == replace(plan, predicted_us={"weave": 2.0}).hash
    assert plan.hash == replace(plan, launch="eager").hash  # how each rank launches is its own affair
    assert 0 <= plan.hash < 2**63
    others = {"num_tokens": 4097, "split": 1793, "attention_ctas": 4, "mlp_ctas": 8, "exposed_ctas": 32}
    hashes = {plan.hash} | {replace(plan, **{name: value}).hash for name, value in others.items()}
    hashes |= {replace(plan, kind=kind, split=0).hash for kind in ("none", "fuse")}
    assert len(hashes) == 1 + len(others) + 2


def test_equal_plans_of_numpy_integers_have_equal_hashes():
    plan = plan_token_split(4096, 100, LLAMA, 8, H100)
    for integer in (np.int64, np.int32, np.uint16):
        same = plan_token_split(integer(4096), integer(100), LLAMA, integer(8), H100)
        assert (same, same.hash, type(same.num_tokens)) == (plan, plan.hash, int)
        lengths = [(integer(96), integer(100)), (integer(4000), integer(4000))]
        by_requests = plan_token_split(4096, 0, LLAMA, 8, H100, requests=lengths)
        assert by_requests.hash == plan_token_split(4096, 0, LLAMA, 8, H100, requests=[(96, 100), (4000, 4000)]).hash
        assert replace(plan, split=integer(plan.split), mlp_ctas=integer(plan.mlp_ctas)).hash == plan.hash
        table = {4096: SplitOverride(integer(256), integer(8), integer(4))}
        overridden = plan_token_split(4096, 0, LLAMA, 8, H100, overrides=table)
        assert overridden.hash == replace(plan, split=2304, attention_ctas=8, mlp_ctas=4).hash


def test_another_process_plans_the_same():
    code = (
        "from tokenweave_ops.token_split import *\n"
        "plan = plan_token_split(5000, 77, ModelShape(8192, 28672, 80, 64, 8, 128, 128256), 8, H100)\n"
        "print(plan.hash, plan.split, plan.predicted_us['weave'])"
    )
    plan = plan_token_split(5000, 77, LLAMA, 8, H100)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "12345"}
    )
    assert done.stdout.split() == [str(plan.hash), str(plan.split), str(plan.predicted_us["weave"])], done.stderr


def test_no_device_is_asked(monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the planner asked a device")

    for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, asked)
    plan_token_split(2048, 0, LLAMA, 8, H100)


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_replace_the_decision():
    table = {1024: SplitOverride(0, 4, 2), 4096: SplitOverride(256, 8, 4)}
    plan = plan_token_split(3000, 0, LLAMA, 8, H100, overrides=table)  # 4096 is nearer
    assert (plan.split, plan.attention_ctas, plan.mlp_ctas) == (published_split(3000, 256)[1], 8, 4)
    assert plan_token_split(1500, 0, LLAMA, 8, H100, overrides=table).split == published_split(1500, 0)[1]
    assert plan_token_split(1000, 0, LLAMA, 8, H100, overrides=table).kind == "fuse"
    # Even where it loses: who gives a table has measured.
    assert plan_token_split(1024, 0, MIXTRAL, 8, H100, overrides=table).kind == "split"


def test_of_two_overrides_as_near_that_of_fewer_tokens_decides():
    table = {4096: SplitOverride(256, 8, 4), 2048: SplitOverride(128, 4, 2)}
    plan = plan_token_split(3072, 0, LLAMA, 8, H100, overrides=table)
    assert (plan.split, plan.attention_ctas, plan.mlp_ctas) == (published_split(3072, 128)[1], 4, 2)


def test_an_override_that_would_split_outside_the_batch_is_left_out():
    """A table for large batches, and one small batch: it must not stop a server."""
    table = {8192: SplitOverride(640, 4, 4)}
    assert plan_token_split(1100, 0, LLAMA, 8, H100, overrides=table) == plan_token_split(1100, 0, LLAMA, 8, H100)
    for num_tokens in (1024, 1100, 1280):  # 1280 tokens: the split would be at their end
        plan = plan_token_split(num_tokens, 0, LLAMA, 8, H100, overrides=table)
        assert plan == plan_token_split(num_tokens, 0, LLAMA, 8, H100)
    assert plan_token_split(1500, 0, LLAMA, 8, H100, overrides=table).split == 768 + 640
    assert plan_token_split(1023, 0, LLAMA, 8, H100, overrides=table).kind == "fuse"


def test_override_files(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"2048": {"offset": 128, "attention_ctas": 4, "mlp_ctas": 8}}))
    assert load_overrides(path) == {2048: SplitOverride(128, 4, 8)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object with at least one entry"),
        ("{}", "must be an object with at least one entry"),
        ('{"many": {"offset": 0, "attention_ctas": 4, "mlp_ctas": 4}}', "keys must be numbers of tokens, got 'many'"),
        ('{"1024": {"offset": 0, "attention_ctas": 4}}', r"1024: must have exactly the keys \['offset'"),
        (
            '{"1024": {"offset": -1, "attention_ctas": 4, "mlp_ctas": 4}}',
            "1024: SplitOverride: offset must be an integer of at least 0",
        ),
        (
            '{"1024": {"offset": 0, "attention_ctas": true, "mlp_ctas": 4}}',
            "attention_ctas must be an integer from 1 to",
        ),
        (
            '{"1024": {"offset": 0, "attention_ctas": 4, "mlp_ctas": 0}}',
            "mlp_ctas must be an integer from 1 to 128, got 0",
        ),
        (
            '{"1024": {"offset": 0, "attention_ctas": 129, "mlp_ctas": 4}}',
            "attention_ctas must be an integer from 1 to 128, got 129",
        ),
    ],
)
def test_bad_override_files(tmp_path, text, words):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{words}"):
        load_overrides(path)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0, 0, LLAMA, 8, H100), {}, "plan_token_split: num_tokens must be an integer of at least 1, got 0"),
        ((100.5, 0, LLAMA, 8, H100), {}, "plan_token_split: num_tokens must be an integer of at least 1, got 100.5"),
        ((True, 0, LLAMA, 8, H100), {}, "plan_token_split: num_tokens must be an integer of at least 1, got True"),
        (
            (float("nan"), 0, LLAMA, 8, H100),
            {},
            "plan_token_split: num_tokens must be an integer of at least 1, got nan",
        ),
        ((8, -1, LLAMA, 8, H100), {}, "plan_token_split: context must be an integer of at least 0, got -1"),
        ((8, 0.5, LLAMA, 8, H100), {}, "plan_token_split: context must be an integer of at least 0, got 0.5"),
        ((8, 0, LLAMA, 0, H100), {}, "ModelShape: world_size must be an integer of at least 1, got 0"),
        ((8, 0, LLAMA, True, H100), {}, "ModelShape: world_size must be an integer of at least 1, got True"),
        ((8, 0, LLAMA, 6, H100), {}, "ModelShape: world_size 6 must divide num_heads=64"),
        ((8, 0, LLAMA, 16, H100), {}, "ModelShape: world_size 16 must divide num_kv_heads=8"),
        (
            (8, 0, LLAMA, 8, H100),
            {"launch": "lazy"},
            "plan_token_split: launch must be one of graph, eager, got 'lazy'",
        ),
        (
            (8, 0, LLAMA, 8, H100),
            {"requests": [(8.0, 8)]},
            r"requests\[0\]: query_len must be an integer of at least 1",
        ),
        (
            (8, 0, LLAMA, 8, H100),
            {"requests": [(7, 7), (1, True)]},
            r"requests\[1\]: kv_len must be an integer of at le",
        ),
        ((8, 0, LLAMA, 8, H100), {"requests": [(4, 4)]}, "requests must have num_tokens=8 queries together, got 4"),
        (
            (8, 0, LLAMA, 8, H100),
            {"requests": [(8, 7)]},
            r"requests\[0\]: kv_len must be an integer of at least 8, got 7",
        ),
        ((8, 5, LLAMA, 8, H100), {"requests": [(8, 9)]}, "context must be 0 where requests are given, got 5"),
    ],
)
def test_bad_arguments(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        plan_token_split(*arguments, **options)


def test_bad_shapes():
    with pytest.raises(ValueError, match="ModelShape: hidden must be an integer of at least 1, got 0"):
        replace(LLAMA, hidden=0)
    with pytest.raises(ValueError, match=r"ModelShape: experts_per_token must be in \[1, num_experts=8\]"):
        replace(MIXTRAL, experts_per_token=9)
    with pytest.raises(ValueError, match="ModelShape: num_kv_heads must divide num_heads=64, got 7"):
        replace(LLAMA, num_kv_heads=7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "half"}, "kind must be one of none, fuse, split, got 'half'"),
        ({"launch": "lazy"}, "launch must be one of graph, eager, got 'lazy'"),
        ({"kind": "none"}, "split must be 0 where kind is 'none', got 5"),
        ({"kind": "fuse"}, "split must be 0 where kind is 'fuse', got 5"),
        ({"split": 0}, "split must be inside the batch, 1 to 11, got 0"),
        ({"split": 12}, "split must be inside the batch, 1 to 11, got 12"),
        ({"split": 2.5}, "split must be an integer of at least 0, got 2.5"),
        ({"mlp_ctas": -1}, "mlp_ctas must be an integer of at least 0, got -1"),
        ({"num_tokens": 0}, "num_tokens must be an integer of at least 1, got 0"),
    ],
)
def test_plans_that_contradict_themselves(changes, words):
    plan = SplitPlan(12, "split", 5, 4, 2, 16, "eager", {})
    with pytest.raises(ValueError, match=f"^SplitPlan: {words}"):
        replace(plan, **changes)


def test_a_pass_that_is_not_split_has_no_halves():
    with pytest.raises(ValueError, match="weave_pass: plan must be a split, got kind 'fuse'"):
        weave_pass(plan_token_split(16, 0, LLAMA, 8, H100), 0, LLAMA, 8, H100)


def test_nothing_hides_where_the_collective_takes_the_only_core():
    """CPU ranks of one core that sum through memory: split, they would compute and communicate in turn."""
    sleeping = plan_token_split(1024, 0, TINY, 2, CPU)
    assert sleeping.kind == "split"
    summing = plan_token_split(1024, 0, TINY, 2, replace(CPU, link=replace(CPU.link, sms_per_cta=1)))
    assert summing.kind == "fuse"
    assert summing.predicted_us["weave"] > summing.predicted_us["fused"]
    assert summing.predicted_us["fused"] == sleeping.predicted_us["fused"]


GEMMS = ((7168, 8192), (8192, 3584))


@pytest.mark.parametrize("num_tokens", range(1024, 3841, 256))
def test_a_gemm_split_is_the_fastest_of_all_and_the_most_even_of_the_fastest(num_tokens):
    def both_halves_us(split):
        return sum(gemm_us(rows, *gemm, H100) for rows in (split, num_tokens - split) for gemm in GEMMS)

    candidates = [s for s in range(64, num_tokens, 64) if min(s, num_tokens - s) >= 0.37 * num_tokens]
    best_us = min(map(both_halves_us, candidates))
    as_good = [s for s in candidates if both_halves_us(s) <= 1.001 * best_us]
    found = plan_gemm_split(num_tokens, GEMMS, H100)
    assert found in as_good
    assert abs(2 * found - num_tokens) == min(abs(2 * s - num_tokens) for s in as_good)


def test_rows_that_cannot_be_split():
    assert plan_gemm_split(64, GEMMS, H100) is None
    with pytest.raises(ValueError, match="plan_gemm_split: num_tokens must be an integer of at least 1, got 0"):
        plan_gemm_split(0, GEMMS, H100)
    with pytest.raises(ValueError, match="plan_gemm_split: gemms must hold at least one .features, inner size., got"):
        plan_gemm_split(1000, [], H100)
