"""What a GEMM loses to a collective that runs beside it, by the CTAs that the collective takes.

One device, two lanes: GEMMs on one, `allreduce_rmsnorm_` of virtual ranks back to back on the other, which comes first
where both want a multiprocessor. Virtual ranks are W ranks in one launch, so W times max_ctas blocks are resident, and
they read and write this device's memory where real ranks use the link. SEE_NOT says what follows from that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

import tokenweave_ops
from bench import timing
from bench.allreduce_cases import fused_bytes
from bench.harness import fill_values, max_error
from bench.machines import COLD_FACTOR, Buffer, Limit
from bench.norm_formulations import EPS, fill_weight, tolerance
from bench.split_gemms import MlpSizes, checked_rows, fill_normal, filled
from tokenweave_ops import Workspace
from tokenweave_ops.reference import allreduce_rmsnorm as reference

WORLD_SIZE = 2
MAX_CTAS = {"cuda": (1, 2, 4, 8, 16), "cpu": (1,)}  # on a CPU: the thread of the second lane alone
WINDOW_S = {"cuda": 10e-3, "cpu": 20e-3}
MIN_CALLS = 8  # of the collective in a window
MOST_DOUBLINGS = 6
TIMEOUT_S = 20.0

SEE_NOT = (
    "This shows what the collective's blocks take from a GEMM: multiprocessors and memory bandwidth. Virtual ranks are "
    "one cooperative launch whose world_size x max_ctas blocks move all ranks' bytes through this device's memory. It "
    "does not show a link: between GPUs only max_ctas blocks run on each, they wait for the link most of the time, and "
    "their bytes go through it. `hidden` is the part of the collectives' own time that the window did not grow by: "
    "near 0 % they ran in turn with the GEMM and not beside it, and the ratio is no slowdown by sharing."
)


def gemms_of(sizes: MlpSizes, qkv_features: int, attention_features: int) -> dict[str, tuple[int, int]]:
    """name -> (features, inner) of a layer's four GEMMs on one rank."""
    (gate_up, down), hidden = sizes.gemms, sizes.hidden
    return {
        "qkv": (qkv_features, hidden), "o_proj": (hidden, attention_features), "gate_up": gate_up, "down": down
    }  # fmt: skip


# --- the collective ---------------------------------------------------------------------------------------------------


class Collective:
    """`allreduce_rmsnorm_` of virtual ranks on rows that rotate through more memory than a GPU's cache holds."""

    def __init__(self, machine, num_tokens: int, hidden: int, dtype: torch.dtype):
        self.machine, self.num_tokens, self.hidden, self.dtype = machine, num_tokens, hidden, dtype
        self.call_bytes = fused_bytes(WORLD_SIZE, num_tokens, hidden, dtype)
        touched = self.call_bytes // 2
        self.sets = COLD_FACTOR["cuda"] * machine.cache_bytes // touched + 1 if machine.kind == "cuda" else 1
        self.workspace = Workspace.virtual(
            WORLD_SIZE, self.sets * num_tokens, hidden, dtype,
            device=machine.kind, staging=False, num_channels=1, timeout_s=TIMEOUT_S,
        )  # fmt: skip
        row_bytes = hidden * dtype.itemsize
        self.x = [self.workspace.empty(num_tokens, offset_bytes=i * num_tokens * row_bytes) for i in range(self.sets)]
        self.residual = [torch.empty_like(self.x[0], memory_format=torch.contiguous_format) for _ in range(self.sets)]
        self.weight = torch.empty(hidden, dtype=dtype, device=machine.kind)
        generator = torch.Generator(self.weight.device).manual_seed(20)
        fill_weight(self.weight, generator)
        for tensor in (*self.x, *self.residual):
            fill_values(tensor, generator)

    def calls(self, max_ctas: int) -> list[timing.Call]:
        def call(x, residual) -> None:
            tokenweave_ops.allreduce_rmsnorm_(x, residual, self.weight, self.workspace, EPS, max_ctas=max_ctas)

        return [lambda x=x, r=r: call(x, r) for x, r in zip(self.x, self.residual, strict=True)]

    def error(self, max_ctas: int) -> float:
        """Of one call on sampled rows: the norm on every rank, and the residual where it is owned."""
        x, residual = self.x[0], self.residual[0]
        generator = torch.Generator(x.device).manual_seed(21)
        fill_values(x, generator)
        fill_values(residual, generator)
        rows = torch.tensor(checked_rows(self.num_tokens, []), device=x.device)
        owners = torch.empty(self.num_tokens, dtype=torch.long, device=x.device)
        for rank in range(WORLD_SIZE):
            owners[reference.owned_rows(self.num_tokens, WORLD_SIZE, rank)] = rank
        owned = (owners[rows], rows)
        y, h = reference.allreduce_rms_norm(x[:, rows].double(), residual[owned].double(), self.weight.double(), EPS)
        self.calls(max_ctas)[0]()
        self.machine.synchronize()
        self.workspace.check()
        return max(max_error(x[:, rows], y.expand_as(x[:, rows])), max_error(residual[owned], h))

    def close(self) -> None:
        self.workspace.close()


# --- the two lanes ----------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What one lane repeats, one of `run` after the other; each is `calls` calls."""

    run: list[Callable[[], object]]
    is_collective: bool
    calls: int = 1
    call_s: float = 0.0  # alone


@dataclass(frozen=True)
class Window:
    gemm_s: float  # per call
    collectives_per_s: float | None  # that began and ended in the window; None: fewer than two ends fell into it


class ThreadLanes:
    """On a CPU the second lane is a thread: torch's ops release the interpreter lock."""

    def __init__(self, clock: Callable[[], float], window_s: float = WINDOW_S["cpu"]):
        self.clock, self.window_s = clock, window_s

    def prepare(self, calls: list[timing.Call], is_collective: bool) -> Work:
        for call in calls:
            call()
        work = Work(calls, is_collective)
        work.call_s = self._time(work, 3)
        return work

    def _time(self, work: Work, calls: int) -> float:
        start = self.clock()
        for index in range(calls):
            work.run[index % len(work.run)]()
        return (self.clock() - start) / calls

    def alone(self, work: Work) -> float:
        return self._time(work, max(1, math.ceil(self.window_s / max(work.call_s, 1e-6))))

    def beside(self, gemm: Work, collective: Work) -> Window:
        stop, running, ends, raised = threading.Event(), threading.Event(), [], []

        def lane() -> None:
            try:
                while not stop.is_set():
                    collective.run[len(ends) % len(collective.run)]()
                    ends.append(self.clock())
                    running.set()
            except Exception as error:
                raised.append(error)
            finally:
                running.set()

        thread = threading.Thread(target=lane, name="collective", daemon=True)
        thread.start()
        running.wait()
        start = self.clock()
        gemm_s = self.alone(gemm)
        end = self.clock()
        stop.set()
        thread.join()
        if raised:
            raise raised[0]
        return Window(gemm_s, _rate([t for t in ends if start <= t <= end]))


class LaneDriver(timing.CudaDriver):
    """A stream of this priority, and graphs whose kernels have it."""

    def __init__(self, priority: int):
        super().__init__()
        self.stream = torch.cuda.Stream(priority=priority)

    def on(self):
        """Where what is enqueued inside `with` goes."""
        return torch.cuda.stream(self.stream)

    def wait(self, event) -> None:
        self.stream.wait_event(event)


class StreamLanes:
    """On a GPU both lanes replay graphs; the collective's lane comes first where both want a multiprocessor."""

    def __init__(self, main: LaneDriver, side: LaneDriver, window_s: float = WINDOW_S["cuda"]):
        self.main, self.side, self.window_s = main, side, window_s
        self.margin = 1.5  # of collectives enqueued over those that the GEMMs are expected to take

    def prepare(self, calls: list[timing.Call], is_collective: bool) -> Work:
        driver = self.side if is_collective else self.main
        driver.run(calls * max(1, 3 // len(calls)))
        work = Work(calls, is_collective)
        once_s = self._time(driver, calls) / len(calls)
        if is_collective:
            work.run = [driver.capture([call]) for call in calls]
        else:
            order = [calls[i % len(calls)] for i in range(timing.graph_calls(once_s, len(calls)))]
            work.run, work.calls = [driver.capture(order)], len(order)
        work.call_s = self._time(driver, work.run) / (len(work.run) * work.calls)
        return work

    def _time(self, driver: LaneDriver, runs: list[Callable[[], object]]) -> float:
        start, end = driver.event(), driver.event()
        with driver.on():
            for run in runs:  # untimed: the device is busy while the host enqueues what is timed
                run()
            start.record()
            for run in runs:
                run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _runs(self, work: Work, seconds: float) -> list[Callable[[], object]]:
        count = max(1, math.ceil(seconds / max(work.call_s * work.calls, 1e-6)))
        return [work.run[i % len(work.run)] for i in range(count)]

    def alone(self, work: Work) -> float:
        runs = self._runs(work, self.window_s)
        return self._time(self.side if work.is_collective else self.main, runs) / (len(runs) * work.calls)

    def beside(self, gemm: Work, collective: Work) -> Window:
        """One window of GEMMs, during all of which collectives ran."""
        for _ in range(MOST_DOUBLINGS):
            window = self._beside(gemm, collective)
            if window is not None:
                return window
            self.margin *= 2
        raise RuntimeError("the collectives ended before the GEMMs, however many were enqueued")

    def _beside(self, gemm: Work, collective: Work) -> Window | None:
        gemms = self._runs(gemm, max(self.window_s, MIN_CALLS * collective.call_s))
        gemms_s = (len(gemms) + 1) * gemm.calls * gemm.call_s  # the first run of the GEMMs is untimed
        collectives = self._runs(collective, self.margin * gemms_s + 3 * collective.call_s)
        marks = [self.side.event() for _ in collectives]

        def enqueue(begin: int, end: int) -> None:
            with self.side.on():
                for run, mark in zip(collectives[begin:end], marks[begin:end], strict=True):
                    run()
                    mark.record()

        enqueue(0, 2)  # the rest follows the GEMMs, whose start must not wait for the host to enqueue it all
        start, end = self.main.event(), self.main.event()
        self.main.wait(marks[0])  # the collectives run by now
        with self.main.on():
            gemms[0]()
            start.record()
            for run in gemms:
                run()
            end.record()
        enqueue(2, len(collectives))
        self.main.synchronize()
        if end.elapsed_time(marks[-1]) < 0:
            return None
        elapsed_s = start.elapsed_time(end) * 1e-3
        ends = [start.elapsed_time(mark) * 1e-3 for mark in marks]
        return Window(elapsed_s / (len(gemms) * gemm.calls), _rate([t for t in ends if 0 <= t <= elapsed_s]))


def _rate(ends: list[float]) -> float | None:
    return (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else None


def hidden_share(
    gemm_alone_s: float, gemm_beside_s: float, collectives_per_s: float, collective_alone_s: float
) -> float:
    """The part of the collectives' own time by which the GEMM's time did not grow: 1 beside it, 0 in turn with it."""
    collective_s = collectives_per_s * gemm_beside_s * collective_alone_s  # of those that ran during one GEMM
    return 1 - (gemm_beside_s - gemm_alone_s) / collective_s


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class _Beside:
    """A sampler of timing.interleave that keeps the collective's rate of every round."""

    lanes: ThreadLanes | StreamLanes
    gemm: Work
    collective: Work
    rates: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        window = self.lanes.beside(self.gemm, self.collective)
        if window.collectives_per_s is not None:
            self.rates.append(window.collectives_per_s)
        return window.gemm_s


def lanes_of(machine) -> ThreadLanes | StreamLanes:
    if machine.kind == "cuda":
        return StreamLanes(LaneDriver(priority=0), LaneDriver(priority=-1))
    return ThreadLanes(machine.clock)


def measure_collective(collective: Collective, lanes, budget_s: float) -> tuple[dict, dict[int, Work]]:
    """The collective alone, by max_ctas: the `collective` object of the document, and the lanes' work."""
    clock, limit = collective.machine.clock, tolerance(collective.dtype)
    found = {
        "world_size": WORLD_SIZE, "num_tokens": collective.num_tokens, "hidden": collective.hidden,
        "call_bytes": collective.call_bytes, "sets": collective.sets, "alone": [],
    }  # fmt: skip
    works, errors = {}, {}
    for max_ctas in MAX_CTAS[collective.machine.kind]:
        errors[max_ctas] = collective.error(max_ctas)
        if errors[max_ctas] <= limit:
            works[max_ctas] = lanes.prepare(collective.calls(max_ctas), True)
    samplers = {max_ctas: lambda work=work: lanes.alone(work) for max_ctas, work in works.items()}
    samples = timing.interleave(samplers, budget_s, clock=clock) if samplers else {}
    for max_ctas, error in errors.items():
        us = timing.summarise(samples[max_ctas]).us if max_ctas in samples else None
        gb_per_s = collective.call_bytes / us / 1e3 if us else None
        max_err = error if math.isfinite(error) else None
        found["alone"].append({"max_ctas": max_ctas, "ok": us is not None, "max_err": max_err, "us": us,
                               "gb_per_s": gb_per_s})  # fmt: skip
        if us:
            works[max_ctas].call_s = us * 1e-6
    return found, works


def measure_beside(
    name: str, shape: tuple[int, int], num_tokens: int, dtype: torch.dtype, works: dict[int, Work],
    call_bytes: int, machine, lanes, budget_s: float, gemm=torch.mm,
) -> dict:  # fmt: skip
    """The row of one GEMM of [num_tokens, inner] x [inner, features], alone and beside each of the collectives. It is
    checked while a collective runs beside it. `gemm(x, weight, out=)`: tests replace it by a wrong one."""
    features, inner = shape
    buffers, is_cold = filled(
        {
            "x": Buffer((num_tokens, inner), dtype, fill_normal(1.0)),
            "weight": Buffer((features, inner), dtype, fill_normal(1 / math.sqrt(inner))),
            "y": Buffer((num_tokens, features), dtype, rotates=False),
        },
        Limit("none", ("x", "weight")),
        machine,
    )
    row = {
        "gemm": name, "num_tokens": num_tokens, "features": features, "inner": inner, "ok": False, "max_err": None,
        "cache": "cold" if is_cold else "hot", "us": None, "us_p20": None, "us_p80": None, "beside": [], "flags": [],
    }  # fmt: skip
    calls = [lambda one=one: gemm(one["x"], one["weight"].t(), out=one["y"]) for one in buffers]
    work = lanes.prepare(calls, False)
    buffers[0]["y"].fill_(math.nan)
    machine.synchronize()
    for collective in works.values():
        lanes.beside(work, collective)
    machine.synchronize()
    rows = torch.tensor(checked_rows(num_tokens, []), device=buffers[0]["x"].device)
    expected = buffers[0]["x"][rows].double() @ buffers[0]["weight"].double().t()
    error = max_error(buffers[0]["y"][rows], expected)
    row["max_err"] = error if math.isfinite(error) else None
    row["ok"] = error <= MlpSizes(inner, inner, dtype).tolerance
    if not row["ok"]:
        return row
    samplers = {0: lambda: lanes.alone(work)} | {n: _Beside(lanes, work, c) for n, c in works.items()}
    samples = timing.interleave(samplers, budget_s, clock=machine.clock)
    alone = timing.summarise(samples[0])
    row |= {"us": alone.us, "us_p20": alone.us_p20, "us_p80": alone.us_p80}
    for max_ctas, collective in works.items():
        ratio, rates = timing.median_ratio(samples[max_ctas], samples[0]), samplers[max_ctas].rates
        rate = median(rates) if rates else None
        row["beside"].append({
            "max_ctas": max_ctas, "ratio": ratio, "gb_per_s": rate and call_bytes * rate / 1e9,
            "hidden": rate and hidden_share(alone.us * 1e-6, ratio * alone.us * 1e-6, rate, collective.call_s),
        })  # fmt: skip
    if alone.us_p80 > 1.5 * alone.us_p20:
        row["flags"].append("noisy")
    return row
