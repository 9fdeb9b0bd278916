"""Tables, the performance page, plots and the environment block."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import environment, plot, report, terminal

ROOT = Path(__file__).resolve().parents[2]


def test_cells_state_bandwidth_share_and_speedups(row):
    cells = report.cells(row(), ["eager", "absent"])
    assert cells == ["1024x64", "bf16", "cold", "10.00", "9.00 - 12.00", "8000.0", "80 %", "2.50x", "-"]


def test_a_wrong_row_shows_no_number(row, wrong):
    cells = report.cells(row(**wrong), ["eager"])
    assert cells == ["1024x64", "bf16", "cold", "wrong", "-", "-", "-", "-"]


def test_a_wrong_baseline_shows_no_ratio(row):
    assert report.cells(row(baselines={"eager": None}), ["eager"])[-1] == "wrong"


def test_remarks_explain_what_a_reader_must_know(doc, row):
    formulations = dict.fromkeys(["ours", "noop", "wrapper"], "-")
    call = row(
        op="call", us=2.0, us_p20=2.0, us_p80=2.0, baselines={"noop": 1.6, "wrapper": 2.4}, formulations=formulations
    )
    lines = "\n".join(
        report.remarks(doc(row(flags=["noisy"], skipped={"vllm": "not importable"}), call, other_load=0.4))
    )
    assert "Some CPU, 2 threads; torch 2.14.1; 2026-01-02; commit 0123456789ab." in lines
    assert "call: 1.25x a no-op of the same schema (1.60 us)." in lines and "the Python function adds 0.40 us" in lines
    assert "vllm was skipped: not importable." in lines and "noisy: double 1024x64 bf16 cold." in lines
    assert "other processes used 40 % of its cores" in lines


def test_remarks_say_what_one_of_the_counted_costs(doc, row, wrong):
    lines = report.remarks(doc(row(us=50.0, counts={"point": 1000}), row(counts={"point": 7}, **wrong)))
    assert "double 1024x64: 50 ns a point, 2e+07 points/s." in lines
    assert sum("a point" in line for line in lines) == 1


@pytest.mark.parametrize("with_rich", [True, False])
def test_terminal_table_fits_120_columns(doc, row, wrong, with_rich, monkeypatch, capsys):
    names = ["eager", "compile", "torch_rms_norm", "vllm", "flashinfer"]
    formulations, baselines = dict.fromkeys(names, "-"), dict.fromkeys(names, 123.4)
    wide = row(
        case="32768x8192", us=123456.7, us_p20=98765.4, us_p80=234567.8, baselines=baselines, formulations=formulations
    )
    if not with_rich:
        monkeypatch.setattr(terminal, "Console", None)
    report.print_tables(doc(wide, row(**wrong)), terminal.Terminal())
    printed = capsys.readouterr().out
    assert "32768x8192" in printed and "98765 - 234568" in printed and "wrong" in printed and "\u2026" not in printed
    assert max(map(len, printed.splitlines())) <= 120


PAGE = "before\n<!-- results -->\nstale numbers\n<!-- end of results -->\nafter\n"


def test_page_block_is_replaced_by_the_result_files_and_nothing_else_is(tmp_path, doc, row):
    for device, us in {"a": 10.0, "b": 11.0}.items():
        (tmp_path / device).mkdir()
        (tmp_path / device / "cpu.json").write_text(json.dumps(doc(row(us=us))))
    rendered = report.render(PAGE, tmp_path)
    assert rendered.startswith("before\n") and rendered.endswith("after\n") and "stale" not in rendered
    assert "### Some CPU, 2 threads, 2026-01-02\n\nFrom `bench/results/a/cpu.json`." in rendered
    assert "| 1024x64 | bf16 | cold | 10.00 | 9.00 - 12.00 | 8000.0 | 80 % | 2.50x |" in rendered
    assert "| 1024x64 | bf16 | cold | 11.00 |" in rendered
    assert report.render(rendered, tmp_path) == rendered


def test_page_without_results_says_so(tmp_path):
    assert "No results have been committed yet" in report.render(PAGE, tmp_path)
    with pytest.raises(ValueError, match="no block"):
        report.render("a page", tmp_path)


def test_page_refuses_a_file_that_breaks_the_schema(tmp_path, doc, row):
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "bad.json").write_text(json.dumps(doc(row(us=None))))
    with pytest.raises(ValueError, match="bad times"):
        report.render(PAGE, tmp_path)


def test_performance_page_shows_the_committed_results():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "report.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- plot -------------------------------------------------------------------------------------------------------------


def test_cases_split_into_rows_and_width():
    assert plot.split_case("4096x8192") == (4096, "8192")
    assert plot.split_case("2x3x4") == (2, "3x4")
    assert plot.split_case("long text") is None


def test_plot_draws_every_kind_of_row(tmp_path, doc, row, wrong):
    rows = [row(case=f"{t}x{h}", us=9.0 + t, us_p20=9.0, us_p80=9000.0) for t in (1, 64, 4096) for h in (4096, 8192)]
    rows += [row(dtype="fp32", cache="hot", limit=None, pct_of_limit=None), row(**wrong), row(op="other", baselines={})]
    plot.draw(doc(*rows), tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000


def test_plot_of_nothing_is_a_sentence(tmp_path, doc, row, wrong):
    with pytest.raises(SystemExit, match="no correct row"):
        plot.draw(doc(row(**wrong)), tmp_path / "plot.png")


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,size", [("266240K", 266240 << 10), ("260 MiB (1 instance)", 260 << 20), ("64", 64)])
def test_cache_sizes_are_parsed(text, size):
    assert environment.parse_size(text) == size


def test_cache_sizes_from_sysfs(tmp_path):
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "8M")]):
        directory = tmp_path / f"index{index}"
        directory.mkdir()
        for name, value in {"level": level, "type": kind, "size": size}.items():
            (directory / name).write_text(f"{value}\n")
    caches = environment.cpu_caches(tmp_path)
    assert caches == {"L1d": 48 << 10, "L3": 8 << 20}
    assert environment.last_level_cache_bytes(caches) == 8 << 20


def test_git_state_outside_a_checkout_is_unknown(tmp_path):
    assert environment.git_state(tmp_path) == {"commit": "unknown", "dirty": True}


def test_load_of_other_processes(tmp_path, monkeypatch):
    import time as real_time

    stat, now, own = tmp_path / "stat", [100.0], [10.0]
    monkeypatch.setattr(environment.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(environment.os, "times", lambda: (own[0], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(environment.os, "sysconf", lambda name: 100)
    stat.write_text("cpu 1000 0 0 5000 0 0 0 0 0 0\n")
    load = environment.OtherLoad(stat)
    now[0], own[0] = 110.0, 18.0  # ten seconds later: we used eight core seconds, all together thirteen
    stat.write_text("cpu 2000 100 200 5700 0 0 0 0 0 0\n")
    assert load.share() == pytest.approx(0.25)  # five of twenty core seconds
    assert environment.OtherLoad(tmp_path / "absent").share() is None
    assert real_time is environment.time


class FakeNvml:
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    reasons = 0x04 | 0x02 | 0x40  # power cap, application clocks (a setting), hardware thermal slowdown

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-abc"
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 512_345

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"


def test_gpu_clocks_power_and_throttling(monkeypatch):
    class Properties:
        uuid = "abc"

    monkeypatch.setattr(environment.torch.cuda, "get_device_properties", lambda index: Properties)
    monitor = environment.GpuMonitor(nvml=FakeNvml())
    assert monitor.snapshot() == {
        "sm_mhz": 1980, "memory_mhz": 2619, "power_w": pytest.approx(512.345), "temperature_c": 61,
        "throttle": ["software power cap", "hardware thermal slowdown"],
    }  # fmt: skip
    assert monitor.driver() == "580.1" and monitor.why_absent is None


def test_gpu_monitor_says_why_it_is_blind(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = environment.GpuMonitor()
    assert "pip install nvidia-ml-py" in monitor.why_absent
    assert monitor.snapshot() is None and monitor.throttle_reasons() == [] and monitor.driver() is None


def test_environment_of_this_machine(doc):
    from bench import harness

    env = environment.describe("cpu")
    harness.validate(doc() | {"env": env})
    assert env["threads"] >= 1 and env["cores"] >= 1 and env["date"].endswith("Z")
