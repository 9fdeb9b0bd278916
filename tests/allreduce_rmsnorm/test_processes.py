"""Ranks as real processes of one host: values, and every way in which a rank can fail the others. Nothing may hang:
each answer has a deadline, and what is still there afterwards is killed."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tokenweave_ops import _library

pytestmark = pytest.mark.skipif(_library.load_library("cpu") != "loaded", reason="needs the CPU kernels")


@pytest.fixture(scope="module", params=[2, 4], ids=["W2", "W4"])
def shared(request, start_shared):
    """Processes that scenarios without casualties share, since starting them takes seconds."""
    processes = start_shared(request.param)
    yield processes
    processes.end()


@pytest.fixture
def group(shared):
    shared.succeed("open", timeout_s=20)
    return shared


def errors(answers, name, pattern):
    for answer in answers:
        assert answer.get("error") == name, answer
        assert re.search(pattern, answer["text"]), answer["text"]


# ------------------------------------------------------------------------------------------------------------- it works


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 64), (1, 520), (31, 8), (7, 512), (64, 256)])
def test_processes_and_virtual_ranks_give_the_same_bits(shared, dtype, num_tokens, hidden):
    if shared.succeed("nothing") and getattr(shared, "opened_with", None) != "fp32":
        shared.succeed("open", dtype="fp32")
        shared.opened_with = "fp32"
    shared.succeed("values", dtype=dtype, hidden=hidden, num_tokens=num_tokens)


def test_ten_thousand_calls_of_mixed_sizes(group):
    group.succeed("many_calls", calls=10_000)


def test_stragglers(group):
    group.succeed("stragglers", calls=40)


def test_two_threads_on_two_channels(group):
    group.succeed("two_channels_at_once", calls=300)


def test_groups_within_the_world(shared):
    halves = [[1.0, 0], [1.0, 1], [5.0, 0], [5.0, 1]]
    assert shared.succeed("halves") == halves[: shared.world_size]


def test_the_smallest_capacity_counts(shared):
    for rank in range(shared.world_size):
        shared.start(rank, "open", max_tokens=64 if rank else 8, num_channels=2 if rank else 1)
    texts = [shared.answer(rank)["result"] for rank in range(shared.world_size)]
    assert all("8 KiB of buffer and 1 x 8 KiB of staging" in text for text in texts)


# ----------------------------------------------------------------------------------------------------- a rank is wrong


def works(group) -> bool:
    return group.succeed("allreduce") == [float(group.world_size)] * group.world_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 7}, "came with another op, num_tokens, hidden, dtype, eps, weight_bias, max_ctas or tag"),
        ({"dtype": "fp16"}, "came with another op, num_tokens, hidden, dtype"),
        ({"offset_bytes": 64}, "has its tensor at byte (0|64) of the workspace, rank . at byte (0|64)"),
    ],
    ids=["tokens", "dtype", "offset"],
)
def test_ranks_that_disagree_all_raise_and_go_on(group, arguments, message):
    for rank in range(group.world_size):
        group.start(rank, "allreduce", **(arguments if rank == 1 else {}))
    answers = [group.answer(rank) for rank in range(group.world_size)]
    errors(answers, "RankDisagreement", message)
    assert all(answer["nan_rows"] == 0 for answer in answers), "nothing may have been written"
    assert works(group), "after a disagreement the ranks are still in step"


def test_another_op_is_a_disagreement(group):
    for rank in range(group.world_size):
        group.start(rank, "gather" if rank == 0 else "allreduce")
    errors([group.answer(rank) for rank in range(group.world_size)], "RankDisagreement", "came with another op")
    assert works(group)


def test_a_bad_argument_on_one_rank(group):
    for _ in range(3):
        for rank in range(group.world_size):
            group.start(rank, "bad_argument" if rank == 1 else "allreduce", **({} if rank == 1 else {"delay_s": 0.01}))
        answers = [group.answer(rank) for rank in range(group.world_size)]
        errors([answers.pop(1)], "RuntimeError", "x must lie in the workspace's buffer")
        errors(answers, "RankDisagreement", "rank 1 refused its call because of a bad argument")
    assert works(group)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("mode", "ValueError", "residual_mode must be"),
        ("grad", "RuntimeError", "an input requires grad"),
        ("eps", "RuntimeError", "eps"),
        ("meta", "RuntimeError", "must be on the device of"),
        ("none", "RuntimeError", "residual must be a tensor with memory of its own, got None"),
        ("memory", "RuntimeError", "must fit the workspace's staging"),
    ],
)
def test_whoever_refuses_an_argument_the_others_are_told(group, kind, error, text):
    """Python's own checks, the dispatcher's, the op's: the peers learn of all of them."""
    for rank in range(group.world_size):
        group.start(rank, "bad_argument" if rank == 1 else "allreduce", **({"kind": kind} if rank == 1 else {}))
    answers = [group.answer(rank) for rank in range(group.world_size)]
    errors([answers.pop(1)], error, text)
    errors(answers, "RankDisagreement", "rank 1 refused its call because of a bad argument")
    assert all(answer["waited_s"] < 5 for answer in answers)
    assert works(group)


def test_a_bad_argument_on_all_ranks(group):
    errors(group.run("bad_argument"), "RuntimeError", "x must lie in the workspace's buffer")
    assert works(group)


def test_a_rank_that_does_not_come(shared):
    shared.succeed("open", timeout_s=0.3)
    assert works(shared)  # the first call has ten times the time
    others = [rank for rank in range(shared.world_size) if rank != 1]
    answers = shared.run("allreduce", others)
    errors(answers, "CommunicationTimeout", r"rank \d (waited 0.3 s for|gave up waiting for) rank 1.*entry")
    assert all(answer["waited_s"] < 5 and answer["nan_rows"] == 0 for answer in answers)
    errors(shared.run("allreduce", others), "CommunicationTimeout", r"the workspace does not work, reset\(\) it")
    errors(shared.run("allreduce", [1]), "CommunicationTimeout", "gave up waiting for rank 1")
    assert shared.succeed("reset") == [2] * shared.world_size
    assert works(shared)


def test_a_rank_that_has_closed_its_workspace(group):
    group.succeed("close", ranks=[1])
    others = [rank for rank in range(group.world_size) if rank != 1]
    answers = group.run("allreduce", others)
    errors(answers, "PeerLost", r"rank 1 has closed its workspace")
    assert all(answer["waited_s"] < 5 for answer in answers)


def test_closing_under_a_waiting_thread(group):
    (raised,) = group.succeed("close_while_waiting", ranks=[0])
    assert len(raised) == 1 and "closed its workspace" in raised[0]


def test_closing_in_a_signal_handler(group):
    """The handler runs inside the waiting op: close() must not wait for the frame that it stands on."""
    (answer,) = group.run("close_in_a_handler", ranks=[0])
    assert answer["error"] == "PeerLost" and "closed its workspace" in answer["text"], answer
    group.succeed("close")


def test_a_peer_that_cannot_be_reached(shared):
    """The probe finds it on all ranks, before anybody waits for anybody."""
    for rank in range(shared.world_size):
        shared.start(rank, "open_with_a_peer_out_of_reach" if rank == 1 else "open")
    answers = [shared.answer(rank) for rank in range(shared.world_size)]
    errors(answers, "CommunicationError", r"probe of the own memory failed on .*what rank \d wrote has not arrived")


def test_memory_is_given_back_after_a_failed_start(shared):
    shared.succeed("close")
    before = shared.succeed("memory")
    for rank in range(shared.world_size):  # more than there is, on one rank
        shared.start(rank, "held_memory_after_failures", max_tokens=2**42 if rank == 1 else 64)
    after = [shared.answer(rank).get("result") for rank in range(shared.world_size)]
    assert after == before


def test_one_rank_with_an_impossible_workspace(shared):
    for rank in range(shared.world_size):
        shared.start(rank, "open", timeout_s=0 if rank == 1 else 5)
    for rank in range(shared.world_size):
        text = "Workspace: timeout_s must be 0.001 to 1e+06, got 0"
        errors(
            [shared.answer(rank)], "ValueError", re.escape(text if rank == 1 else f"Workspace: rank 1 refused: {text}")
        )
    shared.opened_with = None
    assert shared.succeed("open") and works(shared)


def test_nothing_is_left_behind(group):
    group.succeed("close")
    assert group.succeed("memory") == [[0, 0]] * group.world_size


# ---------------------------------------------------------------------------------------------------- a rank is no more


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_killed_process_is_named_at_once(start, world_size):
    shared_memory = set(os.listdir("/dev/shm"))
    group = start(world_size)
    group.succeed("open", timeout_s=30)
    assert works(group)
    survivors = [rank for rank in range(world_size) if rank != 1]
    for rank in survivors:
        group.start(rank, "allreduce")
    time.sleep(0.3)  # they are asleep in the call by now
    killed = time.perf_counter()
    os.kill(group.pids[1], signal.SIGKILL)
    answers = [group.answer(rank) for rank in survivors]
    took_s = time.perf_counter() - killed
    errors(answers, "PeerLost", "the process of rank 1 has ended")
    assert took_s < 2.0, f"it took {took_s:.2f} s"
    errors(group.run("allreduce", survivors), "PeerLost", "the workspace does not work")
    group.end()
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_interrupt_while_waiting(start):
    """Ctrl-C in one rank: KeyboardInterrupt there, an error that says so on the others, at once."""
    group = start(2)
    group.succeed("open", timeout_s=30)
    assert works(group)
    group.start(0, "allreduce")
    time.sleep(0.3)
    sent = time.perf_counter()
    os.kill(group.pids[0], signal.SIGINT)
    errors([group.answer(0)], "KeyboardInterrupt", "")
    assert time.perf_counter() - sent < 2.0
    errors(group.run("allreduce", [1]), "CommunicationError", "rank 0 was interrupted")
    group.succeed("reset")
    assert works(group)


def test_interrupt_in_compiled_code(start):
    """A RuntimeError there; and the KeyboardInterrupt does not come up at the next error instead."""
    group = start(2)
    group.succeed("open", timeout_s=30)
    group.succeed("compiled")
    group.start(0, "compiled")
    time.sleep(0.5)
    os.kill(group.pids[0], signal.SIGINT)
    errors([group.answer(0)], "RuntimeError", "rank 0 was interrupted while it waited for rank 1")
    errors(group.run("allreduce", [1]), "CommunicationError", "rank 0 was interrupted")
    group.succeed("reset")
    errors(group.run("bad_argument"), "RuntimeError", "x must lie in the workspace's buffer")
    assert works(group)
