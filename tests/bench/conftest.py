"""Fakes for testing the harness: a clock that only moves when told, a machine with tiny caches, a small family."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench import harness, machines  # noqa: E402


class FakeClock:
    """Seconds that pass only through `advance`, so that timings are exact and tests never flake."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def machine(clock):
    """64 KiB of cache, 4 MiB of memory for buffers."""
    return machines.CpuMachine(cache_bytes=64 << 10, memory_cap=4 << 20, clock=clock)


def doubling_case(clock, *, rows=1024, hidden=64, costs=None, wrong=(), raises=(), **changes) -> harness.Case:
    """out = 2 x, computed for real by every contestant; `costs` says how long each takes on the fake clock."""
    costs = costs or {"ours": 10e-6, "eager": 25e-6}

    def make(name: str) -> harness.Contestant:
        def call(x, out):
            if name in raises:
                raise RuntimeError(f"{name} does not run here\nsecond line")
            torch.mul(x, 2.5 if name in wrong else 2.0, out=out)
            clock.advance(costs[name])

        return harness.Contestant(
            name, f"the {name} way", lambda buffers: partial(call, buffers["x"], buffers["out"]), {"y": "out"}
        )

    fields = {
        "family": "fake",
        "op": "double",
        "case": f"{rows}x{hidden}",
        "dtype": torch.float32,
        "buffers": {
            "x": machines.Buffer((rows, hidden), torch.float32, harness.fill_values),
            "out": machines.Buffer((rows, hidden), torch.float32),
        },
        "contestants": [make(name) for name in costs],
        "reference": lambda inputs: {"y": inputs["x"] * 2},
        "tolerance": 1e-6,
        "bytes": 2 * rows * hidden * 4,
        "flops": rows * hidden,
        "limit": machines.Limit("copy", ("x", "out")),
    }
    return harness.Case(**(fields | changes))


@pytest.fixture
def make_case(clock):
    return partial(doubling_case, clock)


def make_row(**changes) -> dict:
    row = {
        "family": "fake", "op": "double", "case": "1024x64", "dtype": "bf16", "backend": "cpu", "cache": "cold",
        "us": 10.0, "us_p20": 9.0, "us_p80": 12.0, "bytes": 80_000_000, "flops": 0, "pct_of_limit": 80.0,
        "limit": {"kind": "copy", "gb_per_s": 10_000.0, "formulation": "out.copy_(x)"},
        "baselines": {"eager": 25.0}, "formulations": {"ours": "ours", "eager": "eager"}, "skipped": {},
        "max_err": 0.001, "ok": True, "flags": [],
    }  # fmt: skip
    return row | changes


WRONG = {"ok": False, "us": None, "us_p20": None, "us_p80": None, "pct_of_limit": None, "limit": None}


def make_document(*rows: dict, **env) -> dict:
    described = {
        "git": {"commit": "0123456789ab", "dirty": False}, "device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 2,
        "caches": {"L3": 1 << 20}, "torch": "2.14.1", "date": "2026-01-02T03:04:05Z", "other_load": 0.0,
    }  # fmt: skip
    limits = {
        "buffer_bytes": 1 << 22, "copy_gb_per_s": 20.0, "rmw_gb_per_s": 30.0, "read_gb_per_s": 25.0,
        "matmul_bf16_tflop_per_s": 0.5, "matmul_fp32_tflop_per_s": 0.2,
    }  # fmt: skip
    return harness.document(described | env, limits, rows or [make_row()])


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def doc():
    return make_document


@pytest.fixture
def wrong():
    return dict(WRONG)
