"""Signals through memory: missing releases and acquires change a result, correct ones never, and no wait is endless."""

import time
from enum import IntEnum

import numpy as np
import pytest

# In the order of tests/simt/kernels/signals.cuh.
Publish = IntEnum(
    "Publish",
    "release_sys relaxed fence_then_relaxed release_gpu add_release add_relaxed cas_release cas_relaxed "
    "release_without_barrier release_after_sync_warp",
    start=0,
)
Consume = IntEnum(
    "Consume",
    "acquire_sys relaxed relaxed_then_fence acquire_gpu add_acquire cas_acquire cas_relaxed",
    start=0,
)
Wait = IntEnum(
    "Wait",
    "with_deadline without_deadline spin_load spin_cas spin_sleep spin_deadlines poll_meets",
    start=0,
)


@pytest.fixture
def message(kernels, simt, peer_memory, group):
    """One rank produces data and raises a flag, the other waits and sums; on one rank: two launches side by side."""

    def send(publish, consume, block=64):
        data, flag, out = np.zeros((block, 4), np.uint32), np.zeros(4, np.uint32), np.zeros(block, np.uint32)
        with peer_memory(data, flag), group():
            simt.set_rank(0)
            kernels.signals.produce(data, flag, 5, publish, block)
            simt.set_rank(1)
            kernels.signals.consume(data, flag, out, 5, consume, block)
        return np.array_equal(out, 20 + np.arange(block))

    return send


CORRECT = [
    (Publish.release_sys, Consume.acquire_sys, 64),
    (Publish.release_sys, Consume.relaxed_then_fence, 64),
    (Publish.release_sys, Consume.add_acquire, 256),
    (Publish.fence_then_relaxed, Consume.acquire_sys, 64),
    (Publish.add_release, Consume.cas_acquire, 64),
    (Publish.cas_release, Consume.acquire_sys, 32),
    (Publish.release_after_sync_warp, Consume.acquire_sys, 32),
]
BROKEN = [
    (Publish.relaxed, Consume.acquire_sys, 64),
    (Publish.add_relaxed, Consume.acquire_sys, 64),
    (Publish.cas_relaxed, Consume.acquire_sys, 64),
    (Publish.release_without_barrier, Consume.acquire_sys, 64),
    (Publish.release_without_barrier, Consume.acquire_sys, 32),
    (Publish.release_gpu, Consume.acquire_sys, 64),
    (Publish.release_sys, Consume.relaxed, 64),
    (Publish.release_sys, Consume.cas_relaxed, 64),
    (Publish.release_sys, Consume.acquire_gpu, 64),
    (Publish.relaxed, Consume.relaxed, 64),
]


def case_name(value):
    return value.name if isinstance(value, IntEnum) else None


@pytest.mark.parametrize("publish, consume, block", CORRECT, ids=case_name)
def test_ordered_message_always_arrives(message, seeds, publish, consume, block):
    """Cumulative release among them: every thread writes, a barrier follows, thread 0 alone releases."""
    seeds.never(lambda: message(publish, consume, block))
    seeds.never(lambda: message(publish, consume, block), 20, hold_back_percent=100)


@pytest.mark.parametrize("publish, consume, block", BROKEN, ids=case_name)
def test_unordered_message_is_found(message, seeds, publish, consume, block):
    seeds.found(lambda: message(publish, consume, block))


def test_without_held_stores_and_stale_loads_nothing_is_found(message, seeds):
    """The memory model finds these, not the schedule: with it switched off a missing release looks right."""
    seeds.never(lambda: message(Publish.relaxed, Consume.relaxed), 20, hold_back_percent=0)


def test_memory_counters_grow(message, simt):
    before = simt.counters()
    for seed in range(10):
        simt.set_options(seed=seed)
        message(Publish.release_sys, Consume.relaxed)
    after = simt.counters()
    assert after["held_stores"] > before["held_stores"]
    assert after["stale_loads"] > before["stale_loads"]


@pytest.fixture
def all_to_all(kernels, simt, peer_memory, group):
    def exchange(ranks, grid, block, late_ns=0, release=True, acquire=True):
        buffers = [np.zeros((ranks, grid, block), np.uint32) for _ in range(ranks)]
        pads = [np.zeros((grid, ranks), np.uint32) for _ in range(ranks)]
        outs = [np.zeros((grid, block), np.uint32) for _ in range(ranks)]
        ok = np.ones(1, np.uint32)
        with peer_memory(*buffers, *pads), group():
            for rank in range(ranks):
                simt.set_rank(rank)
                late = late_ns if rank == 1 else 0
                kernels.signals.all_to_all(buffers, pads, outs[rank], ok, rank, grid, block, late, release, acquire)
        expected = ranks * np.arange(grid * block) + 1000 * sum(range(ranks))
        return ok[0] == 1 and all(np.array_equal(out.ravel(), expected) for out in outs)

    return exchange


@pytest.mark.parametrize("ranks, grid", [(2, 3), (4, 2), (8, 1)])
def test_ranks_signal_each_other(all_to_all, seeds, ranks, grid):
    seeds.never(lambda: all_to_all(ranks, grid, 64), 40)
    seeds.never(lambda: all_to_all(ranks, grid, 64, late_ns=500_000_000), 10)
    seeds.found(lambda: all_to_all(ranks, grid, 64, release=False))
    seeds.found(lambda: all_to_all(ranks, grid, 64, acquire=False))


def test_rank_that_is_too_late_passes_the_deadline(all_to_all):
    start = time.perf_counter()
    assert not all_to_all(2, 2, 64, late_ns=4_000_000_000)
    assert time.perf_counter() - start < 1.0


def test_launches_of_a_rank_run_in_order(kernels, simt, group, seeds):
    """A stream: the second launch of a rank reads what the first wrote, while another rank runs beside it."""

    def check():
        data = np.random.default_rng(0).random((2, 4, 64), dtype=np.float32)
        middle, out = np.full_like(data, np.nan), np.full_like(data, np.nan)
        with group():
            for rank in (0, 1):
                simt.set_rank(rank)
                kernels.barriers.reverse(data[rank], middle[rank], 4, 64, 1, 0)
                kernels.barriers.reverse(middle[rank], out[rank], 4, 64, 1, 0)
        return np.array_equal(out, data)

    seeds.never(check, 20)


def test_fault_ends_the_group_and_names_the_rank(kernels, simt):
    simt.begin_group()
    simt.set_rank(1)
    kernels.barriers.barrier_fault(0)
    simt.set_rank(3)
    kernels.barriers.barrier_fault(1)
    with pytest.raises(simt.Fault, match="kernel 'barrier_fault', rank 3, block"):
        simt.run_group()
    kernels.barriers.barrier_fault(0)


def test_missing_rank_is_a_hang(kernels, simt):
    data, flag, out = np.zeros((64, 4), np.uint32), np.zeros(4, np.uint32), np.zeros(64, np.uint32)
    simt.begin_group()
    simt.set_rank(0)
    kernels.barriers.barrier_fault(0)
    simt.set_rank(1)
    kernels.signals.consume(data, flag, out, 5, Consume.acquire_sys, 64)
    message = "hang.*1 thread of rank 1 in wait_until .*63 threads of rank 1 at a block barrier"
    with pytest.raises(simt.Fault, match=message):
        simt.run_group()


GridBarrier = IntEnum("GridBarrier", "none relaxed ordered", start=0)


@pytest.fixture
def grid_barrier(kernels, peer_memory):
    def run(grid, block, rounds, barrier, cooperative=True, peer=False):
        cells, counter, out = np.zeros(grid, np.uint32), np.zeros(1, np.uint32), np.zeros(grid, np.uint32)
        with peer_memory(*([cells, counter] if peer else [])):
            kernels.signals.grid_barrier(cells, counter, out, grid, block, rounds, barrier, cooperative)
        return bool((out == rounds * (rounds + 1) // 2).all())

    return run


@pytest.mark.parametrize("peer", [False, True], ids=["plain_memory", "peer_memory"])
def test_grid_barrier_of_a_cooperative_launch(grid_barrier, seeds, peer):
    seeds.never(lambda: grid_barrier(24, 64, 3, GridBarrier.ordered, peer=peer), 50)
    seeds.found(lambda: grid_barrier(24, 64, 3, GridBarrier.none, peer=peer))


def test_grid_barrier_without_order_is_found(grid_barrier, seeds):
    """Within one rank too: blocks that meet without release and acquire read what is old."""
    seeds.found(lambda: grid_barrier(24, 64, 3, GridBarrier.relaxed, peer=True))


def test_grid_barrier_without_a_cooperative_launch_hangs(grid_barrier, simt):
    with pytest.raises(simt.Fault, match=r"hang, no thread can make progress; 4 threads in wait_until \["):
        grid_barrier(24, 64, 1, GridBarrier.ordered, cooperative=False)


def test_cooperative_launch_that_cannot_be_resident(grid_barrier, simt):
    assert grid_barrier(2, 32, 1, GridBarrier.ordered)
    with pytest.raises(
        simt.Fault, match="1048576 threads must be resident at once, the emulator has stacks for [0-9]+"
    ):
        grid_barrier(1024, 1024, 1, GridBarrier.ordered)


@pytest.fixture
def wait_in_vain(kernels):
    def wait(how):
        elapsed, result = np.zeros(1, np.uint64), np.full(1, 7, np.uint32)
        kernels.signals.wait_in_vain(np.zeros(2, np.uint32), elapsed, result, how)
        return int(elapsed[0]), int(result[0])

    return wait


def test_deadline_passes_in_virtual_time(wait_in_vain):
    start = time.perf_counter()
    elapsed_ns, result = wait_in_vain(Wait.with_deadline)
    assert time.perf_counter() - start < 0.5
    assert result == 0
    assert 1_000_000_000 < elapsed_ns < 1_100_000_000


def test_wait_without_deadline_is_a_hang(wait_in_vain, simt):
    message = (
        r"^kernel 'wait_in_vain': hang, no thread can make progress; 4 threads in wait_until "
        r"\[simt/kernels/signals\.cuh:\d+\]: block 0 thread 0, block 0 thread 32, block 1 thread 0, \.\.\.$"
    )
    with pytest.raises(simt.Fault, match=message):
        wait_in_vain(Wait.without_deadline)


@pytest.mark.parametrize("how", [Wait.spin_load, Wait.spin_cas, Wait.spin_sleep, Wait.spin_deadlines], ids=case_name)
def test_spinning_outside_wait_until(wait_in_vain, simt, how):
    simt.set_options(switches_without_progress=20_000)
    message = (
        r"kernel 'wait_in_vain', block [01], thread \d+: spins outside wait_until: .*\[simt/kernels/signals\.cuh:\d+\]"
    )
    with pytest.raises(simt.Fault, match=message):
        wait_in_vain(how)


def test_spinning_is_found_with_the_default_options(wait_in_vain, simt):
    with pytest.raises(simt.Fault, match="spins outside wait_until"):
        wait_in_vain(Wait.spin_load)


def test_poll_must_not_meet_other_threads(wait_in_vain, simt):
    with pytest.raises(simt.Fault, match="a poll of wait_until must not meet other threads"):
        wait_in_vain(Wait.poll_meets)


@pytest.mark.parametrize("percent", [0, 75, 100])
def test_thread_reads_its_own_stores(kernels, peer_memory, seeds, percent):
    """Held back or not, whole or in parts; and at the end memory holds the last of them."""

    def check():
        memory, errors = np.zeros((64, 4), np.uint32), np.zeros(1, np.uint32)
        with peer_memory(memory):
            kernels.signals.read_own_writes(memory, errors, 64, 8)
        return errors[0] == 0 and (memory == [8, 108, 208, 315]).all()

    seeds.never(check, 20, hold_back_percent=percent)


def test_stale_loads_never_go_back(kernels, simt, peer_memory, seeds):
    def check():
        word, errors = np.zeros(4, np.uint32), np.zeros(1, np.uint32)
        with peer_memory(word):
            kernels.signals.coherence(word, errors, 30)
        return errors[0] == 0 and word[0] == 30

    before = simt.counters()["stale_loads"]
    seeds.never(check, 40)
    assert simt.counters()["stale_loads"] > before
