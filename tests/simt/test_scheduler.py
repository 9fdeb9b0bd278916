"""The scheduler itself: seeds, many threads and blocks, host threads."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import tokenweave_ops


def record_schedule(kernels, grid=6, block=64, steps=3):
    order = np.zeros(grid * block * steps, np.uint32)
    kernels.signals.record_schedule(np.zeros(1, np.uint32), order, grid, block, steps)
    assert (np.bincount(order, minlength=grid * block) == steps).all()
    return order


def test_same_seed_same_schedule(kernels, simt):
    for seed in (0, 1, 2**63):
        runs = []
        for _ in range(2):
            simt.set_options(seed=seed)
            runs.append([record_schedule(kernels) for _ in range(3)])
        assert np.array_equal(runs[0], runs[1])


def test_seeds_and_launches_differ(kernels, simt):
    schedules = []
    for seed in range(10):
        simt.set_options(seed=seed)
        schedules += [record_schedule(kernels).tobytes() for _ in range(3)]
    assert len(set(schedules)) == len(schedules)


def test_schedules_are_far_apart(kernels, simt):
    """Every warp, every lane and every block comes first under some seed."""
    first_threads = []
    for seed in range(400):
        simt.set_options(seed=seed)
        first_threads.append(record_schedule(kernels, 4, 64, 1)[0])
    threads = np.array(first_threads)
    assert set(threads // 64) == {0, 1, 2, 3}
    assert set(threads % 64 // 32) == {0, 1}
    assert set(threads % 32) == set(range(32))


def test_resident_blocks_are_interleaved(kernels, simt):
    simt.set_options(seed=3, resident_blocks=4)
    blocks = record_schedule(kernels, 8, 32, 20) // 32
    assert (np.diff(blocks.astype(int)) != 0).sum() > 8
    simt.set_options(seed=3, resident_blocks=1)
    blocks = record_schedule(kernels, 8, 32, 20) // 32
    assert np.array_equal(blocks, np.repeat(np.arange(8), 32 * 20))


def test_many_blocks_of_1024_threads(kernels, simt):
    data = np.random.default_rng(0).random((300, 1024), dtype=np.float32)
    out = np.full_like(data, np.nan)
    before = simt.counters()
    kernels.barriers.reverse(data, out, 300, 1024, 1, 0)
    after = simt.counters()
    assert np.array_equal(out, data[:, ::-1])
    assert after["blocks"] - before["blocks"] == 300
    assert after["launches"] - before["launches"] == 1
    assert after["switches"] - before["switches"] >= 300 * 1024


def test_what_was_launched_is_kept_until_options_are_set(kernels, simt):
    simt.set_options()
    assert simt.launched() == []
    data = np.zeros((3, 64), dtype=np.float32)
    for _ in range(2):
        kernels.barriers.reverse(data, np.empty_like(data), 3, 64, 1, 0)
    first, second = simt.launched()
    assert first == second and (first["grid"], first["threads"]) == (3, 64) and not first["cooperative"]
    assert first["shared_bytes"] >= 64 * 4 and first["offset"] > 0
    assert Path(first["library"]).name.startswith("_host")  # a test kernel stands there
    for _ in range(1100):
        kernels.barriers.reverse(data, np.empty_like(data), 1, 32, 1, 0)
    assert len(simt.launched()) == 1024  # a long run keeps no more
    simt.set_options()
    assert simt.launched() == []


def test_launches_from_two_host_threads(kernels, simt):
    """The second waits its turn; a group belongs to the thread that opened it."""
    failures = []

    def work(seed):
        data = np.random.default_rng(seed).random((4, 256), dtype=np.float32)
        try:
            for i in range(20):
                out = np.full_like(data, np.nan)
                if i % 2:
                    simt.begin_group()
                    simt.set_rank(seed)
                kernels.barriers.reverse(data, out, 4, 256, 3, 0)
                if i % 2:
                    simt.run_group()
                assert np.array_equal(out, data[:, ::-1])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_fault_on_another_host_thread(kernels, simt):
    """Stacks are reused from whatever OS thread comes next."""
    reports = []

    def work():
        try:
            kernels.barriers.barrier_fault(1)
        except simt.Fault as fault:
            reports.append(str(fault))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    kernels.barriers.barrier_fault(0)
    assert len(reports) == 1


@pytest.mark.no_launch
def test_options_round_trip_and_are_checked(simt):
    simt.set_options(seed=2**64 - 1, resident_blocks=2, hold_back_percent=10, max_grid=9, switches_without_progress=7)
    assert simt.options() == {
        "seed": 2**64 - 1,
        "resident_blocks": 2,
        "hold_back_percent": 10,
        "max_grid": 9,
        "switches_without_progress": 7,
    }
    with pytest.raises(ValueError, match="resident_blocks must be at least 1"):
        simt.set_options(resident_blocks=0)
    with pytest.raises(ValueError, match="hold_back_percent must be at most 100"):
        simt.set_options(hold_back_percent=101)


@pytest.mark.no_launch
def test_run_group_needs_begin_group(simt):
    with pytest.raises(simt.Fault, match="run_group without begin_group"):
        simt.run_group()


@pytest.mark.no_launch
def test_block_of_more_than_1024_threads(kernels, simt):
    with pytest.raises(simt.Fault, match="cannot launch 1 blocks of 1025 x 1 threads"):
        kernels.barriers.warp_fault(np.zeros(1025, np.uint32), 1025, 0)


@pytest.mark.no_launch
def test_a_test_that_launches_nothing_fails(tmp_path):
    """The fixture that watches the switch counter cannot be forgotten: it applies to every test beside conftest.py."""
    here = Path(__file__).parent
    shutil.copy(here / "conftest.py", tmp_path)
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    paths = [Path(tokenweave_ops.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "this test never entered the emulator" in result.stdout
