"""The stopwatch sums what it is told to measure and nothing else."""

import pytest
import torch
from tokenweave_models.common import stopwatch


def test_cpu_time_is_the_sum_of_the_blocks(monkeypatch):
    clock = iter([1.0, 1.5, 10.0, 10.25])
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: next(clock))
    watch = stopwatch.Stopwatch(torch.device("cpu"))
    assert watch.total_ms() == 0
    for _ in range(2):
        with watch.measure():
            pass
    assert watch.total_ms() == pytest.approx(750.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_time_covers_the_work_in_the_blocks():
    a = torch.randn(4096, 4096, device="cuda")
    one, many = stopwatch.Stopwatch(a.device), stopwatch.Stopwatch(a.device)
    a @ a  # warm-up
    with one.measure():
        a @ a
    for _ in range(20):
        with many.measure():
            a @ a
    assert many.total_ms() > 5 * one.total_ms() > 0
