"""Benchmarks between processes: lockstep, the worst rank's time and error, and what happens when a rank fails."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import allreduce_cases, harness, machines, plot, ranks, report, timing

ROOT = Path(__file__).resolve().parents[2]

FAMILY = """
import os
import signal
import time

import torch
import torch.distributed as dist

from bench.harness import Case, Contestant
from bench.machines import Buffer, Limit
from bench.ranks import RankCase


def cases(device, quick):
    return []


def rank_cases(device, quick):
    faults = ["none"] if quick else ["none", "wrong", "cannot", "dies", "raises", "hangs"]
    return [RankCase("sum", "64x1024 x2", torch.float32, 2, lambda machine, f=fault: sum_case(machine, f))
            for fault in [os.environ.get("FAULT", faults[0]), *faults[1:]]]


def sum_case(machine, fault):
    if fault == "raises" and machine.rank == 1:
        raise ValueError("rank 1 has no such case")

    def ours(buffers):
        def call():
            if machine.rank == 1:
                if fault == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "hangs":
                    time.sleep(1000)
            dist.all_reduce(buffers["x"], group=machine.group)
            if machine.rank == 1:
                time.sleep(0.004)
                if fault == "wrong":
                    buffers["x"][-1, -1] += 1
        return call

    def plain(buffers):
        def call():
            if fault == "cannot" and machine.rank == 1:
                dist.all_reduce(buffers["x"], group=machine.group)
                raise RuntimeError("not on this rank")
            dist.all_reduce(buffers["x"], group=machine.group)
        return call

    def undo(buffers):
        return lambda: buffers["x"].mul_(0.5)

    return Case(
        family="tiny", op="sum", case="64x1024 x2", dtype=torch.float32,
        buffers={"x": Buffer((64, 1024), torch.float32, machine.fill_apart)},
        contestants=[Contestant("ours", "slow on rank 1", ours, {"s": "x"}, undo=undo),
                     Contestant("plain", "all_reduce", plain, {"s": "x"}, undo=undo)],
        reference=lambda inputs: {"s": machine.gather(inputs["x"]).sum(0)}, tolerance=1e-6,
        bytes=2 * 2 * 64 * 1024 * 4, flops=0, limit=Limit("rmw", ("x",)),
    )
"""
NONE, WRONG, CANNOT, DIES, RAISES, HANGS = range(6)
CACHE_BYTES = 1 << 20


@pytest.fixture
def machine():
    """Small caches and the real clock."""
    return machines.CpuMachine(cache_bytes=64 << 10, memory_cap=4 << 20)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    path = tmp_path_factory.mktemp("families") / "tiny.py"
    path.write_text(FAMILY)
    return path


@pytest.fixture(scope="module")
def processes():
    with ranks.Processes(2, "cpu", CACHE_BYTES) as started:
        yield started
        assert all(process.is_alive() for process in started.processes)
    assert not any(process.is_alive() for process in started.processes)


# --- lockstep ---------------------------------------------------------------------------------------------------------


def test_ranks_start_at_one_instant_and_end_with_the_last():
    words, found = [0.0] * ranks.Lockstep.num_words(3), {}

    def run(rank):
        lockstep = ranks.Lockstep(words, rank, 3)
        for step in range(3):
            time.sleep(0.01 * ((rank + step) % 3))  # they do not come together
            start = lockstep.start()
            here = time.monotonic()
            time.sleep(0.01 * rank)
            own_end = time.monotonic()
            found[step, rank] = (start, here, own_end, lockstep.finish(), lockstep.agreed_time())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for step in range(3):
        starts, heres, own_ends, finishes, agreed = zip(*(found[step, rank] for rank in range(3)), strict=True)
        assert len(set(starts)) == len(set(finishes)) == 1 and agreed == starts
        assert min(heres) >= starts[0] and finishes[0] >= max(own_ends)


def test_a_rank_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(ranks, "MEETING_S", 0.05)
    with pytest.raises(TimeoutError, match="rank 0 waited 0.05 s for the other ranks"):
        ranks.Lockstep([0.0] * ranks.Lockstep.num_words(2), 0, 2).start()


def test_samples_of_gpus_are_those_of_the_slowest(clock):
    class Ranks:
        starts = 0

        @property
        def lockstep(self):
            return self

        def start(self):
            self.starts += 1

        def worst(self, seconds):
            return 2 * seconds  # another GPU took twice as long

    class Event:
        def record(self):
            self.at = clock()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Driver:
        event = Event

        def run(self, calls):
            for call in calls:
                call()

        def capture(self, calls):
            return lambda: self.run(calls)

    together = Ranks()
    sampler = ranks.DeviceSampler(together, [lambda: clock.advance(1e-4)] * 2, Driver())
    sampler.warm_up()
    assert sampler.captured == timing.graph_calls(2e-4, 2)
    before = together.starts
    assert sampler() == pytest.approx(2e-4) and together.starts == before + 1


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_row_has_the_time_of_the_slowest_rank(processes, family, doc):
    rows = processes.run_case(family, False, NONE, budget_s=0.1)
    harness.validate(doc(*rows))
    row = rows[0]
    assert row["ok"] and row["cache"] == "cold" and row["case"] == "64x1024 x2" and row["backend"] == "cpu"
    assert row["us"] > 4000  # what rank 1 sleeps; rank 0 alone would not see it
    assert row["baselines"]["plain"] > 0
    assert row["max_err"] < 1e-6 and "not_finite_after_timing" not in row["flags"]


def test_a_result_that_is_wrong_on_one_rank_has_no_speed(processes, family, doc):
    (row,) = processes.run_case(family, False, WRONG, budget_s=0.1)
    assert row["ok"] is False and row["max_err"] > 0.1 and row["us"] is None
    harness.validate(doc(row))


def test_a_baseline_that_fails_on_one_rank_is_skipped_on_all(processes, family):
    row = processes.run_case(family, False, CANNOT, budget_s=0.1)[0]
    assert row["ok"] and row["baselines"] == {}
    assert row["skipped"] == {"plain": "rank 1: RuntimeError: not on this rank"}


@pytest.mark.parametrize("fault,message", [
    (DIES, "^rank 1 ended with exit code -9"), (RAISES, "rank 1: ValueError: rank 1 has no such case"),
])  # fmt: skip
def test_a_failing_rank_ends_all_of_them(family, fault, message):
    with ranks.Processes(2, "cpu", CACHE_BYTES) as started:
        started.run_case(family, False, NONE, budget_s=0.05)
        begin = time.monotonic()
        with pytest.raises(ranks.RanksFailed, match=message):
            started.run_case(family, False, fault, budget_s=0.05)
        assert time.monotonic() - begin < 10
        assert not any(process.is_alive() for process in started.processes)


def test_a_rank_that_hangs_is_ended(family):
    with ranks.Processes(2, "cpu", CACHE_BYTES) as started:
        started.run_case(family, False, NONE, budget_s=0.05)
        with pytest.raises(ranks.RanksFailed, match="ranks 0, 1 did not answer within 1 s"):
            started.run_case(family, False, HANGS, budget_s=0.05, timeout_s=1)
        assert not any(process.is_alive() for process in started.processes)


def start(*arguments, **environment):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--device", "cpu", "--quick", *map(str, arguments)]
    environment = os.environ | {"TOKENWEAVE_BENCH_CACHE_BYTES": str(CACHE_BYTES)} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def test_run_says_which_rank_died_and_fails(family, tmp_path):
    result = tmp_path / "result.json"
    done = start("--families", family.parent, "--json", result, FAULT="dies")
    assert done.returncode == 1
    assert "the ranks failed, rows are missing: sum 64x1024 x2 fp32: rank 1 ended with exit code -9" in done.stderr
    assert json.loads(result.read_text())["rows"] == []


def test_the_family_is_measured_between_processes(tmp_path):
    result = tmp_path / "result.json"
    done = start("--family", "allreduce_rmsnorm", "--op", "allreduce_rmsnorm_", "--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(result.read_text())["rows"][0]
    assert row["ok"] and row["case"] == "1024x4096 x2" and row["bytes"] == 6 * 1024 * 4096 * 2
    assert set(row["baselines"]) == {"staged", "gloo", "gloo_strong"} and None not in row["baselines"].values()
    assert row["limit"]["kind"] == "rmw" and row["pct_of_limit"] > 0
    assert "1024x4096 x2" in done.stdout


# --- the cases --------------------------------------------------------------------------------------------------------


def test_bytes_of_the_fused_op():
    tokens, hidden, dtype = 1024, 4096, torch.bfloat16
    n = tokens * hidden * 2
    assert allreduce_cases.fused_bytes(2, tokens, hidden, dtype) == 6 * n
    assert allreduce_cases.fused_bytes(8, tokens, hidden, dtype) == 18 * n
    for world_size in (1, 2, 4, 8):  # x of every rank read and written, and every rank's share of the residual
        per_rank = 2 * n + 2 * n // world_size
        assert allreduce_cases.fused_bytes(world_size, tokens, hidden, dtype) == world_size * per_rank


def test_the_cases_between_processes_are_those_promised():
    found = {(case.op, case.case, harness.DTYPE_NAME[case.dtype]) for case in allreduce_cases.rank_cases("cpu", False)}
    fused = {(case, dtype) for op, case, dtype in found if op == "allreduce_rmsnorm_"}
    assert fused == {
        ("16x4096 x2", "bf16"), ("128x4096 x2", "bf16"), ("1024x4096 x2", "bf16"), ("4096x8192 x2", "bf16"),
        ("1024x4096 x2", "fp16"), ("1024x4096 x2", "fp32"),
    }  # fmt: skip
    assert {op for op, _, _ in found} == {"allreduce_rmsnorm_", "allreduce_", "gather_residual_"}


@pytest.mark.parametrize("make,bytes_of_n", [
    (allreduce_cases._fused_on_cpu, 6), (allreduce_cases._sum_on_cpu, 4), (allreduce_cases._gather_on_cpu, 2),
])  # fmt: skip
def test_the_limit_streams_the_bytes_of_the_op(make, bytes_of_n, monkeypatch):
    class Rank:
        kind, world_size, group = "cpu", 2, None

        def fill_apart(self, tensor, generator):
            pass

    made = []
    monkeypatch.setattr(allreduce_cases, "Workspace", lambda *a, **k: made.append(a) or type("W", (), {"close": 0}))
    tokens, hidden, streamed = 64, 128, 0
    fields = {"family": "f", "op": "o", "case": "c", "dtype": torch.bfloat16, "tolerance": 0.1}
    for rank in range(2):
        machine = Rank()
        machine.rank = rank
        case = make(fields, tokens, hidden, machine)
        buffers = {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in case.buffers.items()}
        tensors = case.limit.tensors(buffers)
        assert sum(tensor.nbytes for tensor in tensors) == case.limit.touched_bytes(case.buffers)
        streamed += machines.CpuMachine(1 << 16).limit_calls(case.limit, [buffers])[2]
    assert streamed == case.bytes == bytes_of_n * tokens * hidden * 2


def test_virtual_ranks_are_measured_and_checked(machine):
    case = allreduce_cases._virtual_case(world_size=4, tokens=30, hidden=64, dtype=torch.bfloat16, device="cpu")
    case.contestants = [contestant for contestant in case.contestants if contestant.name != "compile"]
    buffers = {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in case.buffers.items()}
    assert 2 * sum(tensor.nbytes for tensor in case.limit.tensors(buffers)) == case.bytes == 10 * 30 * 64 * 2
    rows = harness.run_case(case, machine, budget_s=0.01)
    assert all(row["ok"] and row["baselines"]["eager"] > 0 for row in rows) and rows[0]["case"] == "30x64 x4"


def test_virtual_ranks_are_checked_on_sampled_rows_of_every_rank(machine, monkeypatch):
    monkeypatch.setattr(harness, "CHECKED_ELEMENTS", 4 * 8 * 64)
    case = allreduce_cases._virtual_case(world_size=4, tokens=32, hidden=64, dtype=torch.float32, device="cpu")
    right, case.contestants = case.contestants[0], case.contestants[:1]
    assert harness.run_case(case, machine, budget_s=0.01)[0]["ok"]

    def spoil(buffers):
        call = right.bind(buffers)

        def spoiled():
            call()
            buffers["x"][3, -1, -1] += 1

        return spoiled

    case.contestants = [harness.Contestant("tokenweave", "last row of the last rank is wrong", spoil, right.outputs)]
    (row,) = harness.run_case(case, machine, budget_s=0.01)
    assert row["ok"] is False and row["us"] is None


def test_gpu_cases_sweep_the_blocks_and_say_what_one_gpu_cannot_show(monkeypatch):
    monkeypatch.setattr(allreduce_cases.torch.cuda, "device_count", lambda: 1)
    assert allreduce_cases.rank_cases("cuda", False) == []
    cases = allreduce_cases.virtual_cases("cuda", False)
    assert {case.case for case in cases} == {
        f"8192x4096 x{world_size}{blocks}"
        for world_size in (2, 4, 8)
        for blocks in ("", " cta2", " cta4", " cta8", " cta16")
    }
    assert all(case.skipped["nccl"] == "several GPUs are needed, torch sees 1" for case in cases)
    with_baselines = [case for case in cases if "cta" not in case.case]
    assert all([c.name for c in case.contestants] == ["tokenweave", "eager", "compile"] for case in with_baselines)


def test_several_gpus_are_compared_with_what_torch_offers(monkeypatch):
    class Rank:
        kind, rank, world_size, group = "cuda", 1, 4, None

        def fill_apart(self, tensor, generator):
            pass

    monkeypatch.setattr(allreduce_cases.torch.cuda, "device_count", lambda: 4)
    assert allreduce_cases.why_no_gpus("cuda") == {}
    cases = allreduce_cases.rank_cases("cuda", False)
    assert [case.case for case in cases] == ["64x8192 x4", "1024x8192 x4", "8192x8192 x4"]
    made = cases[-1].make(Rank())
    assert [c.name for c in made.contestants] == ["tokenweave", "nccl", "multimem", "two_shot"]
    assert made.limit.kind == "none" and made.bytes == 10 * 8192 * 8192 * 2


def test_rank_rows_are_rendered_and_drawn(doc, row, tmp_path):
    between = row(
        op="allreduce_rmsnorm_", case="1024x4096 x2", baselines={"gloo": 250.0, "gloo_strong": 80.0},
        formulations=dict.fromkeys(["tokenweave", "gloo", "gloo_strong"], "-"),
    )  # fmt: skip
    text = report.markdown(doc(between))
    assert "| case | dtype | cache | us | p20 - p80 | GB/s | of limit | vs gloo | vs gloo_strong |" in text
    assert "| 1024x4096 x2 | bf16 | cold | 10.00 | 9.00 - 12.00 | 8000.0 | 80 % | 25.00x | 8.00x |" in text
    assert plot.split_case("1024x4096 x2") == (1024, "4096 x2")
    plot.draw(doc(between), tmp_path / "plot.png")
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "family.json").write_text(json.dumps(doc(between, row())))
    readme = report.excerpt("<!-- bench:begin -->\n<!-- bench:end -->\n", tmp_path)
    assert "of limit | vs eager | vs gloo | vs gloo_strong |" in readme
    assert "| `allreduce_rmsnorm_` | 1024x4096 x2 | bf16 |" in readme and "| - | 25.00x | 8.00x |" in readme
