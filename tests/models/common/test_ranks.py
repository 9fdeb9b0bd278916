"""Ranks return what they made, or all of them end with a sentence that says which one failed and how."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenweave_models.common.ranks import RankFailed, run_ranks, usable_cores

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))  # spawned ranks take over sys.path
    import rank_work

    yield rank_work
    assert multiprocessing.active_children() == []


def test_results_come_by_rank(work):
    reports = []
    results = run_ranks(work.add_up, 2, 10, timeout_s=60, on_report=reports.append)
    assert results == [(0, 21), (1, 21)]
    threads = max(1, usable_cores() // 2)
    assert sorted(reports) == [("rank", rank, "threads", threads) for rank in range(2)]


def test_one_that_raises_ends_all(work):
    with pytest.raises(RankFailed, match="^rank 1: LookupError: no such token$"):
        run_ranks(work.one_raises, 2, timeout_s=60)


def test_one_that_is_killed_ends_all(work):
    killed_at = []
    with pytest.raises(RankFailed, match="rank 0: PeerLost: allreduce_rmsnorm_: .*rank 1.*; rank 1: killed by SIGKILL"):
        run_ranks(work.one_is_killed, 2, timeout_s=60, on_report=killed_at.append)
    assert time.time() - killed_at[0] < 5


def test_the_deadline_ends_all(work):
    begin = time.monotonic()
    with pytest.raises(RankFailed, match="^rank 0: not done after 0.5 s; rank 1: not done after 0.5 s$"):
        run_ranks(work.wait_for_ever, 2, timeout_s=0.5)
    assert time.monotonic() - begin < 5


def test_ranks_end_with_their_parent(work):
    program = (
        "import rank_work; from tokenweave_models.common.ranks import run_ranks\n"
        "if __name__ == '__main__':\n"
        "    run_ranks(rank_work.wait_for_ever, 2, timeout_s=60, on_report=lambda pid: print(pid, flush=True))\n"
    )
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    ranks = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(is_running(pid) for pid in ranks):
        time.sleep(0.02)
    left = [pid for pid in ranks if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def is_running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody here can reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
