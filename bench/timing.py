"""How a call is timed. Nothing here knows an op: a contestant is a list of calls, one per buffer set.

Contestants are interleaved: in each round everyone runs once, the order moves on by one each round, and every run takes
the next buffer set. So drift of the machine hits all alike, nobody profits from what its neighbour left in the caches,
and ratios of one round are paired. A sample is seconds per call; results are medians with the 20th and 80th percentile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    us: float
    us_p20: float
    us_p80: float


def summarise(seconds: Sequence[float]) -> Summary:
    """Median and 20th/80th percentiles (linear interpolation) of samples in seconds, as microseconds."""
    if len(seconds) == 0:
        raise ValueError("no samples")
    p20, median, p80 = (float(q) * 1e6 for q in numpy.percentile(seconds, [20, 50, 80]))
    return Summary(us=median, us_p20=p20, us_p80=p80)


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the per-round ratios: paired, so drift between rounds cancels."""
    return float(numpy.median([n / d for n, d in zip(numerator, denominator, strict=True)]))


class Rotation:
    """The buffer sets, one after the other; one rotation is shared by all contestants of a row."""

    def __init__(self, sets: int):
        self.sets, self._next = sets, 0

    def next(self) -> int:
        index = self._next
        self._next = (index + 1) % self.sets
        return index


def interleave(
    samplers: dict[str, Callable[[], float]],
    budget_s: float,
    min_rounds: int = 7,
    max_rounds: int = 200,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Rounds until the time is used up, but at least `min_rounds`. Returns the samples of each contestant by round."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    for round_index in range(max_rounds):
        if round_index >= min_rounds and clock() - start >= budget_s:
            break
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
        if after_round:
            after_round()
    return samples


# --- CPU --------------------------------------------------------------------------------------------------------------


class HostSampler:
    """Times calls with the host's clock; `inner` consecutive calls, each on the next set, make one sample. `undo` holds
    a call per set that takes back, untimed, what a call would otherwise do to the values again and again."""

    MOST_INNER = 10_000

    def __init__(self, calls: Sequence[Call], rotation: Rotation, clock=time.perf_counter, undo=None):
        self.calls, self.rotation, self.clock, self.undo, self.inner = calls, rotation, clock, undo, 1

    def warm_up(self, sample_s: float = 200e-6) -> None:
        """Runs once untimed, then takes as many calls per sample as make the clock's own cost negligible."""
        self()
        once = self()
        most = self.MOST_INNER if self.rotation.sets == 1 else max(1, self.rotation.sets // 4)
        self.inner = min(most, max(1, math.ceil(sample_s / max(once, 1e-9))))
        self()

    def __call__(self) -> float:
        chosen = [self.rotation.next() for _ in range(self.inner)]
        seconds = self._time([self.calls[index] for index in chosen])
        if self.undo:
            for index in chosen:
                self.undo[index]()
        return seconds / self.inner

    def _time(self, calls: Sequence[Call]) -> float:
        start = self.clock()
        for call in calls:
            call()
        return self.clock() - start


# --- CUDA -------------------------------------------------------------------------------------------------------------

GRAPH_S = 2e-3  # a replay lasts about this long, so that a launch's latency is a small part of it
MAX_GRAPH_CALLS = 4096


def graph_calls(call_s: float, sets: int) -> int:
    """Calls captured in one graph: whole rotations, about GRAPH_S of work, never more than MAX_GRAPH_CALLS."""
    rotations = max(1, math.ceil(GRAPH_S / max(call_s, 1e-7) / sets))
    return sets * max(1, min(rotations, MAX_GRAPH_CALLS // sets))


class CudaDriver:
    """The few torch.cuda calls that timing needs; tests replace it."""

    def __init__(self, device: int = 0):
        self.stream = torch.cuda.Stream(device)

    def run(self, calls: Sequence[Call]) -> None:
        """Eagerly, on the stream that will capture: lazy initialisation, compilation and autotuning happen here."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]):
        """A graph of the calls in order. It keeps its memory pool, the calls keep their buffers alive."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for call in calls:
                    call()
        finally:
            torch.cuda.set_stream(stream)  # torch.cuda.graph does not leave its stream when a capture fails
        torch.cuda.synchronize()
        return graph.replay

    def event(self):
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class CudaSampler:
    """Times replays of a CUDA graph with events; falls back to eager launches, and says so, if capture fails."""

    def __init__(self, calls: Sequence[Call], driver: CudaDriver):
        self.calls, self.driver = calls, driver  # a replay is whole rotations of its own
        self.note: str | None = None
        self.replay: Call = lambda: None
        self.captured = 0

    def warm_up(self) -> None:
        sets = len(self.calls)
        self.driver.run([self.calls[i % sets] for i in range(max(3, min(sets, 8)))])
        once = self._time(lambda: [self.calls[i % sets]() for i in range(8)]) / 8
        order = [self.calls[i % sets] for i in range(graph_calls(once, sets))]
        self.captured = len(order)
        try:
            self.replay = self.driver.capture(order)
        except RuntimeError as error:
            self.note = f"timed without a CUDA graph, launch costs included: {first_line(error)}"
            self.driver.synchronize()

            def replay() -> None:
                for call in order:
                    call()

            self.replay = replay
        self()

    def _time(self, work: Call) -> float:
        # The untimed first pass keeps the GPU busy while the host enqueues the rest: without it the gap between the
        # start event and the first kernel would be counted. It also brings the caches to their steady state.
        start, end = self.driver.event(), self.driver.event()
        work()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def __call__(self) -> float:
        return self._time(self.replay) / self.captured


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
