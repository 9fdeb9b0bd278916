"""The emulated link of CPU ranks: a call takes at least the link's time, whatever else happens, and the rank sleeps.

Times are compared with lower bounds, which the contract promises; upper bounds only say "at once" or "no hang"."""

from __future__ import annotations

import math
import os
import signal
import time

import pytest

from tokenweave_ops import Workspace, _library, testing
from tokenweave_ops._emulated_link import EmulatedLink

pytestmark = pytest.mark.skipif(_library.load_library("cpu") != "loaded", reason="needs the CPU kernels")

NUM_TOKENS, OP_BYTES = 64, 64 * 512 * 2  # of the bf16 workspaces here


def speed_for(link_s: float, world_size: int = 2) -> float:
    """In GB/s, such that a call of NUM_TOKENS takes link_s."""
    return OP_BYTES * (1 + 1 / world_size) / link_s / 1e9


@pytest.fixture(scope="module")
def pair(start_shared):
    return start_shared(2)


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_time_of_a_call():
    link = EmulatedLink(gigabytes_per_s=2.0, latency_us=5.0)
    assert link.occupied_us(8_000_000, world_size=4) == 5.0 + 8_000_000 * 1.25 / 2_000
    assert link.gather_us(8_000_000, world_size=4) == 5.0 + 4_000
    assert link.occupied_us(0, world_size=2) == 5.0
    assert link.occupied_us(8_000_000, world_size=1) == link.gather_us(8_000_000, world_size=1) == 0.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("op_bytes", [0, 16, 123_456_784, 2**40])
@pytest.mark.parametrize(("gigabytes_per_s", "latency_us"), [(1.0, 0.0), (0.3, 2.5), (450.0, 30_000.0)])
def test_the_kernel_has_the_same_model(gigabytes_per_s, latency_us, op_bytes, world_size):
    host = testing.host()
    link = EmulatedLink(gigabytes_per_s, latency_us)
    for is_gather, expected_us in (
        (False, link.occupied_us(op_bytes, world_size)),
        (True, link.gather_us(op_bytes, world_size)),
    ):
        ns = host.link_ns(gigabytes_per_s, latency_us, is_gather, op_bytes, world_size)
        assert 0 <= ns - expected_us * 1e3 <= 1 + expected_us * 1e-9


def test_an_absurd_link_does_not_wrap_around():
    host = testing.host()
    assert host.link_ns(1e-300, 0.0, False, 2**40, 2) == 10**16 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "EmulatedLink: gigabytes_per_s must be positive and finite, got 0.0"),
        ((-1.0,), "gigabytes_per_s must be positive and finite, got -1.0"),
        ((math.nan,), "gigabytes_per_s must be positive and finite, got nan"),
        ((math.inf,), "gigabytes_per_s must be positive and finite, got inf"),
        ((1.0, -1.0), "EmulatedLink: latency_us must be finite and at least 0, got -1.0"),
        ((1.0, math.inf), "latency_us must be finite and at least 0, got inf"),
    ],
)
def test_a_link_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmulatedLink(*arguments)


# ---------------------------------------------------------------------------------------------------------- who has one


def test_virtual_ranks_have_none():
    with pytest.raises(ValueError, match="link must be None for virtual ranks.* got emulated link of 1 GB/s, 0 us"):
        Workspace.virtual(2, 8, 64, link=EmulatedLink(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": 3}, "Workspace: link must be an EmulatedLink or None, got 3"),
        ({"link": {"gigabytes_per_s": 2}, "device": "cuda"}, "link must be None on cuda, whose links are real"),
    ],
)
def test_a_workspace_that_cannot_have_one(pair, options, message):
    """On one rank; the other is told."""
    pair.start(0, "open")
    pair.start(1, "open", **options)
    for rank in range(2):
        answer = pair.answer(rank)
        assert answer["error"] == "ValueError" and message in answer["text"], answer


def test_all_ranks_have_the_same(pair):
    for rank in range(2):
        pair.start(rank, "open", link={"gigabytes_per_s": 1 + rank, "latency_us": 2})
    for rank in range(2):
        answer = pair.answer(rank)
        assert answer["error"] == "ValueError", answer
        assert "Workspace: link must be the same on all ranks, got EmulatedLink(" in answer["text"]


def test_it_is_named(pair):
    for text in pair.succeed("open", link={"gigabytes_per_s": 1.5, "latency_us": 20}):
        assert text.endswith("emulated link of 1.5 GB/s, 20 us")
    for text in pair.succeed("open"):
        assert "link" not in text


# ---------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("op", ["allreduce_", "allreduce", "gather_residual_"])
def test_a_call_takes_the_time_of_the_link_and_no_processor(pair, op):
    pair.succeed("open", link={"gigabytes_per_s": speed_for(0.2), "latency_us": 50_000})
    for times in pair.succeed("timed", num_tokens=NUM_TOKENS, op=op):
        assert times["link_s"] == pytest.approx(0.05 + 0.2 / (1.5 if op == "gather_residual_" else 1.0))
        assert times["wall_s"] >= times["link_s"]
        assert times["cpu_s"] < times["link_s"] / 5


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_values_are_those_without(pair, dtype):
    pair.succeed("open", dtype="fp32", link={"gigabytes_per_s": 0.1, "latency_us": 100})
    pair.succeed("values", dtype=dtype, hidden=256, num_tokens=31)


def test_two_channels_share_the_link(pair):
    pair.succeed("open", max_tokens=2 * NUM_TOKENS, link={"gigabytes_per_s": speed_for(0.2)})
    for first_s, second_s in pair.succeed("timed_on_two_channels", num_tokens=NUM_TOKENS):
        assert first_s >= 0.2 and second_s >= 0.4


def test_the_deadline_does_not_count_the_link(pair):
    pair.succeed("open", timeout_s=0.3, link={"gigabytes_per_s": speed_for(0.5)})
    pair.succeed("allreduce", num_tokens=1)
    pair.succeed("allreduce", num_tokens=1)  # the first calls have ten times the deadline
    for times in pair.succeed("timed", num_tokens=NUM_TOKENS):
        assert times["wall_s"] >= 0.5


def test_a_peer_that_does_not_come_is_no_link(pair):
    pair.succeed("open", timeout_s=0.3, link={"gigabytes_per_s": speed_for(0.2)})
    pair.succeed("allreduce", num_tokens=1)
    (answer,) = pair.run("allreduce", [0])
    assert answer["error"] == "CommunicationTimeout" and "rank 0 waited 0.3 s for rank 1" in answer["text"], answer


def test_other_python_threads_run_meanwhile(pair):
    pair.succeed("open", link={"gigabytes_per_s": speed_for(0.3)})
    assert min(pair.succeed("counted_meanwhile", num_tokens=NUM_TOKENS)) > 10_000


def test_one_cta_is_one_thread(pair):
    """What drives collectives beside the computation must not bring a team of threads of its own."""
    pair.succeed("open", max_tokens=1024)
    assert pair.succeed("threads_of_a_call", num_tokens=1024, max_ctas=1) == [0, 0]
    assert pair.succeed("threads_of_a_call", num_tokens=1024, max_ctas=0) == [2, 2]


# ----------------------------------------------------------------------------------------------- while the link is busy


def test_a_killed_peer_is_noticed(start):
    pair = start(2)
    pair.succeed("open", link={"gigabytes_per_s": speed_for(30)})
    for rank in range(2):
        pair.start(rank, "allreduce", num_tokens=NUM_TOKENS)
    time.sleep(0.3)  # both are asleep in the call by now
    killed_s = time.perf_counter()
    os.kill(pair.pids[1], signal.SIGKILL)
    answer = pair.answer(0)
    assert time.perf_counter() - killed_s < 5
    assert answer["error"] == "PeerLost" and "the process of rank 1 has ended" in answer["text"], answer
    assert answer["nan_rows"] == NUM_TOKENS // 2, "the rows of rank 1 have not arrived"


def test_an_interrupt_is_noticed(start):
    pair = start(2)
    pair.succeed("open", link={"gigabytes_per_s": speed_for(30)})
    for rank in range(2):
        pair.start(rank, "allreduce", num_tokens=NUM_TOKENS)
    time.sleep(0.3)
    sent_s = time.perf_counter()
    os.kill(pair.pids[0], signal.SIGINT)
    answers = [pair.answer(rank) for rank in range(2)]
    assert time.perf_counter() - sent_s < 5
    assert answers[0]["error"] == "KeyboardInterrupt", answers[0]
    assert answers[1]["error"] == "CommunicationError" and "rank 0 was interrupted" in answers[1]["text"], answers[1]
    pair.succeed("reset")
    assert pair.succeed("allreduce", num_tokens=1) == [2.0, 2.0], "the link is free again"
