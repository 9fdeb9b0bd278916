"""What a measurement was taken on: the `env` block of a result file, cache sizes, the GPU's clocks and throttling."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
FALLBACK_LLC_BYTES = 32 << 20  # only where neither sysfs nor lscpu tells

# Reasons for which a GPU lowers its clocks although there is work. Idle, application clocks, sync boost and display
# clocks are settings, not faults. (Bits of nvmlClocksThrottleReasons.)
THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def git_state(root: Path = ROOT) -> dict:
    """Commit and whether tracked or new files differ from it; `unknown` outside a checkout."""
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return {"commit": "unknown", "dirty": True}
    return {"commit": commit, "dirty": bool(_output("git", "-C", str(root), "status", "--porcelain"))}


def parse_size(text: str) -> int:
    """Bytes in a sysfs or lscpu size: `266240K`, `260 MiB (1 instance)`, `64`."""
    match = re.match(r"\s*([\d.]+)\s*([KMG]?)", text)
    if not match:
        raise ValueError(f"not a cache size: {text!r}")
    return int(float(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]])


def cpu_caches(sysfs: Path = SYSFS_CACHES) -> dict[str, int]:
    """Data cache sizes seen by one core, in bytes, e.g. {"L1d": ..., "L2": ..., "L3": ...}."""
    caches: dict[str, int] = {}
    for index in sorted(sysfs.glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction":
            name = "L" + (index / "level").read_text().strip() + ("d" if kind == "Data" else "")
            caches[name] = parse_size((index / "size").read_text())
    if not caches:  # some virtual machines and containers hide sysfs
        for line in _output("lscpu").splitlines():
            match = re.match(r"\s*(L1d|L2|L3)(?: cache)?:\s*(.+)", line)
            if match:
                caches[match[1]] = parse_size(match[2])
    return caches


def last_level_cache_bytes(caches: dict[str, int]) -> int:
    return max(caches.values(), default=FALLBACK_LLC_BYTES)


def cpu_model() -> str:
    """The model and, since virtual machines often hide it, the family and widest vector extension."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", text, re.M)
    number = re.search(r"^model\s*:\s*(\d+)$", text, re.M)
    described = name[1] if name else platform.machine()
    return f"{described} (model {number[1]})" if number else described


class GpuMonitor:
    """Clocks, power and throttle reasons through nvidia-ml-py; says why when it cannot."""

    def __init__(self, device_index: int = 0, nvml=None):
        self.handle = None
        self.nvml = nvml
        try:
            if nvml is None:
                import pynvml

                self.nvml = pynvml
            self.nvml.nvmlInit()
            # By UUID: NVML's numbering ignores CUDA_VISIBLE_DEVICES.
            uuid = str(torch.cuda.get_device_properties(device_index).uuid)
            uuid = uuid if uuid.startswith("GPU-") else "GPU-" + uuid
            self.handle = self.nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.why_absent = None
        except ImportError:
            self.why_absent = "clocks and throttling were not read: pip install nvidia-ml-py"
        except Exception as error:  # NVML has one exception class per status
            self.why_absent = f"clocks and throttling were not read: {error}"

    def snapshot(self) -> dict | None:
        if self.handle is None:
            return None
        nvml, handle = self.nvml, self.handle
        try:
            return {
                "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                "throttle": self.throttle_reasons(),
            }
        except Exception as error:
            self.why_absent = f"clocks and throttling were not read: {error}"
            self.handle = None
            return None

    def throttle_reasons(self) -> list[str]:
        if self.handle is None:
            return []
        try:
            bits = self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle)
        except Exception:  # not every device tells
            return []
        return [reason for bit, reason in THROTTLE_REASONS.items() if bits & bit]

    def driver(self) -> str | None:
        if self.handle is None:
            return None
        version = self.nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version


class OtherLoad:
    """How much of the cores other processes used between its creation and `share()`: what a CPU timing must be told."""

    def __init__(self, stat: Path = Path("/proc/stat")):
        self.stat = stat
        self._start = self._seconds()

    def _seconds(self) -> tuple[float, float, float] | None:
        try:
            ticks = [int(value) for value in self.stat.read_text().splitlines()[0].split()[1:]]
        except OSError:
            return None
        busy = sum(ticks[:3] + ticks[5:8]) / os.sysconf("SC_CLK_TCK")  # all but idle, iowait and guest time
        return time.monotonic(), busy, sum(os.times()[:4])

    def share(self) -> float | None:
        """0 for a quiet machine, 1 when others kept every core busy; None where the system does not tell."""
        if self._start is None:
            return None
        wall, busy, own = (now - before for now, before in zip(self._seconds(), self._start, strict=True))
        return round(min(1.0, max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))), 3) if wall > 0 else None


def describe(device: str, monitor: GpuMonitor | None = None) -> dict:
    caches = cpu_caches()
    env = {
        "git": git_state(),
        "device": device,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "caches": caches,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        env |= {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "caches": caches | {"gpu_L2": properties.L2_cache_size},
            "cuda": torch.version.cuda,
            "driver": monitor.driver() if monitor else None,
            "clocks_before": monitor.snapshot() if monitor else None,
        }
        if monitor and monitor.why_absent:
            env["clocks_note"] = monitor.why_absent
    return env


def device_label(env: dict) -> str:
    """How a table or plot names the device."""
    return env["gpu"] if env["device"] == "cuda" else f"{env['cpu']}, {env['threads']} threads"


def commit_label(env: dict) -> str:
    return env["git"]["commit"] + (" + local changes" if env["git"]["dirty"] else "")
