"""Faults of barriers, exchanges and shared memory: each is found in a broken kernel and not in its correct twin."""

import re

import numpy as np
import pytest

BOTH, NOT_AFTER_WRITE, NOT_AFTER_READ = range(3)


def reverse(kernels, grid, block, rounds, barriers):
    data = np.random.default_rng(0).random((grid, block), dtype=np.float32)
    out = np.full_like(data, np.nan)
    kernels.barriers.reverse(data, out, grid, block, rounds, barriers)
    return np.array_equal(out, data[:, ::-1] if rounds % 2 else data)


@pytest.mark.parametrize("grid, block", [(1, 64), (6, 256), (3, 96)])
def test_removed_barrier_changes_the_result(kernels, seeds, grid, block):
    seeds.found(lambda: reverse(kernels, grid, block, 3, NOT_AFTER_WRITE))
    seeds.found(lambda: reverse(kernels, grid, block, 3, NOT_AFTER_READ))
    seeds.never(lambda: reverse(kernels, grid, block, 3, BOTH))


def test_removed_barrier_shows_within_one_warp(kernels, seeds):
    seeds.found(lambda: reverse(kernels, 1, 32, 1, NOT_AFTER_WRITE))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "fault, message",
    [
        (
            1,
            r"^kernel 'barrier_fault', block [0-2], thread \d+ \(\d+,[01]\): divergent barrier: thread \d+ of this "
            r"block waits at another one, simt/kernels/barriers\.cuh:\d+ \[simt/kernels/barriers\.cuh:\d+\]$",
        ),
        (
            2,
            r"^kernel 'barrier_fault', block [0-2], thread \d+ .*: barrier: thread 7 has exited while 63 threads of "
            r"the block wait",
        ),
    ],
    ids=["divergent", "exited"],
)
def test_barrier_faults_are_named(kernels, simt, seed, fault, message):
    simt.set_options(seed=seed)
    with pytest.raises(simt.Fault, match=message) as report:
        kernels.barriers.barrier_fault(fault)
    lines = re.findall(r"barriers\.cuh:(\d+)", str(report.value))
    assert fault != 1 or lines[0] != lines[1]


def test_correct_barrier_is_quiet(kernels, seeds):
    seeds.never(lambda: kernels.barriers.barrier_fault(0) is None)


@pytest.mark.parametrize("fault, index", [(1, 1024), (2, -1)])
def test_index_outside_a_shared_array(kernels, simt, fault, index):
    message = (
        rf"block 0, thread 5: index {index} is outside a shared array of 1024 elements \[.*kernels/barriers\.cuh:\d+\]"
    )
    with pytest.raises(simt.Fault, match=message):
        kernels.barriers.shared_fault(fault, 0)


def test_write_past_shared_memory_by_pointer(kernels, simt):
    with pytest.raises(simt.Fault, match="its block wrote past its 4096 bytes of shared memory"):
        kernels.barriers.shared_fault(3, 0)


def test_too_small_reservation(kernels, simt):
    with pytest.raises(simt.Fault, match="takes 4096 bytes of shared memory, the launch reserved 4092"):
        kernels.barriers.shared_fault(0, 4)
    kernels.barriers.shared_fault(0, 0)


WARP_FAULTS = {
    2: r"lane 3 calls a warp exchange whose mask 0xfffffff7 leaves it out",
    3: r"another warp exchange \(mask 0x(c0000001|ffffffff) instead of 0x(c0000001|ffffffff)\)",
    4: r"thread \d+: meets thread \d+, which is in another warp exchange .* at simt/kernels/barriers\.cuh:\d+",
    5: r"thread \d+: meets thread \d+, which is in another warp exchange .* at simt/kernels/barriers\.cuh:\d+",
    6: r"thread 9: exited while thread \d+ waits for it in a warp exchange|names lane 9, which has exited",
    7: r"hang, no thread can make progress; 31 threads in a warp exchange with mask 0xffffffff "
    r"\[simt/kernels/barriers\.cuh:\d+\]: .*; 1 thread at a block barrier \[[^]]*\]: block 0 thread 9$",
    8: r"shuffle: thread \d+ reads lane 20, which is not in the mask 0x0000ffff",
}


@pytest.mark.parametrize("fault", WARP_FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_wrong_warp_exchange_is_named(kernels, simt, fault, seed):
    simt.set_options(seed=seed)
    with pytest.raises(simt.Fault, match=WARP_FAULTS[fault]):
        kernels.barriers.warp_fault(np.zeros(32, np.uint32), 32, fault)


@pytest.mark.parametrize("correct", [0, 1], ids=["full", "halves"])
def test_correct_warp_exchange_is_quiet(kernels, seeds, correct):
    def check():
        out = np.zeros(96, np.uint32)
        kernels.barriers.warp_fault(out, 96, correct)
        return np.array_equal(out, (np.arange(96) % 32) ^ 1)

    seeds.never(check)


def test_full_mask_in_a_partial_warp(kernels, simt):
    with pytest.raises(simt.Fault, match="names lane 16, which has exited or never existed"):
        kernels.barriers.warp_fault(np.zeros(48, np.uint32), 48, 0)


def test_stack_overflow_is_named(kernels, simt):
    out = np.zeros(1, np.float32)
    kernels.barriers.deep_stack(out, 10)
    if simt.address_sanitizer:
        pytest.skip("AddressSanitizer ends the process at the overflow itself")
    with pytest.raises(simt.Fault, match="thread 31: stack overflow, a thread has [0-9]+ KB"):
        kernels.barriers.deep_stack(out, 500)
    kernels.barriers.deep_stack(out, 10)


def test_uncaught_exception_is_a_report(kernels, simt):
    with pytest.raises(
        simt.Fault, match="kernel 'throws', block 0, thread 11: uncaught C.. exception: thrown by a kernel"
    ):
        kernels.barriers.throws()


def test_emulator_is_usable_after_every_fault(kernels, simt):
    for fault in WARP_FAULTS:
        with pytest.raises(simt.Fault):
            kernels.barriers.warp_fault(np.zeros(32, np.uint32), 32, fault)
        assert reverse(kernels, 8, 1024, 2, BOTH)
