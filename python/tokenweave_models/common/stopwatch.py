"""Times pieces of work on the device that runs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Takes the time of every `measure()` block: wall clock on a CPU, stream events on a GPU (read after the pass)."""

    def __init__(self, device: torch.device):
        self._device, self._is_cuda = device, device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        if self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(self._device)  # of this device, which need not be the current one
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((begin, end))
        else:
            begin_s = perf_counter()
            yield
            self._seconds.append(perf_counter() - begin_s)

    def each_ms(self) -> list[float]:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
            return [begin.elapsed_time(end) for begin, end in self._events]
        return [seconds * 1e3 for seconds in self._seconds]

    def total_ms(self) -> float:
        return sum(self.each_ms())
